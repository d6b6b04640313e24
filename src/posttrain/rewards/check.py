"""Trying a reward before it is trusted: right answers, wrong ones, empty, huge and hostile completions.

A right answer is what the data says it is, in the form that the reward likes best of a few usual ones; a wrong one is
the right answer of another row in that same form. What is looked for: exceptions and values that are no rewards; a
reward that does not tell right from wrong; one that pays for nothing, or for everything at once; one that is slow.

A training run does a short version of it before its first step (`before_training`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from posttrain.rewards.answers import COLUMNS, as_text, gold_column, marked_answer
from posttrain.rewards.functions import LATE, Completions, RewardError, Rewards, weighted_sum
from posttrain.rewards.hostile import hostile
from posttrain.types import Content

FORMS = {
    "as it is": "{gold}",
    "in \\boxed{}": "\\boxed{{{final}}}",
    "after ####": "#### {final}",
    "in <answer>": "<answer>{final}</answer>",
    "in <think> and <answer>": "<think>\n…\n</think>\n<answer>\n{final}\n</answer>",
}
"""How a right answer may be written: with the whole of the row's answer, or what it marks as final."""
HUGE = 200_000
SHORT_ROWS = 8
GOOD, POOR_SIGNAL = 0.9, 0.2
PATIENCE = 2
"""Calls that may be late before the others are not tried any more."""
SLOW = 1.0
"""Seconds for a completion."""


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Token ids of any text; half a character, which no tokenizer takes, is a question mark."""

    def encode(text: str) -> list[int]:
        whole = text.encode("utf-8", "replace").decode("utf-8")
        return list(tokenizer(whole, add_special_tokens=False)["input_ids"])

    return encode


@dataclass(frozen=True)
class Material:
    """What a reward is tried on: rows of the data, as lists by column. `gold` are the right answers, of the column
    `named`; `encode` makes token ids of a text, `form` is a form for right answers (with `{gold}`) beside the usual
    ones."""

    prompts: Sequence[Content]
    columns: Mapping[str, Sequence[Any]]
    gold: Sequence[Any] | None
    named: str | None = None
    encode: Callable[[str], list[int]] = lambda text: list(text.encode("utf-8", "replace"))
    form: str | None = None

    @classmethod
    def of(cls, prompts: Sequence[Content], columns: Mapping[str, Sequence[Any]], gold: str | None = None,
           **more: Any) -> Material:  # fmt: skip
        """`gold` names the column of right answers; by default the usual ones are looked for."""
        found = gold_column(columns, gold) or ("completion" if gold is None and "completion" in columns else None)
        seen = {name: values for name, values in columns.items() if name not in ("completion", "completion_ids")}
        return cls(prompts, seen, columns[found] if found else None, found, **more)

    def without_gold(self) -> Material:
        return replace(self, gold=None)


@dataclass(frozen=True)
class Trial:
    """One call: `rewards` are weighted sums (None: nothing was said), or `error` says what went wrong."""

    name: str
    seconds: float
    rewards: tuple[float | None, ...] = ()
    error: str | None = None

    @property
    def said(self) -> list[float]:
        return [value for value in self.rewards if value is not None]

    @property
    def mean(self) -> float:
        return sum(self.said) / len(self.said) if self.said else float("nan")


@dataclass(frozen=True)
class Separation:
    """In how many of `rows` the row's own answer is worth more than another's (a tie counts half), and what they are
    worth; `form` is how the answers were written."""

    form: str
    rows: int
    share: float
    right: float
    wrong: float

    @property
    def goodness(self) -> tuple[float, float]:
        return self.share, self.right - self.wrong


@dataclass(frozen=True)
class Signal:
    """Of samples of a model: groups of `size`, in how many of them rewards differ."""

    groups: int
    size: int
    with_signal: int
    lowest: float
    highest: float
    mean: float


@dataclass
class Report:
    trials: list[Trial] = field(default_factory=list)
    separation: Separation | None = None
    signal: Signal | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


@dataclass
class TryOut:
    rewards: Rewards
    material: Material
    report: Report = field(default_factory=Report)
    late: int = 0

    def ask(
        self, name: str, texts: Sequence[str], rows: Sequence[int], ids: Sequence[list[int]] | None = None
    ) -> Trial:
        """What completions `texts` of `rows` are worth; `ids` are their tokens, where they were sampled."""
        started = time.monotonic()
        try:
            values_NF = self.rewards(self._completions(texts, rows, ids))
        except RewardError as error:
            self.late += error.code == LATE
            return Trial(name, time.monotonic() - started, error=error.message)
        seconds = time.monotonic() - started
        total_N = weighted_sum(values_NF, np.array(self.rewards.weights))
        rewards = [None if np.isnan(total) else float(total) for total in total_N]
        return Trial(name, seconds, tuple(rewards))

    def _completions(self, texts: Sequence[str], rows: Sequence[int], ids: Sequence[list[int]] | None) -> Completions:
        material = self.material
        prompts = [material.prompts[row] for row in rows]
        contents: list[Content] = [
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        columns = {name: [values[row] for row in rows] for name, values in material.columns.items()}
        return Completions(prompts, contents, ids or [material.encode(text) for text in texts], columns)

    def keep(self, trial: Trial) -> Trial:
        """Into the report, with what is wrong about it."""
        self.report.trials.append(trial)
        if trial.error is not None:
            self.report.errors.append(f"{trial.name}: {trial.error}")
        elif trial.seconds > SLOW * max(1, len(trial.rewards)):
            each = trial.seconds / max(1, len(trial.rewards))
            self.report.warnings.append(f"{trial.name}: it takes {each:.1f} s for a completion")
        return trial

    # --- right and wrong ----------------------------------------------------------------------------------------------

    def why_not_separated(self) -> str | None:
        """Why no right answer can be held against a wrong one, where none can."""
        gold, named = self.material.gold, self.material.named
        if gold is None:
            return f"no column of right answers ({', '.join((*COLUMNS, 'completion'))})"
        if self._pairs():
            return None
        return f"no {'two right answers that differ' if any(_texts(gold)) else 'right answers'} in column {named}"

    def separate(self, forms: Mapping[str, str] = FORMS) -> None:
        """Right answers and other rows' in the form in which they differ most; the first that is good is taken."""
        pairs = self._pairs()
        if not pairs:
            return
        rows = [row for row, _, _ in pairs]
        right, wrong = [own for _, own, _ in pairs], [other for _, _, other in pairs]
        if self.material.form is not None:
            forms = {"as asked": self.material.form}
        best: tuple[Separation, list[Trial]] | None = None
        for name, form in forms.items():
            trials = []
            for kind, golds in (("right", right), ("wrong", wrong)):
                trial = self.ask(f"{kind} answers {name}", [_in_form(form, gold) for gold in golds], rows)
                if trial.error is not None:
                    self.keep(trial)
                    return
                trials.append(trial)
            found = _separation(name, *trials)
            if best is None or (found.share, found.right - found.wrong) > (
                best[0].share,
                best[0].right - best[0].wrong,
            ):
                best = found, trials
            if found.share >= GOOD:
                break
        assert best is not None
        self.report.separation = best[0]
        for trial in best[1]:
            self.keep(trial)

    def _pairs(self) -> list[tuple[int, str, str]]:
        """Rows with their own answer and the next one that differs."""
        texts = _texts(() if self.material.gold is None else self.material.gold)
        made = []
        for row, text in enumerate(texts):
            if not text:
                continue
            others = (texts[(row + step) % len(texts)] for step in range(1, len(texts)))
            other = next((one for one in others if one and _final(one) != _final(text)), None)
            if other is not None:
                made.append((row, text, other))
        return made

    def judge_separation(self) -> None:
        found = self.report.separation
        if found is None:
            return
        if all(trial.mean != trial.mean for trial in self.report.trials[:2]):
            self.report.errors.append("it says nothing of right answers, nor of wrong ones")
        elif found.share <= 0.5:
            what = "prefers wrong answers to right ones" if found.share < 0.5 else "does not tell right from wrong"
            self.report.errors.append(
                f"it {what}: a row's own answer is worth {found.right:g}, another row's {found.wrong:g} (on average "
                f"over {found.rows} rows, however they are written)"
            )
        elif found.share < GOOD:
            self.report.warnings.append(
                f"in {(1 - found.share):.0%} of {found.rows} rows another row's answer is worth as much as its own"
            )

    def judge_silence(self) -> None:
        """Nothing else that is looked for is wrong about a reward that says nothing."""
        if self.report.passed and not self._all_said():
            count = sum(len(trial.rewards) for trial in self.report.trials)
            self.report.errors.append(f"it says nothing of anything: None for each of {count} completions")

    def judge_sameness(self) -> None:
        if self.report.passed and len(said := self._all_said()) == 1:
            self.report.warnings.append(
                f"everything that was tried is worth the same ({said.pop():g}): it was not seen to tell anything apart"
            )

    def _all_said(self) -> set[float]:
        return {value for trial in self.report.trials for value in trial.said}

    # --- what is no answer --------------------------------------------------------------------------------------------

    def empty(self) -> None:
        trial = self.keep(self._asked_of_some("empty", ""))
        self._must_be_worth_less(trial, self.report.errors)

    def huge(self, characters: int = HUGE) -> None:
        trial = self.keep(self._asked_of_some("huge", ("wait, let me think. " * (characters // 20 + 1))[:characters]))
        self._must_be_worth_less(trial, self.report.warnings)

    def everything(self) -> None:
        """All answers in one completion: a reward that looks for the answer anywhere pays for it."""
        pairs, found = self._pairs(), self.report.separation
        if found is None or len(pairs) < 3:
            return
        form = self.material.form or FORMS[found.form]
        said = " ".join(dict.fromkeys(_in_form(form, text) for _, text, _ in pairs))
        rows = self._some([row for row, _, _ in pairs])
        trial = self.keep(self.ask("every answer at once", [said] * len(rows), rows))
        self._must_be_worth_less(trial, self.report.warnings)

    def hostile(self) -> None:
        for name, text in hostile():
            if self.late >= PATIENCE:
                return
            self._must_be_worth_less(self.keep(self._asked_of_some(name, text)), self.report.warnings)

    def _asked_of_some(self, name: str, text: str) -> Trial:
        """The same of several rows: by accident it may be right of one."""
        rows = self._some(range(len(self.material.prompts)))
        return self.ask(name, [text] * len(rows), rows)

    def _some(self, rows: Sequence[int]) -> list[int]:
        return sorted({rows[0], rows[len(rows) // 2], rows[-1]})

    def _must_be_worth_less(self, trial: Trial, findings: list[str]) -> None:
        found = self.report.separation
        if found is not None and found.share > 0.5 and trial.said and trial.mean >= found.right:
            findings.append(f"{trial.name}: worth {trial.mean:g}, as much as right answers ({found.right:g})")

    # --- groups -------------------------------------------------------------------------------------------------------

    def groups(self, texts: Sequence[str], ids: Sequence[list[int]], rows: Sequence[int], size: int) -> None:
        """Samples of a model, `size` of each row together: whether there is anything to learn from them."""
        trial = self.keep(self.ask("samples of the model", texts, rows, ids))
        if trial.error is not None:
            return
        if not trial.said:
            self.report.errors.append("samples of the model: it says nothing of any of them")
            return
        parts = [trial.rewards[start : start + size] for start in range(0, len(texts), size)]
        differ = sum(len({value for value in part if value is not None}) > 1 for part in parts)
        found = Signal(len(parts), size, differ, min(trial.said), max(trial.said), trial.mean)
        self.report.signal = found
        if differ == 0:
            self.report.errors.append(
                f"no group would have a signal: in each of {len(parts)} groups of {size} samples all rewards are the "
                f"same (mean {found.mean:g})"
            )
        elif differ < POOR_SIGNAL * len(parts):
            self.report.warnings.append(
                f"{differ} of {len(parts)} groups of {size} samples would have a signal; easier prompts, more samples "
                "or a reward with steps would give more"
            )


def _texts(gold: Sequence[Any]) -> list[str]:
    """Right answers as text, empty where a row has none."""
    return ["" if one is None else as_text(one).strip() for one in gold]


def _in_form(form: str, gold: str) -> str:
    return (
        form.format(gold=gold, final=_final(gold)) if form in FORMS.values() else form.replace("{gold}", _final(gold))
    )


def _final(gold: str) -> str:
    return marked_answer(gold) or gold


def _separation(form: str, right: Trial, wrong: Trial) -> Separation:
    pairs = [(r, w) for r, w in zip(right.rewards, wrong.rewards, strict=True) if r is not None and w is not None]
    won = sum((r > w) + 0.5 * (r == w) for r, w in pairs)
    return Separation(form, len(pairs), won / len(pairs) if pairs else 0.5, right.mean, wrong.mean)


def try_reward(
    rewards: Rewards, material: Material, wants_gold: bool = True, sample: Callable[[TryOut], object] = lambda _: None
) -> TryOut:
    """`sample` adds samples of a model (`groups`)."""
    tryout = TryOut(rewards, material)
    tryout.separate()
    tryout.judge_separation()
    if wants_gold and (why := tryout.why_not_separated()) is not None:
        tryout.report.warnings.append(f"{why}: whether it tells right from wrong was not tried")
    for part in (tryout.empty, tryout.huge, tryout.everything, tryout.hostile):
        if tryout.late < PATIENCE:
            part()
    if tryout.late >= PATIENCE:
        tryout.report.errors.append(f"it was late {tryout.late} times; the rest was not tried")
    sample(tryout)
    tryout.judge_silence()
    tryout.judge_sameness()
    return tryout


def before_training(rewards: Rewards, material: Material, longest: int) -> list[str]:
    """The short version, on a few rows: what would spoil a run raises RewardError, what may is said in a sentence each.
    A function that judges form alone does not tell right from wrong, so only their sum is asked to; and it may well
    find the two completions that are no answers worth the same."""
    rows = range(min(SHORT_ROWS, len(material.prompts)))
    few = replace(
        material,
        prompts=[material.prompts[row] for row in rows],
        columns={name: [values[row] for row in rows] for name, values in material.columns.items()},
        gold=None if material.gold is None else [material.gold[row] for row in rows],
    )
    tryout = TryOut(rewards, few)
    for part in (tryout.separate, tryout.empty, lambda: tryout.huge(4 * longest)):
        part()
        if not any(trial.error for trial in tryout.report.trials):
            continue
        raise RewardError(f"tried before training, {tryout.report.errors[-1]}", code="E-REWARD-0003",
                          hint="try it by itself: posttrain reward test FILE.py --data DATA; reward_check=False trains "
                               "without trying")  # fmt: skip
    tryout.judge_separation()
    tryout.judge_silence()
    if few.gold is not None and not any(_texts(few.gold)):
        tryout.report.warnings.append(f"{tryout.why_not_separated()} of the {len(rows)} rows that were tried")
    return tryout.report.errors + tryout.report.warnings

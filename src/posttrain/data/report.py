"""What became of the rows: read, used, skipped and why, truncated, and how many of their tokens are trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.data.codes import REASONS
from posttrain.data.passed_over import NO_PLACE, way_out
from posttrain.errors import DataError
from posttrain.types import Origin

NUM_FIRST = 5
NUM_LISTED = 10_000
REMARKS = {
    "boundary_moved": "have prompts whose tokens change when the completion follows, so that training sees a context "
    "that use does not: end prompts on a token boundary, e.g. before a space",
    "untrained": "are packed without their answer",
    "endless": "end, in the chat template, with no token of its own: the model will not learn to stop",
    "given_otherwise": "hold turns before which the model, in use, is given another text than in training (a "
    "generation prompt or earlier turns that the template writes otherwise): see one with `posttrain data tokens`",
    "thought_lost": "hold thoughts that the chat template leaves out, so that they are not trained",
    "thought_after_none": "hold a thought behind the empty one that the chat template writes where thinking is off "
    "(`enable_thinking`, /no_think), so that the model learns to think all the same: leave out the thought or the "
    "switch",
    "tools_left_out": "have tools that the chat template leaves out, so that the model does not see what it may call",
    "arguments_quoted": "hold calls whose arguments are JSON in a text, which the chat template writes as JSON once "
    "more, so that the model learns to write them in quotes: give `arguments` as objects",
    "special_in_text": "hold special tokens in what others than the assistant say: they are encoded as these tokens",
    "stops_in_answers": "hold, in what the assistant says, tokens that end or begin a turn ({stops}): the model learns "
    "to stop there, or to go on as another. Take them out of the text: the template writes them itself",
    "flags_cut": "have train flags whose edge lies within a token: {cut} tokens are left out, for a token is trained "
    "only if all its characters are. Let a range hold whole words, each with the space before it",
    "others_trained": "are conversations in one text (Human: ... Assistant: ...), read as text, in which what others "
    "say is trained as well: make `messages` of them",
    "transcripts": "hold conversations in one text (Human: ... Assistant: ...), read as text that no chat template "
    "writes: make `messages` of them, if the model is to chat",
    "prompt_repeated": "have an answer that begins with its whole prompt, which then stands there twice: leave it out "
    "of the answer",
    "silent_turns": "hold turns of a user or the system that say nothing: leave such turns out, or drop the rows",
    "other_questions": "compare answers to different questions: the two part with a turn of the user's or the "
    "system's, whose words are trained as well: let them part with the assistant's answer, or drop the rows",
    "unknown_arguments": "have `chat_template_kwargs` that the chat template does not know ({unknown}): see how it "
    "spells them",
    "from_json": "hold messages as JSON in a text, which is read as the messages that it stands for",
    "json_as_text": "hold messages written into a text (JSON beside a text that is none, or as Python prints a list), "
    "which is trained as the text that it is: write prompt and answers all as messages, if they are meant",
    "marks_in_text": "hold what the chat template writes around turns, as text: a model may take it for another turn",
    "odd_systems": "hold several system turns, or one that does not come first (W-DATA-0129): the chat template writes "
    "them where they stand, as few models have seen it",
    "without_bos": "begin without the token that the tokenizer puts before plain text: the chat template writes none",
}
"""What is said of rows whose rendering differs from what their author may expect."""


@dataclass
class Cases:
    """How often something happened, and the first rows it happened to."""

    count: int = 0
    first: list[Origin] = field(default_factory=list)

    def add(self, origin: Origin) -> None:
        self.count += 1
        if len(self.first) < NUM_FIRST:
            self.first.append(origin)


@dataclass
class DataReport:
    """`tokens` and `supervised` are of what is used; the `lost` ones were cut off by `max_length`, which includes
    those of rows of which nothing was left to train. `untrained` rows are in a pack (as in TRL) though all that was
    to be trained of them was cut off; `endless` conversations end without a token to stop at; `left_out` says why
    of every row that is not used (of the first 10,000); `boundary_moved` are rows whose prompt alone has other
    tokens than in front of its completion, or in which a turn begins or ends within a token. `flags_cut` are rows
    in which the edge of a flag lies within a token, which is left out (`tokens_cut` in all). `given_otherwise` are
    rows in which the model is given another text, in use, than stands before a turn of its own; `thought_lost` and
    `tools_left_out`, whose thoughts or tools the template leaves out; `thought_after_none`, with a thought behind the
    empty one of a template whose thinking is off; `arguments_quoted`, with arguments of calls
    that are JSON in a text and that the template writes as JSON once more; `special_in_text`, whose user or tool
    text holds special tokens; `stops_in_answers`, in which the assistant says a token that ends or begins turns
    (`stops` counts the rows with each); `marks_in_text`, which hold other marks of the template's; `from_json` and
    `json_as_text`, whose messages are JSON in a text, read as messages and as text; `odd_systems`, with a system
    turn that is not the first message; `without_bos`, that begin without the token which the tokenizer puts before
    plain text. `written_as_text` counts the rows that hold each marker of a named template that is no token of the
    tokenizer. `no_place` are the rows with each column that looks meant and that their format has no place for,
    `others_trained` and `transcripts` are conversations in one text, `prompt_repeated` rows whose answer begins
    with the prompt, `silent_turns` those with an empty turn of a user or the system, `other_questions` pairs that
    part with a turn of these, `unknown_arguments` rows whose `chat_template_kwargs` the template does not know
    (`unknown` counts each), `other_formats` those that each other format could be read from as well; `unrated` have
    a `label` that is no rating."""

    source: str
    rows: int = 0
    used: int = 0
    conversational: int = 0
    tokens: int = 0
    supervised: int = 0
    tokens_lost: int = 0
    supervised_lost: int = 0
    packs: int | None = None
    formats: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, Cases] = field(default_factory=dict)
    truncated: Cases = field(default_factory=Cases)
    untrained: Cases = field(default_factory=Cases)
    endless: Cases = field(default_factory=Cases)
    boundary_moved: Cases = field(default_factory=Cases)
    given_otherwise: Cases = field(default_factory=Cases)
    thought_lost: Cases = field(default_factory=Cases)
    thought_after_none: Cases = field(default_factory=Cases)
    tools_left_out: Cases = field(default_factory=Cases)
    arguments_quoted: Cases = field(default_factory=Cases)
    special_in_text: Cases = field(default_factory=Cases)
    stops_in_answers: Cases = field(default_factory=Cases)
    stops: Counter[str] = field(default_factory=Counter)
    marks_in_text: Cases = field(default_factory=Cases)
    flags_cut: Cases = field(default_factory=Cases)
    tokens_cut: int = 0
    others_trained: Cases = field(default_factory=Cases)
    transcripts: Cases = field(default_factory=Cases)
    prompt_repeated: Cases = field(default_factory=Cases)
    silent_turns: Cases = field(default_factory=Cases)
    other_questions: Cases = field(default_factory=Cases)
    unknown_arguments: Cases = field(default_factory=Cases)
    unknown: Counter[str] = field(default_factory=Counter)
    from_json: Cases = field(default_factory=Cases)
    json_as_text: Cases = field(default_factory=Cases)
    odd_systems: Cases = field(default_factory=Cases)
    without_bos: Cases = field(default_factory=Cases)
    written_as_text: Counter[str] = field(default_factory=Counter)
    no_place: dict[str, Cases] = field(default_factory=dict)
    other_formats: dict[str, Cases] = field(default_factory=dict)
    unrated: Cases = field(default_factory=Cases)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    first_error: DataError | None = None

    def skip(self, error: DataError, origin: Origin) -> None:
        self.first_error = self.first_error or error
        self.drop(error.code, origin, error.message)

    def drop(self, code: str, origin: Origin, why: str | None = None) -> None:
        if len(self.left_out) < NUM_LISTED:
            self.left_out.append((code, why or f"{origin}  {REASONS.get(code, code)}"))
        self.skipped.setdefault(REASONS.get(code, code), Cases()).add(origin)

    @property
    def num_skipped(self) -> int:
        return sum(cases.count for cases in self.skipped.values())

    @property
    def trained_share(self) -> float:
        return self.supervised / self.tokens if self.tokens else 0.0

    def summary(self) -> str:
        """`train.jsonl 1 003 rows: 1 000 used, 3 skipped (empty completion), 12 truncated; 65.6 % of tokens trained`"""
        parts = [f"{number(self.used)} used"]
        if self.skipped:
            parts.append(f"{number(self.num_skipped)} skipped ({self._reasons()})")
        if self.truncated.count:
            parts.append(f"{number(self.truncated.count)} truncated")
        if self.packs is not None:
            parts.append(f"{number(self.packs)} packs")
        name = Path(self.source).name or self.source
        trained = f"{100 * self.trained_share:.1f} % of tokens trained"
        return f"{name} {number(self.rows)} rows: {', '.join(parts)}; {trained}"

    def _reasons(self) -> str:
        if len(self.skipped) == 1:
            return next(iter(self.skipped))
        return ", ".join(f"{number(cases.count)} {reason}" for reason, cases in self.skipped.items())

    def notes(self) -> list[str]:
        """What deserves a second look, a sentence each."""
        notes = list(self.formats)
        if self.supervised_lost:
            share = 100 * self.supervised_lost / (self.supervised + self.supervised_lost)
            notes.append(
                f"max_length cuts off {number(self.supervised_lost)} tokens that were to be trained ({share:.2g} % of "
                "them)"
            )
        if self.written_as_text:
            tokens = ", ".join(self.written_as_text)
            notes.append(f"the chat template writes {tokens}, which the tokenizer has not as tokens: they stay text")
        cases = {self.remark(name): getattr(self, name) for name in REMARKS}
        return [*notes, *self._passed_over(), *(_about(case, what) for what, case in cases.items() if case.count)]

    def remark(self, name: str) -> str:
        """What is said of the cases called `name`."""
        named = {"stops": ", ".join(self.stops), "unknown": ", ".join(self.unknown), "cut": number(self.tokens_cut)}
        return REMARKS[name].format(**named)

    def _passed_over(self) -> Iterator[str]:
        """What rows hold and nothing is made of."""
        for name, cases in self.no_place.items():
            yield _about(cases, f"have `{name}`, {NO_PLACE}: {way_out(name)}")
        for name, cases in self.other_formats.items():
            what = f"could be read as {name} too, which is passed over: format=... (--format) names what is meant"
            yield _about(cases, what)
        if self.unrated.count and REASONS["E-DATA-0017"] in self.skipped:
            yield _about(self.unrated, "have a `label` that is no rating, among rows of another method: broken ones, "
                                       "which are trained as plain examples")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """For JSON: counts, and the first rows of each case by name."""
        values = {name: value for name, value in vars(self).items() if name != "first_error"}
        return {name: _plain(value) for name, value in values.items()}


def number(value: int) -> str:
    """`1 003`: digits in groups of three."""
    return f"{value:,}".replace(",", " ")


def _plain(value: Any) -> Any:
    if isinstance(value, Cases):
        return {"count": value.count, "first": [str(origin) for origin in value.first]}
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _about(cases: Cases, what: str) -> str:
    return f"{number(cases.count)} rows (first: {cases.first[0]}) {what}"

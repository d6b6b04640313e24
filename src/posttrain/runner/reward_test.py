"""What `posttrain reward test` does: find the reward, read rows, try it, and sample a model where one is named.

A file is imported, which runs it: it is the user's own code, as it would be in training.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.data.columns import parse_names, read_columns
from posttrain.data.conversation import clean_messages
from posttrain.data.prompts import Prompt, PromptSettings, check_last_turn, check_tokens, read_prompts
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError, DataError
from posttrain.rewards import LIBRARY
from posttrain.rewards.check import Material, Report, TryOut, encoder, try_reward
from posttrain.rewards.functions import Rewards, name_of
from posttrain.trainers.rewards import named_reward
from posttrain.types import Content


@dataclass(frozen=True)
class Samples:
    """Of `model`: `count` completions of each of the first `prompts` prompts."""

    model: str
    prompts: int
    count: int
    max_tokens: int
    temperature: float
    seed: int


def try_on_data(
    reward: str, data: str, function: str | None, gold: str | None, form: str | None, renamed: Sequence[str],
    rows: int, timeout: float, samples: Samples | None,
) -> tuple[str, Report]:  # fmt: skip
    """The reward's name, and what came of it. Raises UserError for what cannot be tried."""
    if form is not None and "{gold}" not in form:
        raise ConfigError(f"--as {form!r} has no {{gold}}", hint="--as 'Answer: {gold}'")
    if rows < 1 or not timeout > 0:
        raise ConfigError("--rows and --timeout must be above 0")
    if samples is not None and (samples.count < 2 or samples.prompts < 1 or samples.max_tokens < 1):
        raise ConfigError("--num-generations must be 2 or more, --prompts and --max-completion-length 1 or more")
    found = find_reward(reward, function)
    name = name_of(found)
    material = _material(data, parse_names(renamed), rows, None if gold == "none" else gold)
    if gold == "none":
        material = material.without_gold()
    material, tokenizer = replace(material, form=form), None
    if samples is not None:
        from posttrain.models.adapter_folder import tokenizer_of
        from posttrain.models.load import is_adapter, load_tokenizer

        tokenizer = (tokenizer_of if is_adapter(samples.model) else load_tokenizer)(samples.model)
        material = replace(material, encode=encoder(tokenizer))
    extra = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
    rewards = Rewards({name: found}, [1.0], deadline=timeout, extra=extra)
    printed = _Counter()

    def sample(tryout: TryOut) -> None:
        if samples is not None:
            _sample(tryout, samples, tokenizer, data, parse_names(renamed))

    with contextlib.redirect_stdout(printed):
        tryout = try_reward(rewards, material, gold != "none", sample)
    if printed.count:
        tryout.report.warnings.append(f"it prints: {printed.count} characters in {len(tryout.report.trials)} calls")
    return name, tryout.report


def find_reward(reward: str, function: str | None, which: str = "--function NAME says which") -> Callable[..., Any]:
    """Raises ConfigError where there is no such function, or several: `which` tells how one is named."""
    if not reward.endswith(".py"):
        if function is not None:
            raise ConfigError(f"--function names a function of a file, and {reward!r} is none")
        if reward in LIBRARY or ":" in reward:
            return LIBRARY[reward] if reward in LIBRARY else named_reward(reward)
        raise ConfigError(f"there is no reward {reward!r}",
                          hint=f"a file.py, package.module:function, or one of {', '.join(LIBRARY)}")  # fmt: skip
    path = Path(reward)
    if not path.is_file():
        raise ConfigError(f"there is no file {reward}")
    module = _imported(path)
    own = {
        name: value for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        and not isinstance(value, type)
    }  # fmt: skip
    if function is not None:
        found = getattr(module, function, None)
        if not callable(found):
            raise ConfigError(f"{reward} has no function {function!r}", hint=f"it has {', '.join(own) or 'none'}")
        return found
    if len(own) != 1:
        has = f"has {len(own)} functions: {', '.join(own)}" if own else "has no function"
        raise ConfigError(f"{reward} {has}", hint=which if own else f"{which}, also of one that a call has made")
    return next(iter(own.values()))


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses in it look for their module
    if (home := str(path.parent.resolve())) not in sys.path:  # as where Python runs a file
        sys.path.insert(0, home)
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code of the user's own; sys.exit(0) in it must not look like success
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _material(data: str, names: dict[str, str], most: int, gold: str | None) -> Material:
    """The first rows. Raises DataError, ConfigError."""
    rows: list[dict[str, Any]] = []
    prompts: list[Content] = []
    for origin, row in islice(read_rows(data, "data"), most):
        row = read_columns(row, names, origin)
        prompt = row.get("prompt")
        if not isinstance(prompt, str | list):
            raise DataError(f"{origin} has no `prompt` (columns {', '.join(row)})", code="E-DATA-0010",
                            hint="--map question=prompt reads another column as the prompt")  # fmt: skip
        if isinstance(prompt, list):
            prompt = clean_messages(prompt, "prompt", row, origin)
            check_last_turn(prompt, row, origin)
        if prompts and isinstance(prompt, list) is not isinstance(prompts[0], list):
            raise DataError(f"{origin}: `prompt` is text in some rows and messages in others", code="E-DATA-0016",
                            hint="write all of them one way")  # fmt: skip
        prompts.append(prompt)
        rows.append({name: value for name, value in row.items() if name != "prompt"})
    if not rows:
        raise DataError(f"{data} has no rows", code="E-DATA-0031")
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    if gold is not None and gold not in columns:
        raise ConfigError(f"--gold {gold}: {data} has no such column", hint=f"it has {', '.join(columns) or 'none'}")
    return Material.of(prompts, columns, gold)


def _sample(tryout: TryOut, samples: Samples, tokenizer: Any, data: str, names: dict[str, str]) -> None:
    """Completions of the model as it is, judged in groups."""
    from transformers import TrainingArguments

    from posttrain.evaluate.generation import stop_ids
    from posttrain.models.adapter_folder import open_adapter
    from posttrain.models.capabilities import learned_places
    from posttrain.models.load import is_adapter, load_model
    from posttrain.models.memory import keeping_freed_pages
    from posttrain.rollout.engines import Request
    from posttrain.rollout.engines.local import LocalEngine
    from posttrain.rollout.fitting import generate_fitting
    from posttrain.rollout.sampling import Sampling
    from posttrain.session import Session

    model = (open_adapter if is_adapter(samples.model) else load_model)(samples.model, dtype="float32")
    prompts = _first_prompts(data, tokenizer, names, samples.prompts, len(tryout.material.prompts))
    check_tokens(prompts, model.get_input_embeddings().weight.shape[0], learned_places(model), samples.max_tokens,
                 hint="lower --max-completion-length")  # fmt: skip
    args = TrainingArguments("unused", report_to="none", bf16=False)
    with keeping_freed_pages(args.device):
        session = Session.open(model, args)
        try:
            engine = LocalEngine(session.policy, stop_ids(session.policy.base, tokenizer),
                                 lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))  # fmt: skip
            requests = [Request(prompt.ids.tolist(), key, samples.count) for key, prompt in enumerate(prompts)]
            sampling = Sampling(max_tokens=samples.max_tokens, temperature=samples.temperature, seed=samples.seed)
            made = generate_fitting(engine, requests, sampling)
        finally:
            session.close()
    texts = [str(tokenizer.decode(one.ids, skip_special_tokens=True)) for group in made for one in group]
    rows = [row for row in range(len(prompts)) for _ in range(samples.count)]
    tryout.groups(texts, [one.ids.tolist() for group in made for one in group], rows, samples.count)


def _first_prompts(data: str, tokenizer: Any, names: dict[str, str], count: int, known: int) -> list[Prompt]:
    rows = [row for _, row in islice(read_rows(data, "data"), min(count, known))]
    return read_prompts(rows, tokenizer, PromptSettings(column_map=names), data)[0]


def _ignore(*_: Any) -> None:
    """What a reward logs of completions that no one has sampled."""


class _Counter(io.TextIOBase):
    """Where what a reward prints goes: nowhere, counted."""

    count = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.count += len(text)
        return len(text)

"""A conversation with a model, or with several side by side: what `posttrain chat` does. Sampled by the engine that
samples in training, so that what one sees here is what training sees.

Left out: votes, GGUF files; the whole conversation is read anew at every turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from posttrain.errors import ConfigError
from posttrain.evaluate.generation import stop_ids
from posttrain.models import adapters
from posttrain.models.adapter_folder import open_adapter, tokenizer_of
from posttrain.models.forward import open_policy
from posttrain.models.load import is_adapter, load_model, load_tokenizer
from posttrain.models.precision import has_fast_bf16
from posttrain.rollout.engines import Request
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.sampling import Sampling
from posttrain.types import Message


@dataclass
class Speaker:
    """A model that answers, with its own memory of the conversation."""

    name: str
    engine: LocalEngine
    tokenizer: Any
    messages: list[Message]
    is_full: bool = False
    """Whether the model has no place left for more (positions that are learned come to an end)."""

    def answer(self, text: str, sampling: Sampling, turn: int) -> Iterator[str]:
        """The answer to `text`, piece by piece. Raises ConfigError where the model has no chat template, and where the
        conversation has become too long for it."""
        self.messages.append({"role": "user", "content": text})
        ids: list[int] = []
        told = ""
        rendered = self._rendered()
        for token in self.engine.stream(Request(rendered, turn), replace(sampling)):
            ids.append(token)
            now = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            if now.endswith("\ufffd"):  # half a character; the rest comes with the next token
                continue
            yield now[len(told) :]
            told = now
        self.messages.append({"role": "assistant", "content": told})
        self.is_full = self.engine.places is not None and len(rendered) + len(ids) >= self.engine.places

    def _rendered(self) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ConfigError(f"{self.name} has no chat template: it is no model to chat with",
                              hint="train it with a template, or give a model that has one")  # fmt: skip
        made = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(made["input_ids"])


def open_speaker(name: str, system: str | None) -> Speaker:
    """A model by name or folder; the folder of an adapter is opened with the model that it belongs to."""
    import torch

    dtype = "bfloat16" if has_fast_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "float32"
    if is_adapter(name):
        model, tokenizer = _with_adapter(name, dtype)
    else:
        model, tokenizer = load_model(name, dtype=dtype), load_tokenizer(name)
    if torch.cuda.is_available():
        model.to("cuda")
    engine = LocalEngine(open_policy(model.eval()), stop_ids(model, tokenizer), tokenizer.decode, max_rows=1)
    return Speaker(name, engine, tokenizer, [] if system is None else [{"role": "system", "content": system}])


def _with_adapter(folder: str, dtype: str) -> tuple[Any, Any]:
    model = open_adapter(folder, dtype)
    adapters.specialise(model)
    return model, tokenizer_of(folder)

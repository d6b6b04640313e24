"""Greedy answers to many prompts: what evaluation asks a model. The engine that samples in training answers; a model
whose layers do not honour the packed layout is asked through its own `generate`, in batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from posttrain.errors import ConfigError
from posttrain.models import adapters
from posttrain.models.forward import Policy, open_policy
from posttrain.rollout.engines import Request
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.fitting import generate_fitting
from posttrain.rollout.sampling import Sampling
from posttrain.types import Message

logger = logging.getLogger("posttrain")


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[Message]],
    max_new_tokens: int,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """The greedy completion of each conversation, in the order of `prompts`, without the tokens that end a turn.
    `batch_size` of them are on their way at a time."""
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    stops = stop_ids(model, tokenizer)
    with tqdm(total=len(encoded), desc="answers", unit="", disable=not progress) as bar:
        with _opened(model) as policy:
            if policy is not None:
                engine = LocalEngine(policy, stops, max_rows=batch_size)
                requests = [Request(ids, number) for number, ids in enumerate(encoded)]
                made = generate_fitting(engine, requests, Sampling(max_new_tokens, temperature=0.0), landed=bar.update)
                rows = [group[0].ids.tolist() for group in made]
                return [tokenizer.decode(_until_stop(row, stops), skip_special_tokens=True) for row in rows]
        return _in_batches(model, tokenizer, encoded, max_new_tokens, stops, batch_size, bar)


@contextmanager
def _opened(model: Any) -> Iterator[Policy | None]:
    """The model as the engine takes it, or None where it cannot; it is given back as it was."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = base.config._attn_implementation
    try:
        adapters.specialise(model)
        try:
            policy = open_policy(model)
        except ConfigError as error:
            logger.info("answers  %s; the model's own generate is asked", error.message)
            policy = None
        yield policy if policy is not None and policy.is_packed else None
    finally:
        base.set_attn_implementation(attention)


def _in_batches(
    model: Any,
    tokenizer: Any,
    encoded: list[list[int]],
    max_new_tokens: int,
    stops: list[int],
    batch_size: int,
    bar: Any,
) -> list[str]:
    """Prompts of similar length share a batch, so that little is spent on padding."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    answers = [""] * len(encoded)
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = _complete(model, tokenizer, [encoded[index] for index in chosen], max_new_tokens, stops)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
            bar.update(len(chosen))
    return answers


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: those of the generation config and the tokenizer's own."""
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return sorted(ids - {None})


def _encode(tokenizer: Any, prompt: list[Message]) -> list[int]:
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def _complete(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, stops: list[int]) -> list[str]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    input_ids, attention_mask = _left_padded(prompts, pad)
    made = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=pad,
    )
    rows = made[:, input_ids.shape[1] :].tolist()
    return [tokenizer.decode(_until_stop(row, stops), skip_special_tokens=True) for row in rows]


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    ends = [ids.index(stop) for stop in stops if stop in ids]
    return ids[: min(ends)] if ends else ids


def _left_padded(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts aligned at their ends, and the mask of what is not padding."""
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    ids = [[pad] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    return torch.tensor(ids), torch.tensor(mask)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode it was in comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)

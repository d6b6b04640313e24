"""The next token of each row, from its logits and one random number.

The random numbers of a completion follow from the seed, its prompt's number and its own, by counting: not from what
else is in the batch, nor from when it is sampled. A token is drawn by walking the cumulated probabilities, first of
blocks of the vocabulary and then within one, which costs one soft-max and no random number a token of the vocabulary.

Log-probabilities are those that training computes: at the temperature, over the whole vocabulary, before top-k, top-p,
min-p and the repetition penalty, which only choose.

Shape suffixes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from posttrain import native
from posttrain.errors import ConfigError

BLOCK = 256
"""Tokens of the vocabulary whose probabilities are summed first."""


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. `temperature` 0 takes the likeliest token; `top_k` 0, `top_p` 1 and `min_p` 0 (of
    the likeliest token's probability) leave nothing out; `stop` are texts after which a completion ends.

    Raises: ConfigError for values that mean nothing.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name}={value!r} must be a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name}={value!r} must be a number")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop={list(self.stop)!r} must be texts that are not empty")
        ranges = {
            "seed": (self.seed >= 0, "at least 0"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (the likeliest token) or above"),
            "top_k": (self.top_k >= 0, "at least 0 (all tokens)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1: none)"),
        }
        for name, (fits, wanted) in ranges.items():
            if not fits:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {wanted}")

    @property
    def narrows(self) -> bool:
        """Whether some tokens are never taken."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def numbers(self, prompt: int, completion: int) -> np.ndarray:
        """`(max_tokens,)`: a number in [0, 1) for each token of a completion."""
        key = np.random.SeedSequence([self.seed, prompt, completion]).generate_state(2, np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).random(self.max_tokens)


def choose(
    logits_BV: torch.Tensor, number_B: torch.Tensor, sampling: Sampling, said: list[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row, and its log-probability in fp32: finite, unless what the model said of the row is
    not, and the token means nothing. `said` are the tokens of each row so far, for the
    repetition penalty (arXiv 1909.05858, equation 8)."""
    if sampling.temperature and not sampling.narrows and sampling.repetition_penalty == 1.0:
        if (kernels := native.kernels_for(logits_BV)) is not None:
            return kernels.draw(logits_BV, number_B, sampling.temperature)
        scaled_BV = logits_BV if sampling.temperature == 1.0 else logits_BV.float() / sampling.temperature
        p_BV = scaled_BV.softmax(-1, dtype=torch.float32)
        token_B = draw(p_BV, number_B)
        return token_B, p_BV.gather(1, token_B[:, None])[:, 0].log()
    z_BV = logits_BV.float() / (sampling.temperature or 1.0)
    lse_B1 = z_BV.logsumexp(-1, keepdim=True)
    kept_BV = z_BV
    if sampling.repetition_penalty != 1.0 and said is not None:
        kept_BV = _penalised(z_BV, said, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token_B = kept_BV.argmax(-1)
    else:
        if sampling.narrows:
            kept_BV = narrowed(kept_BV, sampling)
        token_B = draw(kept_BV.softmax(-1), number_B)
    return token_B, (z_BV.gather(1, token_B[:, None]) - lse_B1)[:, 0]


def draw(p_BV: torch.Tensor, number_B: torch.Tensor) -> torch.Tensor:
    """`(B,)`: the token whose share of the cumulated probabilities each number falls into. Rows need not sum to 1; one
    of NaN gives any token, for an index beyond the end would be the end of a GPU's process."""
    padded_BV = torch.nn.functional.pad(p_BV, (0, -p_BV.shape[1] % BLOCK))
    block_BMN = padded_BV.view(len(p_BV), -1, BLOCK)
    upto_BM = _cumulated(block_BMN.sum(-1, dtype=torch.float64))
    target_B1 = _below(number_B[:, None].to(upto_BM) * upto_BM[:, -1:], upto_BM[:, -1:])
    block_B1 = torch.searchsorted(upto_BM, target_B1, right=True).clamp(max=upto_BM.shape[1] - 1)
    before_B1 = torch.where(block_B1 > 0, upto_BM.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    inner_BN = _cumulated(block_BMN.gather(1, block_B1[..., None].expand(-1, -1, BLOCK))[:, 0].double())
    within_B1 = torch.searchsorted(inner_BN, _below(target_B1 - before_B1, inner_BN[:, -1:]), right=True)
    return (block_B1 * BLOCK + within_B1)[:, 0].clamp(max=p_BV.shape[1] - 1)


def _cumulated(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension. torch has none on CUDA that is deterministic, and raises where that is asked for."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return x.cpu().cumsum(-1).to(x.device)
    return x.cumsum(-1)


def _below(value: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Less than `end`, so that what is found lies before it and has a probability."""
    return torch.minimum(value, torch.nextafter(end, torch.zeros_like(end)))


def narrowed(z_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits without the tokens that are never taken: in this order all but the `top_k` likeliest, those beyond the
    smallest set that has `top_p` of the rest, those with less than `min_p` of the likeliest one's probability."""
    if 0 < sampling.top_k < z_BV.shape[1]:
        least_B1 = z_BV.topk(sampling.top_k, -1).values[:, -1:]
        z_BV = z_BV.masked_fill(z_BV < least_B1, -torch.inf)
    if sampling.top_p < 1:
        ordered_BV, index_BV = z_BV.sort(-1, descending=True)
        before_BV = _cumulated(ordered_BV.softmax(-1)) - ordered_BV.softmax(-1)
        beyond_BV = torch.zeros_like(z_BV, dtype=torch.bool).scatter(1, index_BV, before_BV >= sampling.top_p)
        z_BV = z_BV.masked_fill(beyond_BV, -torch.inf)
    if sampling.min_p > 0:
        z_BV = z_BV.masked_fill(z_BV < z_BV.amax(-1, keepdim=True) + math.log(sampling.min_p), -torch.inf)
    return z_BV


def _penalised(z_BV: torch.Tensor, said: list[torch.Tensor], penalty: float) -> torch.Tensor:
    changed_BV = z_BV.clone()
    for row_V, tokens in zip(changed_BV, said, strict=True):
        distinct = tokens.unique()
        row_V[distinct] = torch.where(row_V[distinct] > 0, row_V[distinct] / penalty, row_V[distinct] * penalty)
    return changed_BV

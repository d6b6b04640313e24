"""log p(target) at the supervised rows, in chunks, without ever holding the logits of a whole batch.

One autograd function serves every objective. With logits z = f(h W' + b), where f scales and caps (Gemma 2), it returns
per row: log p of the target, whether the target was the likeliest token, and on request the mean of log p over the
vocabulary (label smoothing), the entropy (with gradient where that is asked for too) and, without, the mean logit and
log sum p^2.

Gradients: d log p_t / dz = onehot_t - p and d H / dz = p (sum p z - z), whatever the objective does with them, so with
a frozen head the gradient with respect to the hidden state is made in the forward pass while p is at hand and only
scaled in the backward pass: two matrix products in all, as many as the mathematics asks for. A trained head needs the
incoming gradient for its own weight; there the chunk's logits are computed again in the backward pass, which costs one
product and no memory.

A chunk is as many rows as the matrix products want; soft-max and what follows it run over blocks of a few rows, which
stay in the processor's cache, in two fp32 buffers that are used again and again. On a CPU a native kernel does
all of that in three passes, where nothing out of the ordinary is asked for (`_fused`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from posttrain import native
from posttrain.native.kernels import Kernels
from posttrain.types import Needs, Outputs

CHUNK_ROWS = 256  # 256 x 49,152 logits are 25 MB in bf16: large enough for full speed, small enough to stay in memory
SLICE_ROWS = 8192
"""Rows of the head's weight whose gradient is added up at a time."""
BLOCK_SIZE = {"cpu": 2**20}
"""Logits of a block; on other devices a block is the whole chunk."""
NOTHING_MORE = Needs()


@dataclass(frozen=True)
class HeadShape:
    """What becomes of logits: multiplied by `scale`, then `softcap * tanh(z / softcap)`, as the family does, then
    divided by the `temperature` at which completions are sampled (reinforcement learning trains what it samples)."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply_(self, z_BV: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        """Turn products h W' into logits, in place."""
        if bias_V is not None:
            z_BV += bias_V
        if self.scale != 1.0:
            z_BV *= self.scale
        if self.softcap is not None:
            z_BV.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z_BV /= self.temperature

    def slope(self, z_CV: torch.Tensor) -> torch.Tensor | float:
        """d logits / d (h W' + b), given the logits."""
        if self.softcap is None:
            return self.scale / self.temperature
        return (1 - (z_CV * (self.temperature / self.softcap)).square()) * (self.scale / self.temperature)


def rows_of(states_TD: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
    """`(R, D)`. A prompt's last token is a row of each of its answers, and gradients of these are to be summed in one
    order: on a CPU `index_select` does so, on CUDA indexing."""
    return states_TD[rows_R] if states_TD.is_cuda else states_TD.index_select(0, rows_R)


def token_logps(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_R: torch.Tensor,
    shape: HeadShape,
    needs: Needs = NOTHING_MORE,
) -> Outputs:
    """Of each row fp32 values (`is_top1_R` boolean), natural logarithms; what `needs` does not ask for is None.

    `hidden_RD` are the hidden states that predict `target_R`; gradients flow into them, `weight_VD` and `bias_V`.
    """
    logp_R, uniform_R, top1_R, entropy_R, mean_R, collision_R = _TokenLogps.apply(
        hidden_RD, weight_VD, bias_V, target_R, shape, needs
    )
    return Outputs(
        logp_R,
        top1_R,
        entropy_R=entropy_R if needs.entropy or needs.entropy_gradient else None,
        uniform_logp_R=uniform_R if needs.uniform_logp else None,
        mean_logit_R=mean_R if needs.mean_logit else None,
        log_collision_R=collision_R if needs.log_collision else None,
    )


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Workspace:
    """The buffers of a chunk: `low_CV` in the compute dtype, `z_BV` and `p_BV` in fp32 (fp64 where the states are)."""

    def __init__(self, hidden_RD: torch.Tensor, vocabulary: int):
        rows = min(len(hidden_RD), CHUNK_ROWS)
        size = BLOCK_SIZE.get(hidden_RD.device.type)
        self.block = rows if size is None else max(1, min(rows, size // vocabulary))
        self.low_CV = hidden_RD.new_empty(rows, vocabulary)
        self.z_BV, self.p_BV = (
            torch.empty(self.block, vocabulary, dtype=_accurate(hidden_RD.dtype), device=hidden_RD.device)
            for _ in range(2)
        )

    def products(self, hidden_CD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """h W' of a chunk, into `low_CV`."""
        return torch.mm(hidden_CD, weight_VD.t(), out=self.low_CV[: len(hidden_CD)])

    def blocks(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.block, rows)) for start in range(0, rows, self.block))

    def softmax(
        self, low_BV: torch.Tensor, shape: HeadShape, bias_V: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and probabilities of a block, in the two buffers."""
        z_BV, p_BV = self.z_BV[: len(low_BV)], self.p_BV[: len(low_BV)]
        z_BV.copy_(low_BV)
        shape.apply_(z_BV, bias_V)
        torch.softmax(z_BV, 1, out=p_BV)
        return z_BV, p_BV


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_R: torch.Tensor,
        shape: HeadShape,
        needs: Needs,
    ) -> tuple[torch.Tensor, ...]:
        rows, uniform = len(target_R), needs.uniform_logp
        head_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        early = ctx.needs_input_grad[0] and not head_trained
        logp_R, uniform_R, entropy_R, mean_R, collision_R = (
            hidden_RD.new_zeros(rows, dtype=_accurate(hidden_RD.dtype)) for _ in range(5)
        )
        top1_R = torch.empty(rows, dtype=torch.bool, device=hidden_RD.device)
        entropic = needs.entropy_gradient
        slope_RD = torch.empty_like(hidden_RD) if early else None  # d logp / d hidden
        entropy_slope_RD = torch.empty_like(hidden_RD) if early and entropic else None
        uniform_slope_RD = torch.empty_like(hidden_RD) if early and uniform else None
        kernels = _fused(hidden_RD, weight_VD, bias_V, shape, needs)
        work = _Workspace(hidden_RD, len(weight_VD))
        entropic_CV = torch.empty_like(work.low_CV) if entropy_slope_RD is not None else None
        for start in range(0, rows, CHUNK_ROWS):
            part = slice(start, min(start + CHUNK_ROWS, rows))
            target_C = target_R[part]
            low_CV = work.products(hidden_RD[part], weight_VD)
            if kernels is not None and isinstance(times := shape.slope(low_CV), float):
                factor_C = torch.full((len(target_C),), -times, dtype=torch.float32) if early else None
                logp_R[part], top1_R[part], entropy_R[part], mean_R[part], collision_R[part] = kernels.head(
                    low_CV, target_C.contiguous(), times, factor_C
                )
                if slope_RD is not None:
                    torch.mm(low_CV, weight_VD, out=slope_RD[part])
                continue
            for block in work.blocks(len(target_C)):
                at = slice(start + block.start, start + block.stop)
                z_BV, p_BV = work.softmax(low_CV[block], shape, bias_V)
                target_B1 = target_C[block, None]
                chosen_B, top_B = z_BV.gather(1, target_B1)[:, 0], z_BV.amax(1)
                lse_B = top_B - p_BV.amax(1).log()  # the likeliest token's p is at least 1/V: no precision is lost
                logp_R[at] = chosen_B - lse_B
                top1_R[at] = chosen_B >= top_B
                if uniform or needs.mean_logit:
                    mean_R[at] = z_BV.mean(1)
                    uniform_R[at] = mean_R[at] - lse_B
                if needs.log_collision:
                    collision_R[at] = 2 * torch.linalg.vector_norm(p_BV, dim=1).log()
                slope = shape.slope(z_BV) if early else 1.0
                if needs.entropy or entropic:
                    mean_B = z_BV.mul_(p_BV).sum(1)
                    entropy_R[at] = lse_B - mean_B
                    if entropic_CV is not None:
                        entropic_CV[block] = _entropy_gradient(z_BV, p_BV, mean_B).mul_(slope)
                if slope_RD is None:
                    continue
                chosen_slope_B1 = slope if isinstance(slope, float) else slope.gather(1, target_B1)
                slope_RD[at] = chosen_slope_B1 * weight_VD[target_C[block]]
                if uniform_slope_RD is not None:
                    uniform_slope_RD[at] = _mean_row(slope, weight_VD)
                low_CV[block] = p_BV if isinstance(slope, float) and slope == 1.0 else p_BV.mul_(slope)
            if slope_RD is not None:
                expected_CD = low_CV @ weight_VD
                slope_RD[part] -= expected_CD
                if uniform_slope_RD is not None:
                    uniform_slope_RD[part] -= expected_CD
                if entropy_slope_RD is not None and entropic_CV is not None:
                    torch.mm(entropic_CV[: len(target_C)], weight_VD, out=entropy_slope_RD[part])
        ctx.shape, ctx.early, ctx.uniform, ctx.entropic = shape, early, uniform, entropic
        ctx.kernels = kernels
        if early:
            ctx.save_for_backward(slope_RD, uniform_slope_RD, entropy_slope_RD)
        else:
            ctx.save_for_backward(hidden_RD, weight_VD, bias_V, target_R)
        ctx.mark_non_differentiable(top1_R, mean_R, collision_R, *(() if entropic else (entropy_R,)))
        return logp_R, uniform_R, top1_R, entropy_R, mean_R, collision_R

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grad_logp_R, grad_uniform_R, _, grad_entropy_R = grads[:4]
        if ctx.early:
            slope_RD, uniform_slope_RD, entropy_slope_RD = ctx.saved_tensors
            grad_RD = slope_RD * grad_logp_R[:, None].to(slope_RD.dtype)
            if uniform_slope_RD is not None:
                grad_RD += uniform_slope_RD * grad_uniform_R[:, None].to(slope_RD.dtype)
            if entropy_slope_RD is not None:
                grad_RD += entropy_slope_RD * grad_entropy_R[:, None].to(slope_RD.dtype)
            return grad_RD, None, None, None, None, None
        hidden_RD, weight_VD, bias_V, target_R = ctx.saved_tensors
        accurate = _accurate(hidden_RD.dtype)
        grad_hidden_RD = torch.empty_like(hidden_RD) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=accurate) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=accurate) if ctx.needs_input_grad[2] else None
        work = _Workspace(hidden_RD, len(weight_VD))
        for start in range(0, len(target_R), CHUNK_ROWS):
            part = slice(start, min(start + CHUNK_ROWS, len(target_R)))
            low_CV = work.products(hidden_RD[part], weight_VD)
            blocks = work.blocks(len(low_CV))
            if ctx.kernels is not None and isinstance(times := ctx.shape.slope(low_CV), float):
                factor_C = (grad_logp_R[part] * -times).contiguous()
                ctx.kernels.head(low_CV, target_R[part].contiguous(), times, factor_C)
                blocks = iter(())
            for block in blocks:
                at = slice(start + block.start, start + block.stop)
                z_BV, p_BV = work.softmax(low_CV[block], ctx.shape, bias_V)
                slope = ctx.shape.slope(z_BV)
                entropic_BV = None
                if ctx.entropic:
                    entropic_BV = z_BV.mul_(p_BV)
                    entropic_BV = _entropy_gradient(entropic_BV, p_BV, entropic_BV.sum(1))
                    entropic_BV = entropic_BV.mul_(grad_entropy_R[at, None])
                grad_BV = _logit_gradient(
                    p_BV, target_R[at], grad_logp_R[at], grad_uniform_R[at] if ctx.uniform else None
                )
                if entropic_BV is not None:
                    grad_BV += entropic_BV
                grad_BV.mul_(slope)
                if grad_bias_V is not None:
                    grad_bias_V += grad_BV.sum(0)
                low_CV[block] = grad_BV
            if grad_hidden_RD is not None:
                torch.mm(low_CV, weight_VD, out=grad_hidden_RD[part])
            if grad_weight_VD is not None:
                for rows in _slices(len(grad_weight_VD)):
                    grad_weight_VD[rows] += low_CV[:, rows].t() @ hidden_RD[part]
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_RD, grad_weight_VD, grad_bias_V, None, None, None


def _fused(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, shape: HeadShape, needs: Needs
) -> Kernels | None:
    """The kernels, for plain logits of which no gradient but that of log p is wanted."""
    is_plain = bias_V is None and shape.softcap is None and not needs.uniform_logp and not needs.entropy_gradient
    return native.kernels_for(hidden_RD, weight_VD) if is_plain else None


def _slices(vocabulary: int) -> Iterator[slice]:
    """A product for the whole weight would be as large as the weight itself."""
    return (slice(start, start + SLICE_ROWS) for start in range(0, vocabulary, SLICE_ROWS))


def _logit_gradient(
    p_BV: torch.Tensor, target_B: torch.Tensor, grad_logp_B: torch.Tensor, grad_uniform_B: torch.Tensor | None
) -> torch.Tensor:
    """d loss / d z of a block, in place: `g (onehot - p) + u (1/V - p)`."""
    if grad_uniform_B is None:
        p_BV.mul_(-grad_logp_B[:, None])
    else:
        p_BV.mul_(-(grad_logp_B + grad_uniform_B)[:, None])
        p_BV += grad_uniform_B[:, None] / p_BV.shape[1]
    return p_BV.scatter_add_(1, target_B[:, None], grad_logp_B[:, None])


def _entropy_gradient(weighted_BV: torch.Tensor, p_BV: torch.Tensor, mean_B: torch.Tensor) -> torch.Tensor:
    """d H / d z of a block, in the place of `weighted_BV`, `z p`."""
    return weighted_BV.neg_().addcmul_(p_BV, mean_B[:, None])


def _mean_row(slope: torch.Tensor | float, weight_VD: torch.Tensor) -> torch.Tensor:
    """The weight's rows averaged over the vocabulary, each times its slope."""
    if isinstance(slope, float):
        return slope * weight_VD.mean(0, dtype=_accurate(weight_VD.dtype)).to(weight_VD.dtype)
    return (slope / weight_VD.shape[0]).to(weight_VD.dtype) @ weight_VD

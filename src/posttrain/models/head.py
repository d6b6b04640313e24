"""log p(target) at the supervised rows, in chunks, without ever holding the logits of a whole batch.

One autograd function serves every objective. With logits z = f(h W' + b), where f scales and caps (Gemma 2), it returns
per row: log p of the target, whether the target was the likeliest token, and on request the entropy (no gradient) and
the mean of log p over the vocabulary (label smoothing).

Gradient: d log p_t / dz = onehot_t - p, whatever the objective does with log p, so with a frozen head the gradient with
respect to the hidden state is made in the forward pass while p is at hand and only scaled in the backward pass: two
matrix products in all, as many as the mathematics asks for. A trained head needs the incoming gradient for its own
weight; there the chunk's logits are computed again in the backward pass, which costs one product and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

CHUNK_ROWS = 256  # 256 x 49,152 logits are 50 MB in fp32: large enough for full speed, small enough to stay in memory


@dataclass(frozen=True)
class HeadShape:
    """What a family does to its logits: multiplied by `scale`, then `softcap * tanh(z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
        """Logits of a chunk in fp32 (in fp64 where the hidden states are)."""
        z_CV = hidden_CD @ weight_VD.t()
        z_CV = z_CV.to(_accurate(z_CV.dtype))
        if bias_V is not None:
            z_CV += bias_V
        if self.scale != 1.0:
            z_CV *= self.scale
        if self.softcap is not None:
            z_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return z_CV

    def slope(self, z_CV: torch.Tensor) -> torch.Tensor | float:
        """d logits / d (h W' + b), given the logits."""
        if self.softcap is None:
            return self.scale
        return (1 - (z_CV / self.softcap).square()) * self.scale


def token_logps(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_R: torch.Tensor,
    shape: HeadShape,
    *,
    entropy: bool = False,
    uniform: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`(logp_R, is_top1_R, entropy_R or None, uniform_logp_R or None)`, fp32 (`is_top1_R` boolean), natural logarithms.

    `hidden_RD` are the hidden states that predict `target_R`; gradients flow into them, `weight_VD` and `bias_V`.
    """
    logp_R, top1_R, entropy_R, uniform_R = _TokenLogps.apply(
        hidden_RD, weight_VD, bias_V, target_R, shape, entropy, uniform
    )
    return logp_R, top1_R, entropy_R if entropy else None, uniform_R if uniform else None


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_R: torch.Tensor,
        shape: HeadShape,
        entropy: bool,
        uniform: bool,
    ) -> tuple[torch.Tensor, ...]:
        rows = len(target_R)
        head_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        early = ctx.needs_input_grad[0] and not head_trained
        logp_R, entropy_R, uniform_R = (hidden_RD.new_zeros(rows, dtype=_accurate(hidden_RD.dtype)) for _ in range(3))
        top1_R = torch.empty(rows, dtype=torch.bool, device=hidden_RD.device)
        slope_RD = torch.empty_like(hidden_RD) if early else None  # d logp / d hidden
        uniform_slope_RD = torch.empty_like(hidden_RD) if early and uniform else None
        for start in range(0, rows, CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            target_C = target_R[part]
            z_CV = shape.logits(hidden_RD[part], weight_VD, bias_V)
            chosen_C = z_CV.gather(1, target_C[:, None])[:, 0]
            lse_C = z_CV.logsumexp(1)
            logp_R[part] = chosen_C - lse_C
            top1_R[part] = chosen_C >= z_CV.amax(1)
            if uniform:
                uniform_R[part] = z_CV.mean(1) - lse_C
            if not (entropy or early):
                continue
            slope = shape.slope(z_CV)
            p_CV = torch.exp(z_CV - lse_C[:, None])
            if entropy:
                entropy_R[part] = lse_C - torch.linalg.vecdot(p_CV, z_CV)
            if slope_RD is not None:
                chosen_slope_C1 = slope if isinstance(slope, float) else slope.gather(1, target_C[:, None])
                expected_CD = p_CV.mul_(slope).to(weight_VD.dtype) @ weight_VD
                slope_RD[part] = chosen_slope_C1 * weight_VD[target_C] - expected_CD
                if uniform_slope_RD is not None:
                    uniform_slope_RD[part] = _mean_row(slope, weight_VD) - expected_CD
        ctx.shape, ctx.early = shape, early
        if early:
            ctx.save_for_backward(slope_RD, uniform_slope_RD)
        else:
            ctx.save_for_backward(hidden_RD, weight_VD, bias_V, target_R)
        ctx.mark_non_differentiable(top1_R, entropy_R)
        return logp_R, top1_R, entropy_R, uniform_R

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grad_logp_R, _, _, grad_uniform_R = grads
        if ctx.early:
            slope_RD, uniform_slope_RD = ctx.saved_tensors
            grad_RD = slope_RD * grad_logp_R[:, None].to(slope_RD.dtype)
            if uniform_slope_RD is not None:
                grad_RD += uniform_slope_RD * grad_uniform_R[:, None].to(slope_RD.dtype)
            return grad_RD, None, None, None, None, None, None
        hidden_RD, weight_VD, bias_V, target_R = ctx.saved_tensors
        grad_hidden_RD = torch.empty_like(hidden_RD) if ctx.needs_input_grad[0] else None
        grad_weight_VD = (
            torch.zeros_like(weight_VD, dtype=_accurate(hidden_RD.dtype)) if ctx.needs_input_grad[1] else None
        )
        grad_bias_V = torch.zeros_like(bias_V, dtype=_accurate(hidden_RD.dtype)) if ctx.needs_input_grad[2] else None
        for start in range(0, len(target_R), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            grad_CV = _logit_gradient(ctx.shape, hidden_RD[part], weight_VD, bias_V, target_R[part],
                                      grad_logp_R[part], grad_uniform_R[part])  # fmt: skip
            low_CV = grad_CV.to(hidden_RD.dtype)
            if grad_hidden_RD is not None:
                grad_hidden_RD[part] = low_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += low_CV.t() @ hidden_RD[part]
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_RD, grad_weight_VD, grad_bias_V, None, None, None, None


def _logit_gradient(
    shape: HeadShape,
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_C: torch.Tensor,
    grad_logp_C: torch.Tensor,
    grad_uniform_C: torch.Tensor,
) -> torch.Tensor:
    """d loss / d (h W' + b) of a chunk: `g (onehot - p) + u (1/V - p)`, times the slope of scale and cap."""
    z_CV = shape.logits(hidden_CD, weight_VD, bias_V)
    slope = shape.slope(z_CV)
    grad_CV = torch.softmax(z_CV, 1).mul_(-(grad_logp_C + grad_uniform_C)[:, None])
    grad_CV += grad_uniform_C[:, None] / weight_VD.shape[0]
    grad_CV.scatter_add_(1, target_C[:, None], grad_logp_C[:, None])
    return grad_CV.mul_(slope)


def _mean_row(slope: torch.Tensor | float, weight_VD: torch.Tensor) -> torch.Tensor:
    """The weight's rows averaged over the vocabulary, each times its slope."""
    if isinstance(slope, float):
        return slope * weight_VD.mean(0, dtype=_accurate(weight_VD.dtype)).to(weight_VD.dtype)
    return (slope / weight_VD.shape[0]).to(weight_VD.dtype) @ weight_VD

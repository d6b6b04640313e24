"""Norms and gated feed-forward layers with one autograd function each, in place of a dozen.

transformers writes an RMS norm as seven operations and a SwiGLU layer as four, and autograd keeps what each of them
needs: fp32 copies of the residual stream, the activation, the gated product. Here a norm keeps its input and one number
a token, and a feed-forward layer its gate and up projections; the rest is made again in the backward pass, which costs
element-wise work and saves a third of the memory of a layer. The arithmetic is the same, in fp32 where transformers has
it in fp32.

A layer is replaced only if its own forward gives the same numbers on a random input, so a family that does something
else under a known name (Gemma's norms) keeps its own. Closing the session puts every forward back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from posttrain import native
from posttrain.models.adapters import LeanLora
from posttrain.models.low_rank import add_gradient, add_update, factor_gradient, low_factors
from posttrain.models.recomputation import Recipe


def specialise_layers(model: nn.Module) -> list[nn.Module]:
    """Give norms and feed-forward layers of the usual kind the lean forward; those that got it."""
    changed: list[nn.Module] = []
    verdicts: dict[type, bool] = {}
    for module in model.modules():
        lean = _lean_forward(module)
        if lean is None:
            continue
        kind = type(module)
        if kind not in verdicts:
            verdicts[kind] = _gives_the_same(module, lean)
        if verdicts[kind]:
            module.forward = lean
            changed.append(module)
    return changed


def give_back(changed: list[nn.Module]) -> None:
    """Every module's own forward again."""
    for module in changed:
        module.__dict__.pop("forward", None)


def _lean_forward(module: nn.Module) -> Any:
    if "forward" in module.__dict__:  # somebody else has replaced it
        return None
    if type(module).__name__.endswith("RMSNorm") and _is_norm(module):
        return partial(_norm, module)
    if all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return partial(_gated, module) if isinstance(getattr(module, "act_fn", None), nn.SiLU) else _silu(module)
    return None


def _silu(module: nn.Module) -> Any:
    """transformers has a SiLU class of its own beside torch's."""
    return partial(_gated, module) if type(getattr(module, "act_fn", None)).__name__ == "SiLUActivation" else None


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and isinstance(getattr(module, "variance_epsilon", None), float)


def _gives_the_same(module: nn.Module, lean: Any) -> bool:
    """On a few random vectors, in the module's own dtype."""
    weight = next(module.parameters(), None)
    if weight is None:  # GPTQ has buffers instead
        return False
    width = int(getattr(getattr(module, "gate_proj", None), "in_features", weight.shape[0]))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, width, generator=generator).to(weight)
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            expected, seen = module(x), lean(x)
    finally:
        module.train(training)
    return is_close(seen, expected)


def is_close(seen: torch.Tensor, expected: torch.Tensor) -> bool:
    """Apart by no more than roundings, taken together; anything else that a layer may do differently is far more."""
    allowed = 4e-2 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return bool((seen.float() - expected.float()).norm() <= allowed * expected.float().norm())


# --- RMS norm (arXiv 1910.07467) ------------------------------------------------------------------------------------


def _norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    normed = _RmsNorm.apply(hidden, module.weight, module.variance_epsilon)
    if torch.is_grad_enabled():
        flat, weight = hidden.detach().reshape(-1, hidden.shape[-1]), module.weight.detach()
        Recipe(lambda: _normalise(flat, weight, module.variance_epsilon)[0]).attach(normed)
    return normed


def _normalise(flat: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed rows and one over their root mean square."""
    if (kernels := native.kernels_for(flat, weight)) is not None:
        normed, scale_T = kernels.norm(flat.contiguous(), weight.contiguous(), epsilon)
        return normed, scale_T[:, None]
    normed = _accurate_copy(flat)
    scale = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
    scale.square_().div_(flat.shape[-1]).add_(epsilon).rsqrt_()
    return normed.mul_(scale).mul_(weight.to(normed.dtype)).to(flat.dtype), scale


class _RmsNorm(torch.autograd.Function):
    """y = x / rms(x) * w over the last dimension, in fp32 (fp64 where the input is)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        normed, scale = _normalise(flat, weight, epsilon)
        ctx.save_for_backward(flat, weight, scale)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        flat, weight, scale = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]
        if (kernels := native.kernels_for(flat, weight, grad)) is not None:
            rows = grad.reshape(flat.shape).contiguous(), flat.contiguous()
            grad_x, grad_weight = kernels.norm_backward(*rows, weight.contiguous(), scale, learns)
            return grad_x.view(grad.shape), None if grad_weight is None else grad_weight.to(weight.dtype), None
        normed, grad_normed = _accurate_copy(flat).mul_(scale), _accurate_copy(grad.reshape(flat.shape))
        grad_weight = (grad_normed * normed).sum(0).to(weight.dtype) if learns else None
        grad_normed.mul_(weight.to(grad_normed.dtype))
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = grad_normed.addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x.to(flat.dtype).view(grad.shape), grad_weight, None


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _accurate_copy(x: torch.Tensor) -> torch.Tensor:
    """A copy in fp32 that may be written over."""
    accurate = _accurate(x.dtype)
    return x.clone() if x.dtype == accurate else x.to(accurate)


# --- SwiGLU (arXiv 2002.05202) --------------------------------------------------------------------------------------


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    if down._forward_hooks or down._forward_pre_hooks:  # somebody listens there
        return down(_Gated.apply(gate, up))
    if type(down) is nn.Linear:
        return _GatedDown.apply(gate, up, down.weight, down.bias, None, None, 1.0, 0.0, None)
    name = down.ordinary_adapter() if isinstance(down, LeanLora) else None
    if name is None:
        return down(_Gated.apply(gate, up))
    return _GatedDown.apply(gate, up, *down.parts(name), down.transposed)


class _Gated(torch.autograd.Function):
    """`silu(g) * u` alone, by the same arithmetic as with what follows it: a reference, which is the model without its
    adapter, says bit for bit what the model says before the adapter has learned."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        flat_gate, flat_up = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        return _product(flat_gate, flat_up).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, torch.Tensor]:
        flat_gate, flat_up = (x.reshape(-1, x.shape[-1]) for x in ctx.saved_tensors)
        own = grads[0].reshape(flat_gate.shape).clone(memory_format=torch.contiguous_format)  # it is written over
        grad_gate, grad_up, _ = _product_backward(flat_gate, flat_up, own, again=False)
        return grad_gate.view(grads[0].shape), grad_up.view(grads[0].shape)


class _GatedDown(torch.autograd.Function):
    """y = (silu(g) * u) W' + b, with LoRA's `s drop(silu(g) * u) A' B'` added where W has an adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scale: float,
        dropout: float,
        transposed: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        flat_gate, flat_up = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        product = _product(flat_gate, flat_up)
        out = functional.linear(product, weight, bias)
        low_a = low_b = inner = keep = None
        if a is not None and b is not None:
            low_a, low_b = low_factors(a, b, scale, gate)
            if dropout:
                keep = torch.empty_like(product).bernoulli_(1 - dropout).div_(1 - dropout)
                product = product.mul_(keep)
            inner = add_update(out, product, low_a, low_b)
        ctx.rank = 0 if a is None else len(a)
        ctx.scale, ctx.learned, ctx.transposed = scale, None if a is None else a.dtype, transposed
        ctx.save_for_backward(flat_gate, flat_up, weight, low_a, low_b, inner, keep)
        return out.view(*gate.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        flat_gate, flat_up, weight, low_a, low_b, inner, keep = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        needs = ctx.needs_input_grad
        grad_product = grad @ weight if ctx.transposed is None else ctx.transposed(grad)
        grad_weight = grad_bias = grad_a = grad_b = grad_inner = None
        if low_a is not None:
            if keep is None:
                grad_inner = add_gradient(grad_product, grad, low_a, low_b)
            else:
                grad_inner = grad @ low_b
                grad_product += (grad_inner @ low_a).mul_(keep)
        grad_gate, grad_up, product = _product_backward(flat_gate, flat_up, grad_product, needs[2] or needs[4])
        if needs[2]:
            grad_weight = grad.t() @ product
        if needs[3]:
            grad_bias = grad.sum(0)
        if grad_inner is not None:
            if needs[4]:
                given = product if keep is None else product.mul_(keep)
                grad_a = factor_gradient(grad_inner, given, ctx.rank).to(ctx.learned)
            if needs[5]:
                grad_b = factor_gradient(inner, grad, ctx.rank).t().to(ctx.learned) * ctx.scale
        shape = (*grads[0].shape[:-1], flat_gate.shape[-1])
        return grad_gate.view(shape), grad_up.view(shape), grad_weight, grad_bias, grad_a, grad_b, None, None, None


def _product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`."""
    if (kernels := native.kernels_for(gate, up)) is not None:
        return kernels.gated(gate.contiguous(), up.contiguous())
    return functional.silu(gate).mul_(up)


def _product_backward(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, again: bool
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The gradients of gate and up, and the product `again` if it is wanted. `grad` is written over."""
    if (kernels := native.kernels_for(gate, up, grad)) is not None:
        return kernels.gated_backward(gate.contiguous(), up.contiguous(), grad, again)
    activated = functional.silu(gate)
    product = activated * up if again else None
    return torch.ops.aten.silu_backward(grad * up, gate), activated.mul_(grad), product

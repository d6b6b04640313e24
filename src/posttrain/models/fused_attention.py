"""Attention of packed segments on a CPU through the native kernels (posttrain/native), rotary embeddings included.

`fused_attention` stands where transformers calls for attention, with queries and keys already turned.
`specialise_attention` goes further for attention modules of the usual kind (four projections, perhaps norms of queries
and keys): they get a forward that turns and attends in one autograd function, on the projections' own memory. As with
norms (models/lean_layers.py) a module gets it only if it gives the module's own numbers on a few random tokens; calls
without a packed layout go to the module's own forward.

Shape suffixes: `T` tokens, `D` hidden, `H` query heads, `K` key heads, `E` head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from posttrain import native
from posttrain.models.capabilities import drops
from posttrain.models.decoding import Memory, Reading
from posttrain.models.lean_layers import is_close
from posttrain.native.dealing import deal
from posttrain.native.kernels import LANES, per_word
from posttrain.types import Layout

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
CAPS = ("attn_logit_softcapping", "clip_qkv")
"""What shows on large numbers only, so that no trial finds it: Gemma 2's cap of scores, OLMo's of projections."""


def can_fuse(query_HTE: torch.Tensor, value_KTE: torch.Tensor, layout: Layout, window: int | None = None) -> bool:
    """Whether the kernels know these shapes. A thread does whole segments for one key head. Where that keeps threads
    idle, torch is quicker: it deals out blocks of queries."""
    size, groups = query_HTE.shape[-1], value_KTE.shape[-3]
    # How many times as long SDPA takes (docs/design.md): it computes what a window leaves out, and masks it.
    passes_over = window is not None and layout.max_length > window
    gain = 3 if query_HTE.dtype == torch.bfloat16 else 1 + passes_over
    return (
        size % LANES == 0
        and value_KTE.shape[-1] == size
        and min(layout.lengths, default=0) > 0
        and native.kernels_for(query_HTE, value_KTE) is not None
        and gain * groups * deal(layout).num_parts >= torch.get_num_threads()
    )


def fused_attention(
    query_1HTE: torch.Tensor,
    key_1KTE: torch.Tensor,
    value_1KTE: torch.Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """`(1, T, H, E)`: every token attends to itself and what precedes it in its own segment, inside the window."""
    by_token = (x[0].transpose(0, 1) for x in (query_1HTE, key_1KTE, value_1KTE))
    return _FusedAttention.apply(*by_token, None, layout, scale, window)[None]


class _FusedAttention(torch.autograd.Function):
    """With `turns`, cosines and sines `(T, E)`, queries and keys are turned by them first (arXiv 2104.09864)."""

    @staticmethod
    def forward(
        ctx: Any,
        query_THE: torch.Tensor,
        key_TKE: torch.Tensor,
        value_TKE: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        layout: Layout,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        kernels = _kernels(query_THE, key_TKE, value_TKE, *(turns or ()))
        query_THE, key_TKE, value_TKE = (_readable(one) for one in (query_THE, key_TKE, value_TKE))
        if turns is not None:
            query_THE, key_TKE = (kernels.rotate(one, *turns) for one in (query_THE, key_TKE))
        out_THE, log_sum_HT = kernels.attention(query_THE, key_TKE, value_TKE, layout, scale, window)
        ctx.layout, ctx.scale, ctx.window, ctx.kernels = layout, scale, window, kernels
        ctx.save_for_backward(query_THE, key_TKE, value_TKE, log_sum_HT, *(turns or ()))
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        kernels = ctx.kernels  # those of the forward, whatever has been switched since
        query_THE, key_TKE, value_TKE, log_sum_HT, *turns = ctx.saved_tensors
        grad_query, grad_key, grad_value = kernels.attention_backward(
            query_THE, key_TKE, value_TKE, _readable(grads[0]), log_sum_HT, ctx.layout, ctx.scale, ctx.window
        )
        if turns:
            grad_query, grad_key = (kernels.rotate(one, *turns, backwards=True) for one in (grad_query, grad_key))
        return grad_query, grad_key, grad_value, None, None, None, None


def _kernels(*tensors: torch.Tensor) -> Any:
    kernels = native.kernels_for(*tensors)
    assert kernels is not None
    return kernels


def _readable(one_THE: torch.Tensor) -> torch.Tensor:
    """As it is if heads lie whole in memory, words of numbers aligned; a copy if not."""
    tokens, heads, last = one_THE.stride()
    words = per_word(one_THE.dtype)
    usable = last == 1 and tokens % words == 0 and heads % words == 0 and one_THE.data_ptr() % 4 == 0
    return one_THE if usable else one_THE.clone(memory_format=torch.contiguous_format)


# --- whole modules --------------------------------------------------------------------------------------------------


def specialise_attention(base: nn.Module) -> list[nn.Module]:
    """Give attention modules of the usual kind the fused forward; those that got it. For a model whose attention is
    ours already."""
    changed = [module for module in base.modules() if _is_usual(module) and _gives_the_same(module)]
    for module in changed:
        module.forward = partial(_attention, module)
    return changed


def window_of(attention: Any) -> int | None:
    """How far back an attention module looks; Mistral says it for all layers alike."""
    own = getattr(attention, "sliding_window", None)
    if own is not None or hasattr(attention.config, "layer_types"):
        return own or None
    return getattr(attention.config, "sliding_window", None) or None


def _is_usual(module: Any) -> bool:
    children = {name for name, _ in module.named_children()}
    return (
        PROJECTIONS <= children <= PROJECTIONS | HEAD_NORMS
        and len(children & HEAD_NORMS) in (0, 2)
        and all(hasattr(module, name) for name in ("head_dim", "scaling", "layer_idx", "config"))
        and "forward" not in module.__dict__
        and module.head_dim % LANES == 0
        and not has_caps(module, module.config)
    )


def has_caps(attention: Any, config: Any) -> bool:
    """Whether something is cut off that is too large for a trial of a few tokens to show it."""
    return any(getattr(holder, cap, None) for cap in CAPS for holder in (attention, config))


def _gives_the_same(module: Any) -> bool:
    """On a few random tokens, in prompts with an answer each: as many as keep all threads busy, for `can_fuse`."""
    weight = next(module.q_proj.parameters(), None)  # GPTQ has buffers instead
    if weight is None or (kernels := native.kernels_for(weight)) is None:
        return False
    starts = [5 * family + start for family in range(torch.get_num_threads()) for start in (0, 3)]
    parents = [parent for place in range(0, len(starts), 2) for parent in (-1, place)]
    trial = Layout(tuple(starts), (3, 2) * torch.get_num_threads(), tuple(parents))
    tokens, width, size = trial.num_tokens, int(module.q_proj.in_features), int(module.head_dim)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, width, generator=generator).to(kernels.dtype)
    angle = torch.randn(1, tokens, size, generator=generator)
    turns: Any = (angle.cos().to(hidden), angle.sin().to(hidden))
    options: dict[str, Any] = {"attention_mask": torch.empty(1, 1, 0, 0), "layout": trial}
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            if not _is_ours(module, hidden, turns, trial):  # or its own forward would be compared with itself
                return False
            expected = module(hidden, position_embeddings=turns, **options)[0]
            seen = _attention(module, hidden, position_embeddings=turns, **options)[0]
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it does not take these arguments
        return False
    finally:
        module.train(training)
    return is_close(seen, expected)


def _attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    layout: Layout | Memory | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules do, for a packed layout."""
    if past_key_values is not None or not _is_ours(module, hidden_states, position_embeddings, layout):
        return type(module).forward(
            module, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, layout=layout, **kwargs,
        )  # fmt: skip
    tokens = hidden_states.shape[1]
    query_THE, key_TKE, value_TKE = (
        project(hidden_states).view(tokens, -1, module.head_dim)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query_THE, key_TKE = module.q_norm(query_THE), module.k_norm(key_TKE)
    turns: Any = tuple(one[0].contiguous() for one in position_embeddings or ())
    if isinstance(layout, Reading) and layout.memory is not None:
        query_THE, key_TKE = (_kernels(one, *turns).rotate(_readable(one), *turns) for one in (query_THE, key_TKE))
        layout.memory.remember(module.layer_idx, key_TKE.transpose(0, 1)[None], value_TKE.transpose(0, 1)[None], layout)
        turns = None
    out_THE = _FusedAttention.apply(query_THE, key_TKE, value_TKE, turns, layout, module.scaling, window_of(module))
    return module.o_proj(out_THE.view(1, tokens, -1)), None


def _is_ours(module: Any, hidden_1TD: torch.Tensor, turns: Any, layout: Any) -> bool:
    """Heads that are turned in part (GLM 4) have cosines for that part only, and are not. Under autocast what comes out
    of projections has another dtype than what goes in."""
    if torch.is_autocast_enabled("cpu"):
        return False
    if not isinstance(layout, Layout) or turns is None or (module.training and drops(module)):
        return False
    groups = int(module.k_proj.out_features) // int(module.head_dim)
    head, shape = hidden_1TD.new_empty(groups, 0, module.head_dim), (1, hidden_1TD.shape[1], module.head_dim)
    are_whole = all(one.shape == shape and one.dtype == head.dtype for one in turns)
    return are_whole and can_fuse(head, head, layout, window_of(module))

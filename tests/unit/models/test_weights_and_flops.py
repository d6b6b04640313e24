"""Weights to disk and back in place, and the count of what a batch needs in arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from posttrain import CheckpointError
from posttrain.models.flops import flops_counter, measure_limit
from posttrain.models.forward import open_policy
from posttrain.models.weights import load_weights, save_weights
from posttrain.types import Needs
from tests.tiny_batches import random_batch
from tests.tiny_models import FAMILIES, tiny_model


def lora(model: Any, r: int = 3) -> Any:
    return get_peft_model(model, LoraConfig(r=r, target_modules="all-linear", init_lora_weights=False))


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_weights_come_back_in_place(family: str, tmp_path: Path) -> None:
    saved, other = tiny_model(family), tiny_model(family, seed=1)
    save_weights(saved, tmp_path)
    parameters = dict(other.named_parameters())
    load_weights(other, tmp_path)
    for name, parameter in other.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, saved.get_parameter(name))


def test_shards_are_read_too(tmp_path: Path) -> None:
    saved, other = tiny_model("llama"), tiny_model("llama", seed=1)
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    load_weights(other, tmp_path)
    assert all(torch.equal(p, saved.get_parameter(name)) for name, p in other.named_parameters())


def test_frozen_weights_are_not_touched(tmp_path: Path) -> None:
    saved, other = tiny_model("llama"), tiny_model("llama", seed=1)
    save_weights(saved, tmp_path)
    other.lm_head.requires_grad_(False)
    load_weights(other, tmp_path)
    assert torch.equal(other.lm_head.weight, tiny_model("llama", seed=1).lm_head.weight)
    assert torch.equal(other.model.norm.weight, saved.model.norm.weight)


def test_an_adapter_comes_back_and_the_base_stays(tmp_path: Path) -> None:
    saved, other = lora(tiny_model("llama")), lora(tiny_model("llama", seed=1))
    save_weights(saved, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    load_weights(other, tmp_path)
    base = tiny_model("llama", seed=1)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, saved.get_parameter(name))
    assert torch.equal(other.get_base_model().lm_head.weight, base.lm_head.weight)


def test_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    save_weights(tiny_model("llama"), tmp_path / "full")
    save_weights(lora(tiny_model("llama")), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"full has no adapter_model.safetensors: it was made by another kind"):
        load_weights(lora(tiny_model("llama")), tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"adapter has no model.safetensors: it was made by another kind of run"):
        load_weights(tiny_model("llama"), tmp_path / "adapter")


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    save_weights(tiny_model("llama"), tmp_path)
    with pytest.raises(CheckpointError, match=r"has no value for model.layers.0.self_attn.q_proj.bias"):
        load_weights(tiny_model("qwen2"), tmp_path)


# --- flops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_counted_as_torch_counts_matrix_products(kind: str) -> None:
    """One sequence, every token supervised: three products for a trained weight, two for a frozen one. Torch's count
    of a plain forward and backward, with whole squares of scores and nothing passed back below the first adapters."""
    model = tiny_model("llama") if kind == "full" else lora(tiny_model("llama"))
    base = model if kind == "full" else model.get_base_model()
    base.set_attn_implementation("eager")
    length = 33
    batch = random_batch((length,), share=1.0)
    counted = flops_counter(base)(batch)
    ids = batch.input_ids_T[None]
    with FlopCounterMode(display=False) as counter:
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        base.lm_head(hidden[0, :-1]).sum().backward()
    upper_triangle = 12 * 2 * 4 * 8 * length * (length - 1) / 2  # two layers of four heads of size 8
    first = base.model.layers[0].self_attn
    not_passed_back = 2 * length * sum(
        p.numel() for part in (first.q_proj, first.k_proj, first.v_proj) for n, p in part.named_parameters()
        if "lora_B" not in n
    )  # fmt: skip
    expected = counter.get_total_flops() - upper_triangle + (not_passed_back if kind == "lora" else 0)
    assert counted == pytest.approx(expected, rel=1e-3)


def test_only_supervised_rows_reach_the_head_and_only_pairs_within_a_segment_attend() -> None:
    model = tiny_model("llama")
    count = flops_counter(model)
    one, two = random_batch((20,), share=1.0), random_batch((10, 10), share=1.0)
    assert len(one.rows_R) - len(two.rows_R) == 1
    head = 2 * 3 * model.lm_head.weight.numel()
    attention = 12 * 2 * 4 * 8 * (20 * 21 / 2 - 2 * 10 * 11 / 2)  # two layers of four heads of size 8
    assert count(one) - count(two) == head + attention
    silent = random_batch((20,), share=0.0)
    assert count(one) - count(silent) == head * len(one.rows_R)


def test_a_frozen_weight_needs_one_product_less() -> None:
    model, batch = tiny_model("llama"), random_batch((20,), share=1.0)
    trained = flops_counter(model)(batch)
    model.model.layers[0].mlp.requires_grad_(False)
    frozen = flops_counter(model)(batch)
    assert trained - frozen == 2 * 20 * 3 * 32 * 48


def test_convolutions_do_not_count_as_attention() -> None:
    """LFM2's layers: two of convolution, one of attention."""
    batch, longer = random_batch((8,), share=0.0), random_batch((16,), share=0.0)
    count = flops_counter(tiny_model("lfm2"))
    assert count(longer) - 2 * count(batch) == 12 * 1 * 4 * 8 * (16 * 17 / 2 - 2 * 8 * 9 / 2)


def test_the_machine_s_limit_is_a_rate() -> None:
    model = tiny_model("llama")
    limit = measure_limit(model, torch.float32, seconds=0.02)
    assert 1e8 < limit < 1e16
    open_policy(model)(random_batch((5,)), Needs())

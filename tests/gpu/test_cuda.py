"""The same numbers on a CUDA device as on a CPU: attention, head, adapters, packing, and a run that is resumed.

All are skipped where there is no device. Tolerances are those of bf16 where the device computes in it, and of fp32's
order of summation elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from posttrain.models import adapters
from posttrain.models.attention import packed_attention
from posttrain.models.forward import open_policy
from posttrain.models.head import HeadShape, token_logps
from posttrain.models.memory import PeakGrowth
from posttrain.rollout.engines import Request
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.sampling import Sampling
from posttrain.types import Layout, Needs
from tests.invariants.short_runs import Spec, assert_same_end, end_state, make_trainer
from tests.tiny_batches import random_batch, random_samples
from tests.tiny_models import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
LENGTHS = (33, 1, 120, 64)


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    assert (one - other).norm() <= tolerance * other.norm() + 1e-6


def gradients(function: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `function` gives, and its gradients with respect to `tensors`."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    out.float().square().sum().backward()
    return (out, *(leaf.grad for leaf in leaves if leaf.grad is not None))


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_varlen_attention_equals_the_cpus(window: int | None, key_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    layout = Layout(tuple(sum(LENGTHS[:i]) for i in range(len(LENGTHS))), LENGTHS)
    query, key, value = (torch.randn(1, heads, total, 64, generator=generator) for heads in (4, key_heads, key_heads))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        module = torch.nn.Module()
        return packed_attention(module, q, k, v, None, scaling=0.125, sliding_window=window, layout=layout)[0]

    expected = gradients(attend, query, key, value)
    seen = gradients(attend, *(tensor.to(DEVICE, torch.bfloat16) for tensor in (query, key, value)))
    for mine, theirs in zip(seen, expected, strict=True):
        close(mine, theirs, 0.02)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", [HeadShape(), HeadShape(scale=0.5, softcap=20.0)], ids=["plain", "capped"])
def test_the_chunked_head_equals_the_cpus(trained: bool, shape: HeadShape) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(700, 48, generator=generator), torch.randn(1000, 48, generator=generator) * 0.2
    target = torch.randint(0, 1000, (700,), generator=generator)
    results = []
    for device in (torch.device("cpu"), DEVICE):
        h, w = (x.to(device).requires_grad_() for x in (hidden, weight))
        w.requires_grad_(trained)
        logp, top1, entropy, uniform = token_logps(h, w, None, target.to(device), shape, entropy=True, uniform=True)
        (logp.sum() + 0.1 * uniform.sum()).backward()
        results.append([logp, top1.float(), entropy, uniform, h.grad, *([w.grad] if trained else [])])
    for cpu, cuda in zip(*results, strict=True):
        close(cuda, cpu, 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "lfm2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_equals_plain(family: str, dtype: torch.dtype) -> None:
    """One batch of four sequences, and each of them alone; and both the CPU's in fp32."""
    on_cpu = open_policy(tiny_model(family))
    policy = open_policy(tiny_model(family).to(DEVICE, dtype))
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-4
    together = policy(random_batch(LENGTHS), Needs()).logp_R
    close(together, on_cpu(random_batch(LENGTHS), Needs()).logp_R, tolerance)
    from posttrain.data.planning import plan

    alone = torch.cat([policy(batch, Needs()).logp_R for batch in plan(random_samples(LENGTHS), 1)])
    close(together, alone, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lean_adapters_equal_pefts(dtype: torch.dtype) -> None:
    results = []
    for lean in (False, True):
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama"), config).to(DEVICE)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora" in name else dtype)
        if lean:
            assert adapters.specialise(model) == 14
        policy = open_policy(model)
        policy(random_batch(LENGTHS), Needs()).logp_R.sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) > 0
    for mine, theirs in zip(results[1], results[0], strict=True):
        close(mine, theirs, 0.05 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
def test_completions_are_the_cpus(family: str) -> None:
    """The first three by recorded steps (models/recorded.py): rows leave, others enter, buffers grow."""
    asked = [Request([5, 9, 13, 2, 40, 7][: 3 + number], number, 3) for number in range(4)]
    made = []
    for device in (torch.device("cpu"), DEVICE):
        model: Any = tiny_model(family).to(device).eval()
        model.config.sliding_window = None if family == "mistral" else getattr(model.config, "sliding_window", None)
        engine = LocalEngine(open_policy(model), [7, 11], max_rows=5)
        assert (engine.lean() is None) == (family == "gemma3")
        made.append(engine.generate(asked, Sampling(max_tokens=300, seed=3)))
    for cpu, cuda in zip(*made, strict=True):
        for one, other in zip(cpu, cuda, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            np.testing.assert_allclose(one.logps, other.logps, atol=1e-3)


def run(folder: Path, lora: bool, **arguments: Any) -> Any:
    settings = {"save_steps": 3, "max_steps": 6, "eval_strategy": "no", "full_determinism": True}
    return make_trainer(Spec(str(folder), lora=lora, arguments=settings | arguments))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_training_resumes_where_it_stopped(bf16: bool, lora: bool, tmp_path: Path) -> None:
    whole = run(tmp_path, lora, bf16=bf16)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = run(tmp_path, lora, bf16=bf16)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_end(end_state(again), end_state(whole))


@pytest.mark.parametrize("level", ["selective", "full"])
def test_recomputation_changes_nothing_and_keeps_less(level: str) -> None:
    results, growth = [], []
    for recomputes in (False, True):
        policy = open_policy(tiny_model("llama").to(DEVICE, torch.bfloat16))
        policy.base.train()
        if recomputes and level == "full":
            policy.base.activation_checkpointing_enable({"use_reentrant": False})
        policy.recomputes_cheap_parts = recomputes and level == "selective"
        with PeakGrowth(DEVICE) as peak:
            policy(random_batch([400] * 20), Needs()).logp_R.sum().backward()
        growth.append(peak.num_bytes)
        results.append([p.grad for p in policy.model.parameters()])
    for one, other in zip(*results, strict=True):
        close(one, other, 1e-2)
    assert growth[1] <= growth[0]


def test_a_device_that_is_full_is_noticed_and_the_step_redone(tmp_path: Path, caplog: Any) -> None:
    from transformers import TrainerCallback

    class Fill(TrainerCallback):
        """A limit on what torch may take, once everything that stays is there."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            share = (torch.cuda.memory_allocated() + 30 * 2**20) / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(share)

    data = [{"input_ids": [5 + (i * j) % 250 for j in range(500)]} for i in range(1, 65)]
    settings = {"token_budget": 32_000, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 1,
                "max_steps": 2, "save_strategy": "no", "eval_strategy": "no"}  # fmt: skip
    trainer = make_trainer(Spec(str(tmp_path), arguments=settings), (Fill(),), train=data)
    try:
        trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any(message.startswith("E-OOM-0003 step 1, ") for message in caplog.messages)
    assert trainer.state.global_step == 2

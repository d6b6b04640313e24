"""Frozen weights laid out a second time: the same bits, never those of a weight that has changed, and gone at the end;
taken where there is memory for them."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from posttrain import SFTConfig
from posttrain.models.adapters import LeanLora
from posttrain.models.footprint import Footprint
from posttrain.models.laid_out import Transposed, laid_out_bytes, lay_out, take_back
from posttrain.planner import Workload, make_plan
from posttrain.session import Session
from posttrain.types import Needs
from tests.native_reference import random
from tests.tiny_batches import random_batch
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no products in bf16 on this processor",
)
BATCH = random_batch([30, 4, 11])


def adapted(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
    return get_peft_model(tiny_model("llama"), config)  # type: ignore[arg-type]


def opened(folder: Path, dropout: float = 0.0, model: Any = None) -> Session:
    return Session.open(adapted(dropout) if model is None else model, SFTConfig(str(folder), bf16=True))


def gradients(session: Session) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    (-session.policy(BATCH, Needs()).logp_R.mean()).backward()
    session.precision.settle()
    found = {name: p.grad.clone() for name, p in session.trained.items() if p.grad is not None}
    for parameter in session.trained.values():
        parameter.grad = None
    assert len(found) > 10
    return found


def layers(session: Session) -> list[LeanLora]:
    return [module for module in session.policy.model.modules() if isinstance(module, LeanLora)]


@pytest.mark.parametrize("rows", [1, 2, 17, 1024, 1500])
@pytest.mark.parametrize("shape", [(48, 32), (97, 33), (1, 5)])
def test_the_product_has_the_same_bits(rows: int, shape: tuple[int, int]) -> None:
    weight, x = random(*shape), random(rows, shape[0], seed=1)
    seen = Transposed(weight)(x)
    exact = x.double() @ weight.double()
    assert seen.shape == exact.shape
    assert (seen.double() - exact).norm() <= 4e-3 * exact.norm()
    if min(shape) > 1:
        assert torch.equal(seen, x @ weight)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("level", ["none", "full"])
def test_gradients_have_the_same_bits(dropout: float, level: str, tmp_path: Path) -> None:
    session = opened(tmp_path, dropout)
    session.recompute(level)
    expected = gradients(session)
    session.lay_out()
    assert all(layer.transposed is not None for layer in layers(session))
    seen = gradients(session)
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(seen[name], value), name
    session.close()


def test_nothing_is_left_and_nothing_is_saved(tmp_path: Path) -> None:
    session = opened(tmp_path)
    before = {name: value.clone() for name, value in session.policy.model.state_dict().items()}
    wanted = sum(layer.base_layer.weight.nbytes for layer in layers(session))
    assert session.laid_out_bytes == laid_out_bytes(session.policy.base) == wanted > 0
    session.lay_out()
    assert session.laid_out_bytes == 0  # already there
    after = session.policy.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    found = layers(session)
    session.close()
    assert all(layer.transposed is None for layer in found)
    take_back(session.policy.model)  # once more does no harm


CHANGES: dict[str, Any] = {
    "loaded": lambda model, weight: weight.copy_(weight * 1.5),
    "another tensor in its place": lambda model, weight: setattr(weight, "data", weight.data * 1.5),
    "merged and taken out again": lambda model, weight: (model.merge_adapter(), model.unmerge_adapter()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_weight_that_changes_is_laid_out_anew(change: Any, tmp_path: Path) -> None:
    session, fresh = opened(tmp_path), opened(tmp_path)
    session.lay_out()
    before = gradients(session)
    for one in (session, fresh):
        with torch.no_grad():
            change(one.policy.model, layers(one)[5].base_layer.weight)
    seen, expected = gradients(session), gradients(fresh)
    for name, value in expected.items():
        assert torch.equal(seen[name], value), name
    assert any(not torch.equal(seen[name], value) for name, value in before.items())
    session.close()
    fresh.close()


def test_a_second_derivative_of_an_adapter_is_refused(tmp_path: Path) -> None:
    session = opened(tmp_path)
    x = random(3, 32).requires_grad_()
    (grad,) = torch.autograd.grad(layers(session)[0](x).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().square().sum().backward()
    session.close()


def test_copies_come_without(tmp_path: Path) -> None:
    session = opened(tmp_path)
    session.lay_out()
    copied = copy.deepcopy(session.policy.model)
    assert all(module.transposed is None for module in copied.modules() if isinstance(module, LeanLora))
    torch.save(layers(session)[0], buffer := io.BytesIO())
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).transposed is None
    assert all(layer.transposed is not None for layer in layers(session))
    session.close()


def test_only_frozen_weights_in_bf16_of_ordinary_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Session.open(adapted(), SFTConfig(str(tmp_path), bf16=False))
    assert plain.laid_out_bytes == 0
    plain.lay_out()
    assert all(layer.transposed is None for layer in layers(plain))
    plain.close()
    session = opened(tmp_path)
    everything, first = session.laid_out_bytes, layers(session)[0]
    first.base_layer.weight.requires_grad_()
    assert session.laid_out_bytes == everything - first.base_layer.weight.nbytes
    first.base_layer.weight.requires_grad_(False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert session.laid_out_bytes == 0  # an older processor would refuse
    session.close()
    lay_out(nn.Linear(3, 3))


NEEDS = Footprint(100, 50, 50, 200, {"none": 1000.0, "selective": 700.0, "full": 200.0},
                  {"none": 1.0, "selective": 0.0, "full": 0.1}, 10.0, 500)  # fmt: skip


@pytest.mark.parametrize("short_by", [0, 1])
def test_the_planner_counts_them_or_leaves_them_out(
    short_by: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.planner.footprint", lambda *_: NEEDS)
    monkeypatch.setattr("posttrain.planner.memory_in_use", lambda _: 1000)
    monkeypatch.setattr("posttrain.planner.most_resident", lambda lasting, passing: lasting + int(1.5 * passing))
    monkeypatch.setattr("posttrain.planner.total_memory", lambda _: 10**9)
    monkeypatch.setattr("posttrain.planner.probe", lambda *_: 1.0)
    session, work = opened(tmp_path), Workload(usual=3000, largest=4000, longest=100)
    options: dict[str, Any] = {"optimizer": "adamw", "token_budget": None, "recompute": "auto"}
    bytes_ = session.laid_out_bytes
    roomy = make_plan(session, work, **options, max_memory=10**8)
    assert all(layer.transposed is not None for layer in layers(session))
    take_back(session.policy.base)
    plan = make_plan(session, work, **options, max_memory=roomy.needs[1] - short_by)
    assert plan.fits
    assert [layer.transposed is not None for layer in layers(session)] == [not short_by] * len(layers(session))
    assert roomy.needs[1] - plan.needs[1] == short_by * bytes_
    assert not plan.is_tight
    session.close()

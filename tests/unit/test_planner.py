"""The formula against memory that is really taken, and what the planner makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import posttrain.planner
from posttrain import ConfigError, SFTConfig, native
from posttrain.models import available
from posttrain.models.available import free_memory, parse_size, total_memory
from posttrain.models.critic import ValueModel
from posttrain.models.footprint import Footprint
from posttrain.models.scoring import as_classifier
from posttrain.planner import Plan, Workload, make_plan
from posttrain.session import Session
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]

MEASURE = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from posttrain import SFTConfig
from posttrain.models.footprint import footprint
from posttrain.models.memory import return_freed_pages
from posttrain.optimizer_state import make_state
from posttrain.planner import probe
from posttrain.session import Session

kind, dtype, level, length, count, layers, vocabulary, folder = sys.argv[1:]
torch.manual_seed(0)
config = LlamaConfig(vocab_size=int(vocabulary), hidden_size=512, intermediate_size=1408, num_hidden_layers=int(layers),
                     num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)
model = LlamaForCausalLM(config)
if kind == "lora":
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
session = Session.open(model, SFTConfig(folder, bf16=dtype == "bf16", recompute=level))
session.policy.model.train()
make_state(torch.optim.AdamW(list(session.trained.values())))
needs = footprint(session.policy.base, session.trained, set(session.lean), "adamw_torch")
return_freed_pages()
lengths = [int(length)] * int(count)
for _ in range(2):  # the first one fills caches of its own
    ratio = probe(session, needs, lengths)
print(ratio, needs.step(level, sum(lengths), max(lengths), 1) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "level", "length", "count", "layers", "vocabulary"),
    [
        ("full", "bf16", "none", 256, 4, 8, 16000),
        ("full", "bf16", "selective", 200, 6, 8, 16000),
        ("full", "fp32", "none", 256, 3, 6, 16000),
        ("lora", "bf16", "selective", 400, 4, 8, 32000),
        ("lora", "fp32", "none", 700, 2, 8, 8000),
        ("lora", "bf16", "full", 512, 5, 10, 8000),
    ],
)
def test_the_formula_says_what_is_measured(
    tmp_path: Path, kind: str, dtype: str, level: str, length: int, count: int, layers: int, vocabulary: int
) -> None:
    """Within 15 %, a hundred to five hundred MiB, in a process that has done nothing else."""
    arguments = [kind, dtype, level, length, count, layers, vocabulary, tmp_path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ratio, predicted = (float(word) for word in done.stdout.split())
    assert predicted > 80
    assert 0.85 < ratio < 1.15, (ratio, predicted)


# --- choosing -------------------------------------------------------------------------------------------------------


def session(tmp_path: Path, **arguments: Any) -> Session:
    return Session.open(tiny_model("llama"), SFTConfig(str(tmp_path), bf16=False, **arguments))


def planned(opened: Session, limit: float, work: Workload, budget: int | None = None) -> Plan:
    """With `limit` bytes beside what is in use now."""
    in_use = available.memory_in_use(torch.device("cpu"))
    return make_plan(opened, work, optimizer="adamw_torch", token_budget=budget, recompute="auto",
                     max_memory=in_use + int(limit))  # fmt: skip


NEEDS = Footprint(
    gradients=100,
    waiting=50,
    copies=50,
    optimizer=200,
    kept={"none": 1000.0, "selective": 700.0, "full": 200.0},
    weights={"none": 1.0, "selective": 0.0, "full": 0.1},
    layer=10.0,
    head=500,
)


def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine: resident memory of a test is no tiny model's."""
    monkeypatch.setattr("posttrain.planner.footprint", lambda *_: NEEDS)
    monkeypatch.setattr("posttrain.planner.memory_in_use", lambda _: 1000)
    monkeypatch.setattr("posttrain.planner.total_memory", lambda _: 10**9)
    monkeypatch.setattr("posttrain.planner.return_freed_pages", lambda: None)
    monkeypatch.setattr("posttrain.planner.keep_freed_pages", lambda: None)
    monkeypatch.setattr("posttrain.planner.most_resident", lambda lasting, passing: lasting + int(1.5 * passing))


def test_a_step_counts_what_is_there_at_its_worst_moment() -> None:
    once = NEEDS.step("none", 8, 4, 1)
    assert once == int((8 * 1004 + 500) * 1.1)
    assert NEEDS.step("none", 8, 4, 2) == once + 50
    assert NEEDS.step("none", 8, 4, 3) == once + 100
    roomy = Footprint(10_000, 0, 3000, 0, {"none": 1.0}, {"none": 0.0}, 1.0, 10)
    assert roomy.step("none", 8, 4, 1) == 10_000
    assert roomy.step("none", 8, 4, 1, sheds_copies=True) == 7_000
    assert NEEDS.step("selective", 8, 4, 1) == int((8 * 700 + 500) * 1.1)


def test_less_memory_more_recomputation_smaller_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made_up(monkeypatch)
    monkeypatch.setattr("posttrain.planner.probe", lambda *_: 1.0)
    opened, work = session(tmp_path), Workload(usual=3000, largest=4000, longest=100)
    seen = []
    for limit in (10_000_000, 5_500_000, 3_800_000, 1_200_000, 500_000, 20_000):
        plan = make_plan(opened, work, optimizer="adamw", token_budget=None, recompute="auto", max_memory=limit)
        seen.append((plan.recomputation, plan.token_budget, plan.is_tight, plan.fits))
        assert opened.recomputation == plan.recomputation
        opened.recompute("none")
    assert seen == [
        ("none", 4096, False, True),
        ("none", 4000, True, True),
        ("none", 2000, True, True),
        ("selective", 1024, True, True),
        ("full", 2000, True, True),
        ("full", 100, True, False),
    ]
    opened.close()


def test_layers_are_made_again_only_where_a_value_model_has_such_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.planner.memory_in_use", lambda _: 1000)
    monkeypatch.setattr("posttrain.planner.total_memory", lambda _: 10**9)
    monkeypatch.setattr("posttrain.planner.return_freed_pages", lambda: None)
    monkeypatch.setattr("posttrain.planner.most_resident", lambda lasting, passing: lasting + int(1.5 * passing))
    monkeypatch.setattr("posttrain.planner.probe", lambda *_: 1.0)
    valued = as_classifier(tiny_model("llama", seed=1))
    for has_such, wanted in ((True, "full"), (False, "selective")):
        monkeypatch.setattr(type(valued), "supports_gradient_checkpointing", has_such)
        opened = Session.open(tiny_model("qwen2"), SFTConfig(str(tmp_path), bf16=False), ValueModel(valued))
        work = Workload(usual=3000, largest=4000, longest=100)
        plan = make_plan(opened, work, optimizer="adamw", token_budget=None, recompute="auto", max_memory=2000)
        assert plan.recomputation == opened.recomputation == wanted
        opened.recompute("selective")
        assert opened.recompute_more() is has_such
        opened.close()


def test_a_model_that_keeps_more_is_planned_with_what_the_probe_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made_up(monkeypatch)
    monkeypatch.setattr("posttrain.planner.probe", lambda *_: 2.0)
    opened = session(tmp_path)
    work = Workload(usual=3000, largest=4000, longest=100)
    plan = make_plan(opened, work, optimizer="adamw", token_budget=None, recompute="auto", max_memory=5_500_000)
    assert plan.token_budget == 2000  # 4000 by the formula alone
    assert "2.0 times" in caplog.text
    opened.close()


@pytest.mark.parametrize(("limit", "probes"), [(10_000_000, True), (30_000_000, False)], ids=["enough", "plenty"])
def test_unless_there_is_plenty_the_formula_is_confirmed_even_where_it_fits(
    limit: int, probes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made_up(monkeypatch)
    monkeypatch.setattr("posttrain.planner.probe", lambda *_: 1.6)
    planned_with: list[Footprint] = []

    def spied(needs: Footprint, *given: Any) -> Plan:
        planned_with.append(needs)
        return tight(needs, *given)

    tight = posttrain.planner._tight
    monkeypatch.setattr("posttrain.planner._tight", spied)
    opened = session(tmp_path)
    work = Workload(usual=3000, largest=4000, longest=100)
    plan = make_plan(opened, work, optimizer="adamw", token_budget=None, recompute="auto", max_memory=limit)
    assert ("1.6 times" in caplog.text) is probes
    assert [needs.kept["none"] for needs in planned_with] == ([1600.0] if probes else [])  # what was found counts once
    assert plan.is_tight is probes  # the formula's 6.6 MB would fit, what was found does not
    assert plan.fits
    opened.close()


def test_the_probe_asks_of_the_policy_what_is_the_policy_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes the policy alone; beside a value model twice as much is planned for."""
    asked: list[Footprint] = []

    def probe(_: Session, needs: Footprint, lengths: list[int]) -> float:
        asked.append(needs)
        return 1.0

    monkeypatch.setattr("posttrain.planner.probe", probe)
    monkeypatch.setattr("posttrain.planner.footprint", lambda *_: NEEDS)
    critic = ValueModel(as_classifier(tiny_model("llama")))
    opened = Session.open(tiny_model("llama"), SFTConfig(str(tmp_path), bf16=False), critic)
    make_plan(opened, Workload(100, 100, 50), optimizer="adamw", token_budget=None, recompute="auto", max_memory=1)
    opened.close()
    assert asked == [NEEDS]


@pytest.mark.skipif(native.kernels(torch.bfloat16) is None, reason="no native kernels for bf16 on this machine")
@pytest.mark.parametrize(("adapter", "bf16", "level"), [(False, True, "selective"), (False, False, "none"),
                                                        (True, True, "none")])  # fmt: skip
def test_norms_are_made_again_where_that_costs_nothing(adapter: bool, bf16: bool, level: str, tmp_path: Path) -> None:
    made = tiny_model("llama")
    if adapter:
        made = get_peft_model(made, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    opened = Session.open(made, SFTConfig(str(tmp_path), bf16=bf16))
    options: dict[str, Any] = {"optimizer": "adamw", "token_budget": None, "max_memory": None}
    plan = make_plan(opened, Workload(100, 200, 50), **options, recompute="auto")
    assert plan.recomputation == opened.recomputation == level
    opened.recompute("none")
    assert make_plan(opened, Workload(100, 200, 50), **options, recompute="none").recomputation == "none"
    opened.close()


def test_what_sampling_takes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch)
    monkeypatch.setattr("posttrain.planner.probe", lambda *_: 1.0)
    opened = session(tmp_path)
    options: dict[str, Any] = {"optimizer": "adamw", "token_budget": None, "recompute": "auto"}
    alone = make_plan(opened, Workload(100, 200, 50), **options, max_memory=10**8)
    beside = make_plan(opened, Workload(100, 200, 50, beside=7000), **options, max_memory=10**8)
    assert beside.fixed == alone.fixed + 7000
    assert beside.needs == (alone.needs[0] + 7000, alone.needs[1] + 7000)
    tight = make_plan(opened, Workload(100, 200, 50, beside=7000), **options, max_memory=alone.needs[1])
    assert tight.is_tight
    assert tight.fixed == 1200 + 7000
    opened.close()


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    from posttrain.models.footprint import footprint
    from posttrain.planner import probe
    from posttrain.snapshot import capture_rng

    opened = session(tmp_path)
    before = capture_rng()["tensors"]["torch"]
    probe(opened, footprint(opened.policy.base, opened.trained, set(opened.lean), "adamw"), [20, 20])
    assert torch.equal(capture_rng()["tensors"]["torch"], before)
    assert all(parameter.grad is None for parameter in opened.policy.base.parameters())
    opened.close()


def test_what_is_planned_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "posttrain")
    opened = session(tmp_path)
    plan = planned(opened, 2**34, Workload(100, 200, 50))
    assert plan.token_budget == 4096
    assert caplog.messages[-1].startswith("memory   needs ")
    assert f"of {plan.total / 2**30:.1f} GiB" in caplog.messages[-1]
    opened.close()


# --- what there is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "size"), [("12GiB", 12 * 2**30), ("12GB", 12 * 10**9), ("1.5 MiB", 1.5 * 2**20), (77, 77), ("800", 800)]
)
def test_sizes(given: str | int, size: float) -> None:
    assert parse_size(given) == size


@pytest.mark.parametrize("given", ["12 parsecs", "", "0", "-3GB", 0, True, "1.2.3GB"])
def test_what_is_no_size_is_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_memory"):
        parse_size(given)


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_memory='much'"):
        SFTConfig(str(tmp_path), max_memory="much")
    with pytest.raises(ConfigError, match="recompute='half'"):
        SFTConfig(str(tmp_path), recompute="half")


def test_more_than_there_is_cannot_be_had() -> None:
    device = torch.device("cpu")
    assert 0 < free_memory(device) < total_memory(device)


def groups(monkeypatch: pytest.MonkeyPatch, root: Path, lines: str, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    own = root / "own"
    own.write_text(lines)
    real = Path.read_text
    monkeypatch.setattr(available, "CGROUPS", root)
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a, **k: real(own if str(path) == "/proc/self/cgroup" else path, *a, **k)
    )


def test_a_container_of_the_second_version_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tightest of all levels; what the kernel would drop counts as free."""
    files = {
        "a/memory.max": "max\n", "a/memory.current": "5000\n",
        "a/b/memory.max": "9000\n", "a/b/memory.current": "6000\n", "a/b/memory.stat": "anon 1\ninactive_file 500\n",
    }  # fmt: skip
    groups(monkeypatch, tmp_path, "0::/a/b\n", files)
    assert free_memory(torch.device("cpu")) == 3500


def test_a_container_of_the_first_version_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its path is that of the host, and the files lie in the root that the container sees."""
    files = {"memory/memory.limit_in_bytes": "8000\n", "memory/memory.usage_in_bytes": "7000\n"}
    groups(monkeypatch, tmp_path, "4:memory:/docker/0123\n1:cpu:/\n", files)
    assert free_memory(torch.device("cpu")) == 1000


def test_ulimit_counts() -> None:
    code = """
import resource, torch
from posttrain.models.available import free_memory
import psutil
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 50 * 2**20,) * 2)
print(free_memory(torch.device("cpu")))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert 0 < json.loads(done.stdout) <= 50 * 2**20

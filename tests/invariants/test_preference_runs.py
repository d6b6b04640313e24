"""Runs over pairs: the same however they are cut, killed and resumed, and references only where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from posttrain import ConfigError, DPOConfig, DPOTrainer
from posttrain.reference_ahead import cache_key
from posttrain.trainers.base import PackedTrainer
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"What is {i} plus two? " * (1 + i % 2),
        "chosen": f"It is {i + 2}, I think." * (1 + i % 3),
        "rejected": f"No idea, {i} or so." * (1 + i % 2),
    }
    for i in range(8)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def trainer(folder: Path, adapted: bool = False, rows: Any = ROWS, model: Any = None, eval_rows: Any = None,
            **options: Any) -> DPOTrainer:  # fmt: skip
    tokenizer = chatml_tokenizer()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-3, "bf16": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **options,
    }  # fmt: skip
    peft = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")} if adapted else {}
    made = model or tiny_model("llama", len(tokenizer))
    return DPOTrainer(made, args=DPOConfig(str(folder), **settings), train_dataset=rows,
                      eval_dataset=eval_rows, processing_class=tokenizer, **peft)  # fmt: skip


def weights(one: PackedTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in one.model.named_parameters() if p.requires_grad}


def history(one: PackedTrainer, *names: str) -> list[float]:
    return [entry[name] for entry in one.state.log_history if "loss" in entry for name in names]


@pytest.mark.parametrize("budget", [1, 60, 100, 10**6])
def test_however_it_is_cut(budget: int, tmp_path: Path) -> None:
    whole, cut = (trainer(tmp_path / str(b), token_budget=b, learning_rate=1e-4) for b in (10**6, budget))
    for one in (whole, cut):
        one.train()
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
    assert history(cut, *names) == pytest.approx(history(whole, *names), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("precompute", [False, True])
def test_killed_and_resumed(adapted: bool, precompute: bool, tmp_path: Path) -> None:
    options = {"adapted": adapted, "precompute_ref_log_probs": precompute, "save_strategy": "steps", "save_steps": 1}
    undisturbed = trainer(tmp_path / "a", **options)
    undisturbed.train()
    for step in (1, 4):
        resumed = trainer(tmp_path / "a", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        for name, value in weights(undisturbed).items():
            assert torch.equal(value, weights(resumed)[name]), name
        assert history(resumed, "loss", "rewards/margins") == history(undisturbed, "loss", "rewards/margins")


def test_later_epochs_and_later_runs_ask_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain import reference

    asked: list[int] = []
    original = reference.OfPolicy.__call__

    def counted(self: Any, batch: Any) -> torch.Tensor:
        asked.append(batch.num_sequences)
        return original(self, batch)

    monkeypatch.setattr(reference.OfPolicy, "__call__", counted)
    first = trainer(tmp_path / "a")
    first.train()
    assert sum(asked) == 2 * len(ROWS)  # each answer once, in three epochs
    again = trainer(tmp_path / "b")
    again.train()
    assert sum(asked) == 2 * len(ROWS)
    assert history(again, "loss") == history(first, "loss")
    trainer(tmp_path / "c", rows=ROWS[1:]).train()
    assert sum(asked) == 2 * len(ROWS) + 2 * len(ROWS[1:])


def test_the_key_heeds_everything_that_the_answers_depend_on(tmp_path: Path) -> None:
    keys = set()
    for adapted, family, seed in ((False, "llama", 0), (False, "mistral", 0), (False, "llama", 1), (True, "llama", 0)):
        one = trainer(tmp_path / "k", adapted, model=tiny_model(family, len(chatml_tokenizer()), seed))
        run = one.run
        with run._open() as session:
            assert run.reference is not None
            assert not callable(run.train_samples)
            keys.add(cache_key(run.train_samples, run.reference.depends_on(session)))
            keys.add(cache_key(run.train_samples[1:], run.reference.depends_on(session)))
    assert len(keys) == 8


def test_a_damaged_cache_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = trainer(tmp_path / "a")
    first.train()
    (kept,) = (tmp_path / "cache" / "reference").iterdir()
    kept.write_bytes(kept.read_bytes()[:-40])
    again = trainer(tmp_path / "b")
    again.train()
    assert "is damaged" in caplog.text
    assert history(again, "loss") == history(first, "loss")


@pytest.mark.parametrize("adapted", [False, True])
def test_the_reference_stays_where_training_began(adapted: bool, tmp_path: Path) -> None:
    """Asked as training goes, after training, and ahead: the same, and the weights are as they were."""
    ahead, asked = (trainer(tmp_path / str(p), adapted, precompute_ref_log_probs=p) for p in (True, False))
    for one in (ahead, asked):
        one.train()
    assert history(asked, "loss", "rewards/margins") == pytest.approx(
        history(ahead, "loss", "rewards/margins"), rel=1e-4, abs=1e-5
    )
    before = weights(asked)
    metrics = asked.evaluate(ROWS[:3])
    assert metrics["eval_rewards/margins"] > 0.01
    assert all(torch.equal(value, weights(asked)[name]) for name, value in before.items())


def test_a_stream(tmp_path: Path) -> None:
    stream = trainer(tmp_path / "s", rows=iter(ROWS * 3), max_steps=2, num_train_epochs=1)
    stream.train()
    plain = trainer(tmp_path / "p", max_steps=2, train_sampling_strategy="sequential")
    plain.train()
    assert history(stream, "loss") == pytest.approx(history(plain, "loss"), rel=1e-5)


def test_an_epoch_is_evaluated_with_its_own_beta(tmp_path: Path) -> None:
    options = {"save_strategy": "no", "learning_rate": 1e-4, "eval_strategy": "epoch", "num_train_epochs": 2}
    margins = []
    for index, beta in enumerate((0.5, [0.5, 0.05])):
        one = trainer(tmp_path / str(index), beta=beta, eval_rows=ROWS, **options)
        one.train()
        margins.append([e["eval_rewards/margins"] for e in one.state.log_history if "eval_rewards/margins" in e])
        margins[-1].append(one.evaluate()["eval_rewards/margins"])
    plain, scheduled = margins
    assert scheduled[0] == pytest.approx(plain[0], rel=1e-5)
    assert scheduled[1] == pytest.approx(scheduled[2], rel=1e-6)
    assert abs(scheduled[1]) < abs(plain[1]) / 5


@pytest.mark.parametrize("options", [{"num_train_epochs": 1}, {"max_steps": 2, "num_train_epochs": 1}], ids=str)
def test_betas_of_epochs_that_never_come(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training ends in epoch 1"):
        trainer(tmp_path, beta=[0.5, 0.05], **options)


def test_betas_of_all_epochs_that_come(tmp_path: Path) -> None:
    """Batches that are left out make an epoch shorter."""
    options = {"max_steps": 5, "num_train_epochs": 1, "dataloader_drop_last": True}
    rows = (ROWS * 2)[:10]  # two batches of four: the fifth step is of the third epoch
    assert trainer(tmp_path, rows=rows, beta=[0.5, 0.2, 0.1], **options).run.schedule is not None
    with pytest.raises(ConfigError, match="training ends in epoch 3"):
        trainer(tmp_path, rows=rows, beta=[0.5, 0.2, 0.1, 0.05], **options)


def test_beta_for_each_epoch(tmp_path: Path) -> None:
    """The first epoch is that of a run with the first value throughout; rewards are multiples of it; a resumed run
    goes on with the epoch's own."""
    options = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-4}
    plain, scheduled = (trainer(tmp_path / str(i), beta=beta, **options) for i, beta in enumerate((0.5, [0.5, 0.05])))
    for one in (plain, scheduled):
        one.train()
    assert history(scheduled, "loss", "grad_norm")[:4] == history(plain, "loss", "grad_norm")[:4]
    third = [entry for entry in scheduled.state.log_history if "loss" in entry][2]
    other = [entry for entry in plain.state.log_history if "loss" in entry][2]
    assert third["rewards/margins"] == pytest.approx(other["rewards/margins"] / 10, rel=1e-4)
    assert third["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-6)  # the weights are the same still
    resumed = trainer(tmp_path / "1", beta=[0.5, 0.05], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3"))
    assert history(resumed, "loss", "rewards/margins") == history(scheduled, "loss", "rewards/margins")
    for name, value in weights(scheduled).items():
        assert torch.equal(value, weights(resumed)[name]), name

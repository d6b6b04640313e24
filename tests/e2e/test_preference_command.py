"""`posttrain train` with preference methods, from a recipe to an adapter, stopped and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.e2e.test_command_line import command, posttrain
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

OVERRIDES = (
    "--set", "model.name=model", "--set", "training.bf16=false", "--set", "training.logging_steps=1",
    "--set", "training.per_device_train_batch_size=2", "--set", "model.max_seq_length=128",
    "--set", "training.save_steps=1", "--set", "training.learning_rate=1e-3",
)  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    tokenizer = chatml_tokenizer()
    tiny_model(vocabulary=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "chosen": [{"role": "assistant", "content": f"{i} is a number."}],
            "rejected": [{"role": "assistant", "content": "Who knows."}],
        }
        for i in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ratings = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": i % 2 == 1}
        for i, row in enumerate(rows)
    ]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ratings))
    return tmp_path


def recipe(folder: Path, name: str) -> None:
    shown = posttrain(folder, "recipes", "show", name)
    assert shown.returncode == 0, shown.stderr
    (folder / "run.yaml").write_text(shown.stdout.replace("data/splits/", ""))


def test_dpo_from_the_recipe(project: Path) -> None:
    recipe(project, "dpo")
    done = posttrain(project, "train", "run.yaml", *OVERRIDES, "--set", "dataset.val_path=pairs.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 4
    assert summary["final_loss"] < summary["first_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert AutoPeftModelForCausalLM.from_pretrained(summary["path"]).peft_config["default"].r == 16
    log = json.loads((project / "outputs/trainer_state.json").read_text())["log_history"]
    assert any("eval_rewards/accuracies" in entry for entry in log)


METRICS = {
    "orpo": ("nll_loss", "log_odds_ratio", "rewards/accuracies"),
    "kto": ("kl", "rewards/margins", "logps/chosen"),
    "reward": ("accuracy", "margin", "calibration_error", "length_correlation"),
}


@pytest.mark.parametrize("method", METRICS)
@pytest.mark.parametrize("whole", [False, True])
def test_other_methods_from_their_recipes(method: str, whole: bool, project: Path) -> None:
    recipe(project, method)
    data = "rated.jsonl" if method == "kto" else "pairs.jsonl"
    more = ("--set", "lora.enabled=false") if whole else ()
    done = posttrain(project, "train", "run.yaml", *OVERRIDES, *more, "--set", f"dataset.val_path={data}", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 4
    assert summary["final_loss"] < summary["first_loss"]
    log = json.loads((project / "outputs/trainer_state.json").read_text())["log_history"]
    evaluated = next(entry for entry in log if "eval_loss" in entry)
    assert all(f"eval_{name}" in evaluated for name in METRICS[method])
    path = Path(summary["path"])
    if method != "reward":
        made = AutoModelForCausalLM.from_pretrained(path) if whole else AutoPeftModelForCausalLM.from_pretrained(path)
        assert made.num_parameters() > 0
    elif whole:
        assert AutoModelForSequenceClassification.from_pretrained(path).score.weight.shape[0] == 1
    else:
        assert any("score" in name for name in load_file(path / "adapter_model.safetensors"))


def test_stopped_and_resumed(project: Path) -> None:
    recipe(project, "dpo")
    more = (*OVERRIDES, "--set", "training.num_train_epochs=30")
    undisturbed = posttrain(project, "train", "run.yaml", *more, "--set", "training.output_dir=whole",
                            "--set", "save.lora_path=whole/lora")  # fmt: skip
    assert undisturbed.returncode == 0, undisturbed.stderr
    running = subprocess.Popen(command("train", "run.yaml", *more), cwd=project, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not list((project / "outputs").glob("checkpoint-*")):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 75, said
    done = posttrain(project, "train", "run.yaml", *more, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    one, other = (
        load_file(project / p / "adapter_model.safetensors") for p in ("whole/lora", "models/checkpoints/dpo")
    )
    assert all((one[name] == other[name]).all() for name in one)


def test_mistakes(project: Path) -> None:
    recipe(project, "dpo")
    done = posttrain(project, "train", "run.yaml", *OVERRIDES, "--set", "training.beta=0")
    assert done.returncode == 2
    assert "training.beta=0 must be above 0" in done.stderr
    done = posttrain(project, "train", "run.yaml", *OVERRIDES, "--method", "sft")
    assert done.returncode in (2, 3)
    assert "Traceback" not in done.stderr
    (project / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    done = posttrain(project, "train", "run.yaml", *OVERRIDES)
    assert done.returncode == 3
    assert "E-DATA-0029" in done.stderr
    assert "pairs.jsonl:1" in done.stderr

"""The command line on a tiny model: train, override, resume, and every mistake as one line with its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

CONFIG = """
model: {name: model, max_seq_length: 64, dtype: float32}
dataset: {path: train.jsonl, val_path: train.jsonl}
lora: {r: 4, lora_dropout: 0.1}
training: {learning_rate: 1e-2, num_train_epochs: 2, per_device_train_batch_size: 2, save_steps: 1, save_total_limit: 3,
           logging_steps: 1, bf16: false}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    tokenizer = chatml_tokenizer()
    tiny_model(vocabulary=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i} is {i}."}]}
        for i in range(7)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "posttrain.cli", *arguments]


def posttrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, check=False)


def test_trains_and_leaves_an_adapter_that_peft_loads(project: Path) -> None:
    done = posttrain(project, "train", "run.yaml", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 8
    assert summary["final_loss"] < summary["first_loss"]
    assert summary["path"] == str(project / "models/checkpoints/lora")
    assert AutoPeftModelForCausalLM.from_pretrained(summary["path"]).peft_config["default"].r == 4
    assert "7 rows: 7 used" in done.stderr
    state = json.loads((project / "outputs/trainer_state.json").read_text())
    assert [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]


def test_a_mixture_read_as_a_stream(project: Path) -> None:
    (project / "more.jsonl").write_text((project / "train.jsonl").read_text())
    text = CONFIG.replace(
        "{path: train.jsonl, val_path: train.jsonl}",
        "{mixture: [{path: train.jsonl, weight: 3}, {path: more.jsonl}], streaming: true}",
    )
    (project / "mixed.yaml").write_text(text)
    done = posttrain(project, "train", "mixed.yaml", "--json", "--set", "training.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    assert "read as training goes" in done.stderr


def test_a_chat_template_by_name_goes_with_the_model(project: Path) -> None:
    done = posttrain(project, "train", "run.yaml", "--set", "dataset.chat_template=chatml", "--set",
                     "training.max_steps=2", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    template = (Path(json.loads(done.stdout)["path"]) / "chat_template.jinja").read_text()
    assert "<|im_start|>" in template
    assert "generation %}" not in template
    missing = posttrain(project, "train", "run.yaml", "--set", "dataset.chat_template=llama-3.1", "--set",
                        "training.output_dir=other")  # fmt: skip
    assert missing.returncode == 2
    assert "E-DATA-0040" in missing.stderr


def test_what_is_trained_is_decided_row_by_row(project: Path) -> None:
    """Conversations on the assistant's turns, prompts on their completions, whichever comes first."""
    chat = (project / "train.jsonl").read_text().splitlines()[0]
    pair = json.dumps({"prompt": "What is 0?", "completion": "0 is 0."})
    shares = []
    for rows in ([chat, pair], [pair, chat]):
        (project / "mixed.jsonl").write_text("\n".join(rows))
        done = posttrain(project, "train", "run.yaml", "--set", "dataset.path=mixed.jsonl", "--set",
                         "dataset.val_path=null", "--set", f"training.output_dir=out{len(shares)}")  # fmt: skip
        assert done.returncode == 0, done.stderr
        shares.append(done.stderr.split("2 used; ")[1].split(" % of tokens trained")[0])
    assert shares[0] == shares[1]
    assert 0 < float(shares[0]) < 70


def test_a_bad_first_row_can_be_skipped(project: Path) -> None:
    path = project / "train.jsonl"
    path.write_text("broken\n" + path.read_text())
    done = posttrain(project, "train", "run.yaml", "--set", "dataset.on_bad_row=skip", "--set", "training.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "8 rows: 7 used, 1 skipped (broken JSON)" in done.stderr
    report = json.loads((project / "outputs" / "data_report.json").read_text())["train"]
    assert (report["rows"], report["used"]) == (8, 7)
    ((code, why),) = report["left_out"]
    assert code == "E-DATA-0002"
    assert "train.jsonl:1:1  not valid JSON" in why


def test_a_signal_saves_and_resuming_gives_the_undisturbed_result(project: Path) -> None:
    undisturbed = posttrain(project, "train", "run.yaml", "--set", "training.output_dir=whole",
                            "--set", "save.lora_path=whole/adapter", "--quiet")  # fmt: skip
    assert undisturbed.returncode == 0, undisturbed.stderr
    running = subprocess.Popen(command("train", "run.yaml", "--set", "training.num_train_epochs=2"), cwd=project,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not list((project / "outputs").glob("checkpoint-[2-9]")) and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 75, said
    assert "Interrupted at step" in said
    way_on = "Continue: posttrain train run.yaml --set training.num_train_epochs=2 --resume auto"
    assert way_on in said
    again = posttrain(project, "train", "run.yaml")  # would replace them
    assert again.returncode == 2
    assert "outputs holds checkpoints of an earlier run" in again.stderr
    resumed = posttrain(project, *way_on.split()[2:])
    assert resumed.returncode == 0, resumed.stderr
    one, other = (load_file(project / folder / "adapter_model.safetensors") for folder in
                  ("whole/adapter", "models/checkpoints/lora"))  # fmt: skip
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        (["training.learning_rat=1"], 2, "did you mean training.learning_rate?"),
        (["training.max_length=5"], 2, "training.max_length is set as model.max_seq_length"),
        (["training.fp16=true"], 2, "fp16=True is not honoured"),
        (["model.name=nowhere"], 2, "cannot load the model 'nowhere'"),
        (["dataset.path=trian.jsonl"], 3, "train.jsonl"),
        (["save.lora_path=run.yaml"], 2, "save.lora_path="),
        (["training.output_dir=run.yaml"], 2, "run.yaml cannot be written"),
        (["training.packing=maybe"], 2, "packing='maybe' must be true or false"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(project: Path, overrides: list[str], status: int, message: str) -> None:
    extra = [part for override in overrides for part in ("--set", override)]
    done = posttrain(project, "train", "run.yaml", *extra, "--quiet")
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_who_leaves_does_not_end_the_run(project: Path) -> None:
    running = subprocess.Popen(
        command("train", "run.yaml"), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert running.stderr is not None
    assert running.stdout is not None
    running.stderr.readline()
    running.stderr.close()
    running.stdout.close()
    assert running.wait(timeout=120) == 0
    assert (project / "models/checkpoints/lora/adapter_model.safetensors").is_file()


def test_a_terminal_without_check_marks(project: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command("train", "run.yaml", "--set", "training.max_steps=1"), cwd=project,
                          capture_output=True, env=environment, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"? trained  1 steps, loss" in done.stdout


def heed_signals() -> None:
    """In the child: whoever runs the tests may have them ignored (`nohup`, a job in the background of a script)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_training(project: Path, number: signal.Signals) -> None:
    with (project / "many.jsonl").open("w") as file:
        file.write((project / "train.jsonl").read_text() * 30_000)
    running = subprocess.Popen(command("train", "run.yaml", "--set", "dataset.path=many.jsonl"), cwd=project,
                               stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals)  # fmt: skip
    assert running.stderr is not None
    while "config" not in running.stderr.readline():
        assert running.poll() is None
    time.sleep(1.0)
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 75, said
    assert "Traceback" not in said
    assert f"Stopped at once ({number.name})" in said or "Interrupted" in said


def test_a_changed_learning_rate_is_not_passed_over_on_resuming(project: Path) -> None:
    first = posttrain(project, "train", "run.yaml", "--set", "training.max_steps=2")
    assert first.returncode == 0, first.stderr
    more = ("--set", "training.max_steps=4", "--resume", "auto")
    other = posttrain(project, "train", "run.yaml", "--set", "training.learning_rate=1e-6", *more)
    assert other.returncode == 1
    assert "was written with learning_rate = 0.01, and this run has 1e-06" in other.stderr
    on = posttrain(project, "train", "run.yaml", *more)
    assert on.returncode == 0, on.stderr
    done = posttrain(project, "train", "run.yaml", *more)
    assert "is at step 4 of 4: nothing is left to train" in done.stderr
    nowhere = posttrain(project, "train", "run.yaml", "--resume", "checkpoint-4")
    assert nowhere.returncode == 2
    assert "--resume 'checkpoint-4': no such folder" in nowhere.stderr


def test_a_fault_of_ours_is_one_line_and_a_file(project: Path) -> None:
    (project / "model" / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    done = posttrain(project, "train", "run.yaml")
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\nE-") == 1


def test_a_bad_row_is_named(project: Path) -> None:
    with (project / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "assitant", "content": "x"}]}\n')
    done = posttrain(project, "train", "run.yaml", "--quiet")
    assert done.returncode == 3
    assert "train.jsonl:8" in done.stderr
    assert "assistant" in done.stderr


def test_help_and_recipes_answer_at_once(project: Path) -> None:
    started = time.perf_counter()
    assert "train" in posttrain(project, "--help").stdout
    assert "sft" in posttrain(project, "recipes").stdout
    assert time.perf_counter() - started < 5  # a tenth of that, but never a timed test on a loaded machine
    assert os.path.exists(project / "run.yaml")

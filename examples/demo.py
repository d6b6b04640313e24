"""The main job, start to end: measure a model on a task, fine-tune it on examples, measure again, and show both.

The task turns a customer's message into one line of JSON; a program knows the right answer, and the held-out messages
name things that no training message names. Run it with `make demo`; the adapter stays in `outputs/demo/adapter`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

from peft import LoraConfig

from posttrain import SFTConfig, SFTTrainer
from posttrain.evaluate.accuracy import TaskResult, evaluate_task, side_by_side
from posttrain.evaluate.tasks import orders

MODEL = "smollm2-135m-instruct"


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("posttrain").setLevel(logging.INFO)
    started = time.time()
    folder = Path(options.output)
    train, held_out = orders.split(options.train_rows, options.test_rows)
    train_file = _write(train, folder / "train.jsonl")

    _say(f"1/4  {MODEL}, {len(train)} examples in {train_file}")
    trainer = SFTTrainer(
        model=MODEL,
        args=SFTConfig(
            output_dir=str(folder),
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size,
            num_train_epochs=options.epochs,
            lr_scheduler_type="linear",
            warmup_steps=2,
            logging_steps=5,
            save_steps=50,
            save_total_limit=1,
            report_to="none",
        ),
        train_dataset=str(train_file),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    _say(f"2/4  before: {len(held_out)} held-out messages")
    before = _measure(trainer, held_out)  # the adapter starts at zero, so this is the model as it came
    _say(f"     {before}")
    _say("3/4  training")
    result = trainer.train()
    adapter = folder / "adapter"
    trainer.save_model(str(adapter))
    _say("4/4  after: the same messages")
    after = _measure(trainer, held_out)
    _report(trainer, held_out, before, after, adapter)
    _say(f"trained {result.global_step} steps in {result.metrics['train_runtime']:.0f} s; "
         f"all of it took {time.time() - started:.0f} s")  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="outputs/demo")
    parser.add_argument("--train-rows", type=int, default=480)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args()


def _write(rows: list[orders.Row], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _measure(trainer: SFTTrainer, rows: list[orders.Row]) -> TaskResult:
    return evaluate_task(trainer.model, trainer.processing_class, rows, orders.score)


def _report(trainer: SFTTrainer, rows: list[orders.Row], before: TaskResult, after: TaskResult, adapter: Path) -> None:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("\n" + side_by_side(rows, before, after, k=4) + "\n")
    print(f"accuracy   before {before}")
    print(f"           after  {after}")
    if losses:  # a short run logs none
        print(f"loss       {losses[0]:.3f} → {losses[-1]:.3f}")
    print(f"adapter    {adapter}  (plain PEFT loads it)")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()

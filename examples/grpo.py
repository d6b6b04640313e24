"""Reinforcement learning, start to end: how often is the model right, learn from its own answers, how often now?

The task is a short sum in a required form (`posttrain.evaluate.tasks.sums`); a program tells what is right, nobody
writes answers down. Run it with `.venv/bin/python examples/grpo.py`; the adapter, a log of every answer with its reward
(`samples.jsonl`) and a picture of how it went (`curves.svg`) stay in `outputs/grpo`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

from peft import LoraConfig

from posttrain import GRPOConfig, GRPOTrainer
from posttrain.evaluate.curves import curves
from posttrain.evaluate.tasks import sums

MODEL = "smollm2-135m-instruct"


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("posttrain").setLevel(logging.INFO)
    started, folder = time.time(), Path(options.output)
    train, held_out = sums.split()
    trainer = GRPOTrainer(
        model=MODEL,
        reward_funcs=sums.correct,
        args=GRPOConfig(
            output_dir=str(folder),
            learning_rate=1e-4,
            beta=0.01,
            num_generations=8,
            per_device_train_batch_size=64,
            max_completion_length=12,
            max_steps=options.steps,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            logging_steps=1,
            save_steps=50,
            save_total_limit=1,
            num_generations_eval=4,
            per_device_eval_batch_size=84,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()
    print(f"before: {_share(before)} of {4 * len(held_out)} answers to held-out sums are right", flush=True)
    result = trainer.train()
    trainer.save_model(str(folder / "adapter"))
    after = trainer.evaluate()
    picture = folder / "curves.svg"
    panels = (("reward",), ("kl",), ("completions/mean_length",))
    picture.write_text(curves(trainer.state.log_history, panels, "sums in tags: GRPO", smoothing=0.8), encoding="utf-8")
    (folder / "log_history.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()[-3:]:
        said = json.loads(line)
        print(f"  {said['prompt'][-1]['content']:6} {said['completion'][0]['content']!r}  {said['rewards']}")
    print(f"success  before {_share(before)}")
    print(f"         after  {_share(after)}")
    print(f"curves   {picture}")
    print(f"trained {result.global_step} steps in {result.metrics['train_runtime']:.0f} s; "
          f"all of it took {time.time() - started:.0f} s")  # fmt: skip


def _share(metrics: dict[str, float]) -> str:
    return f"{100 * metrics['eval_rewards/correct/mean']:.0f} %"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="outputs/grpo")
    parser.add_argument("--steps", type=int, default=60)
    return parser.parse_args()


if __name__ == "__main__":
    main()

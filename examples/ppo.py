"""PPO, start to end: a reward model learns from pairs what a good reply is and proves it on others; a policy learns
from its scores, held to where it started; the same customers before and after.

The task is `posttrain.evaluate.tasks.replies`. Run it with `.venv/bin/python examples/ppo.py`; the reward model with
its validation record, the policy's adapter, a log of every reply with its score (`samples.jsonl`) and a picture of how
it went (`curves.svg`) stay in `outputs/ppo`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig

from posttrain import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer
from posttrain.evaluate.curves import curves
from posttrain.evaluate.tasks import replies

MODEL = "smollm2-135m-instruct"
QUIET: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("posttrain").setLevel(logging.INFO)
    started, folder = time.time(), Path(options.output)
    reward = train_reward_model(folder / "reward", options.reward_steps)
    args = PPOConfig(
        output_dir=str(folder),
        learning_rate=3e-4,
        kl_coef=0.1,  # with 0.03 it finds what the reward model likes and nobody else does
        response_length=24,
        temperature=1.0,
        per_device_train_batch_size=16,
        num_mini_batches=2,
        num_ppo_epochs=2,
        total_episodes=32 * options.rounds,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        logging_steps=4,
        per_device_eval_batch_size=48,
        **QUIET,
    )
    held_out = replies.prompts(48, seed=3)
    trainer = PPOTrainer(
        args,
        model=MODEL,
        reward_model=str(reward),
        train_dataset=replies.prompts(256, seed=2),
        eval_dataset=held_out,
        peft_config=adapter(),
    )
    before = trainer.evaluate()
    print(f"before: {_scores(before)}", flush=True)
    result = trainer.train()
    trainer.save_model(str(folder / "adapter"))
    after = trainer.evaluate()
    picture = folder / "curves.svg"
    panels = (("objective/scores",), ("objective/kl",), ("loss/value_avg",))
    picture.write_text(curves(trainer.state.log_history, panels, "replies: PPO", smoothing=0.6), encoding="utf-8")
    (folder / "log_history.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()[-4:]:
        said = json.loads(line)
        print(f"  {said['prompt'][-1]['content']}\n    {said['completion'][0]['content']!r}")
    print(f"before   {_scores(before)}")
    print(f"after    {_scores(after)}")
    print(f"curves   {picture}")
    print(f"trained {result.global_step} steps in {result.metrics['train_runtime']:.0f} s; "
          f"all of it took {time.time() - started:.0f} s")  # fmt: skip


def train_reward_model(folder: Path, steps: int) -> Path:
    """Saved with its validation record, which PPO asks for."""
    trainer = RewardTrainer(
        MODEL,
        args=RewardConfig(
            output_dir=str(folder), learning_rate=3e-4, max_steps=steps, per_device_train_batch_size=8,
            per_device_eval_batch_size=16, logging_steps=8, **QUIET,
        ),
        train_dataset=replies.pairs(256, seed=0),
        eval_dataset=replies.pairs(96, seed=1),
        peft_config=adapter(),
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    assert trainer.validation is not None
    print(f"reward model: prefers the better of two held-out replies {trainer.validation.accuracy:.0%} of the time "
          f"(n={trainer.validation.n})", flush=True)  # fmt: skip
    return folder


def adapter() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def _scores(metrics: dict[str, float]) -> str:
    score, kl = metrics["eval_objective/scores"], metrics["eval_objective/kl"]
    return f"mean score of held-out replies {score:+.2f}, {kl:.1f} nats a reply from the starting model"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="outputs/ppo")
    parser.add_argument("--rounds", type=int, default=28, help="of 32 replies each")
    parser.add_argument("--reward-steps", type=int, default=32)
    return parser.parse_args()


if __name__ == "__main__":
    main()

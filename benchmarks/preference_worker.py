"""One measured run of one library and one preference method, in a process of its own; prints one line of JSON.

The script is the same for both libraries but for the import and for where TRL keeps ORPO.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from worker import TUNED, fast_bf16

STARTED = time.perf_counter()
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "trl": {"documented": {"use_cpu": True}, "tuned": TUNED, "tuned, few at a time": TUNED},
    "posttrain": {"default": {}},
}
FEW = {"dpo": 1, "orpo": 1, "reward": 1, "kto": 2}
"""Rows of a micro-batch that pads the least; TRL's KTO takes no single ones."""
NAMES = {"dpo": "DPO", "orpo": "ORPO", "kto": "KTO", "reward": "Reward"}
ELSEWHERE = {("trl", "orpo"): "trl.experimental.orpo"}


def main() -> None:
    options = _options()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    torch.set_num_threads(options.threads)

    class Clock(TrainerCallback):
        """When each optimiser step ended."""

        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    library = import_module(ELSEWHERE.get((options.library, options.method), options.library))
    rows = _rows(Path(options.data), AutoTokenizer.from_pretrained(options.model), options)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": options.batch, "max_steps": options.steps, "learning_rate": 2e-5,
        "logging_steps": 1, "max_length": options.max_length, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "train_sampling_strategy": "sequential",
        **VARIANTS[options.library][options.variant],
    }  # fmt: skip
    if "tuned" in options.variant:
        settings |= {"bf16": fast_bf16()}
    if "few at a time" in options.variant:
        few = FEW[options.method]
        settings |= {"per_device_train_batch_size": few, "gradient_accumulation_steps": options.batch // few}
    if options.library == "posttrain" and options.method in ("dpo", "kto"):
        settings |= {"precompute_ref_log_probs": False}  # so that every step has its reference's pass, as with TRL
    task = "SEQ_CLS" if options.method == "reward" else "CAUSAL_LM"
    clock = Clock()
    given: dict[str, Any] = {"model": options.model}
    if options.method == "reward":  # whose head is made of random numbers, which each library would draw in its own way
        torch.manual_seed(0)
        made = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
        given["model"] = made
    if options.method in ("orpo", "reward"):
        given["processing_class"] = AutoTokenizer.from_pretrained(options.model)
    trainer = getattr(library, f"{NAMES[options.method]}Trainer")(
        args=getattr(library, f"{NAMES[options.method]}Config")(tempfile.mkdtemp(), **settings),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task),
        callbacks=[clock],
        **given,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = clock.ends[-1] - clock.ends[options.warmup - 1]
    result = {
        "losses": [entry["loss"] for entry in steps],
        "grad_norms": [entry["grad_norm"] for entry in steps],
        "rows_per_second": (options.steps - options.warmup) * options.batch / seconds,
        "seconds_to_first_step": clock.ends[0] - STARTED,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print("RESULT " + json.dumps(result), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", choices=VARIANTS, required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--method", choices=NAMES, required=True)
    parser.add_argument("--workload", choices=("demo", "long_prompts"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1, help="steps not counted, first")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _rows(path: Path, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs whose both answers fit, in the format that all of TRL's trainers read; for KTO one answer of each."""
    pairs = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        prompt = [{"role": _role(turn), "content": turn["value"]} for turn in row["conversations"]]
        chosen, rejected = row["chosen"]["value"], row["rejected"]["value"]
        if options.workload == "long_prompts":
            prompt, chosen, rejected = _long(prompt, chosen, rejected)
        longest = max(([*prompt, {"role": "assistant", "content": text}] for text in (chosen, rejected)), key=_size)
        if len(tokenizer.apply_chat_template(longest)["input_ids"]) <= options.max_length and chosen != rejected:
            pairs.append((prompt, chosen, rejected))
    said = [
        {"prompt": prompt, "chosen": [_answer(chosen)], "rejected": [_answer(rejected)]}
        for prompt, chosen, rejected in pairs
    ]
    if options.method != "kto":
        return said
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": i % 2 == 1}
        for i, row in enumerate(said)
    ]


def _long(prompt: list[dict[str, str]], chosen: str, rejected: str) -> tuple[list[dict[str, str]], str, str]:
    """A question about a long text, with answers of a sentence."""
    text = f"{prompt[-1]['content']}\n\n{chosen}\n\n{rejected}"
    short = (" ".join(answer.split()[:20]) for answer in (chosen, rejected))
    return [*prompt[:-1], {"role": "user", "content": f"{text}\n\nSay it in one sentence."}], *short


def _role(turn: dict[str, str]) -> str:
    return {"human": "user", "gpt": "assistant", "system": "system"}[turn["from"]]


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _size(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages)


if __name__ == "__main__":
    main()

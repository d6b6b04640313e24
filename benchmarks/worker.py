"""One measured run of one library, in a process of its own; prints one line of JSON.

The script is the same for all libraries but for what each asks for: their public names, the same model, data, order
and seed. All that depends on the device is how memory is measured, `peak_memory_bytes`.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

# What each variant sets beside the common arguments. "documented" is what the library's own pages show for the device;
# "tuned" the best of TRL's documented switches found there, fp32 where the processor has no bf16 products among them.
TWO_AT_A_TIME = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
TUNED: dict[str, Any] = {"use_cpu": True, "gradient_checkpointing": False}
# What else TRL and transformers offer for speed on a CPU, each added to "tuned" (`sft.py --tuning`).
TRIED: dict[str, dict[str, Any]] = {
    "four at a time": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "two at a time": TWO_AT_A_TIME,
    "torch_compile": {"torch_compile": True},
    "eager attention": {"model_init_kwargs": {"attn_implementation": "eager"}},
    "loader in a process of its own": {"dataloader_num_workers": 1},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
}
VARIANTS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "cpu": {
        "trl": {
            "documented": {"use_cpu": True},
            "tuned": TUNED,
            "documented, two at a time": {"use_cpu": True, **TWO_AT_A_TIME},
            **{f"tuned, {name}": {**TUNED, **more} for name, more in TRIED.items()},
        },
        "posttrain": {"default": {"use_cpu": True}},
    },
    "cuda": {
        "trl": {"documented": {}, "tuned": {"gradient_checkpointing": False, "use_liger_kernel": True}},
        "unsloth": {"documented": {"bf16": True}},
        "posttrain": {"default": {}},
    },
}
LIBRARIES = ("posttrain", "trl", "unsloth")


def main() -> None:
    options = _options()
    if options.library == "unsloth":  # it changes transformers, and so wants to be imported before it
        import_module("unsloth")
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(options.threads)

    class Clock(TrainerCallback):
        """When each optimiser step ended."""

        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    library = import_module("trl" if options.library == "unsloth" else options.library)
    model, peft_config = _model(options)
    rows = WORKLOADS[options.workload](_rows(Path(options.data), options.rows))
    clock = Clock()
    from datasets import Dataset

    trainer = library.SFTTrainer(
        model=model,
        args=library.SFTConfig(
            tempfile.mkdtemp(),
            **{
                "per_device_train_batch_size": options.batch,
                "max_steps": options.steps,
                "learning_rate": 2e-5 if options.full else 2e-4,
                "logging_steps": 1,
                "max_length": 2048,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                **VARIANTS[options.device][options.library][options.variant],
                **({"bf16": fast_bf16()} if "tuned" in options.variant and options.device == "cpu" else {}),
            },
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=peft_config,
        callbacks=[clock],
    )
    trainer.train()
    _print(trainer.state.log_history, clock.ends, options.warmup, peak_memory_bytes(options.device))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--device", choices=VARIANTS, default="cpu")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--workload", choices=WORKLOADS, default="gsm8k")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=6, help="steps not counted, first")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _rows(path: Path, limit: int) -> list[dict[str, Any]]:
    """GSM8K's question and answer as conversational prompt and completion."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]


def _uneven(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of 1 to 12 problems in a row, most of them short: lengths from 60 to about 2,000 tokens in one batch."""
    import random

    draw, uneven, start = random.Random(0), [], 0
    while start < len(rows):
        count = draw.choice((1, 1, 1, 1, 2, 2, 3, 6, 12))
        group, start = rows[start : start + count], start + count
        answer = "\n\n".join(row["completion"][0]["content"] for row in group)
        uneven.append({"prompt": group[0]["prompt"], "completion": [{"role": "assistant", "content": answer}]})
    return uneven


def _instructed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each problem behind the same system message, which shows four that are solved."""
    shown = [f"{row['prompt'][0]['content']}\n{row['completion'][0]['content']}" for row in rows[:4]]
    system = {"role": "system", "content": "Solve the problem as these are solved.\n\n" + "\n\n".join(shown)}
    return [{"prompt": [system, *row["prompt"]], "completion": row["completion"]} for row in rows[4:]]


WORKLOADS = {"gsm8k": lambda rows: rows, "uneven": _uneven, "instructed": _instructed}


def _model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model, or its name, and the adapter to add to it. Unsloth wants to load and to wrap it itself."""
    if options.library == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            options.model, max_seq_length=2048, load_in_4bit=False, full_finetuning=options.full
        )
        if not options.full:
            model = FastLanguageModel.get_peft_model(
                model, r=16, lora_alpha=32, lora_dropout=0, use_gradient_checkpointing="unsloth"
            )
        return model, None
    if options.full:
        return options.model, None
    from peft import LoraConfig

    return options.model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def fast_bf16() -> bool:
    """Whether this processor multiplies in bf16."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def peak_memory_bytes(device: str) -> int:
    """The one call that only the device itself can answer: what its allocator had given out at most."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _print(history: list[dict[str, Any]], ends: list[float], warmup: int, peak: int) -> None:
    steps = [entry for entry in history if "loss" in entry]
    tokens = steps[-1]["num_tokens"] - steps[warmup - 1]["num_tokens"]
    seconds = ends[-1] - ends[warmup - 1]
    shares = [e["supervised_tokens_per_second"] / e["tokens_per_second"] for e in steps if "tokens_per_second" in e]
    limits = [e["hardware_share"] / e["tokens_per_second"] for e in steps if "hardware_share" in e]
    result = {
        "losses": [entry["loss"] for entry in steps],
        "grad_norms": [entry["grad_norm"] for entry in steps],
        "tokens_per_second": tokens / seconds,
        "trained_share": sum(shares) / len(shares) if shares else None,
        "hardware_share_per_token_per_second": sum(limits) / len(limits) if limits else None,
        "seconds_to_first_step": ends[0] - STARTED,
        "peak_memory_gib": peak / 2**30,
    }
    print("RESULT " + json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()

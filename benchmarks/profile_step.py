"""Where the time of a training step goes, by kind of work, from torch.profiler.

    .venv/bin/python benchmarks/profile_step.py                        # LoRA on the packaged model, GSM8K's lengths
    .venv/bin/python benchmarks/profile_step.py --full --json step.json
    .venv/bin/python benchmarks/profile_step.py --recompute full

Each operation's own time (without what it calls) is put down to the innermost of these that it ran in: attention,
norms, head, optimiser, by the function that called it; else by its name: matrix products, fills and copies, the rest.
Backward passes of our own functions are told apart the same way, for autograd names them. A native kernel is no
operation of torch's: its time is its function's own. On CUDA it is the device's
time. The profiler itself costs time, so shares are what to read here, and rates elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from posttrain import SFTConfig, SFTTrainer

# The first that matches an operation, or one of those it was called from, innermost first.
INSIDE = (
    ("head", re.compile(r"_TokenLogps")),
    (
        "attention",
        re.compile(r"_(Segment|Fused)Attention|scaled_dot_product|flash_attention|varlen|_efficient_attention"),
    ),
    ("norms", re.compile(r"RmsNorm|layer_norm|native_layer_norm")),
    ("optimiser", re.compile(r"Optimizer\.step|_fused_adam|_foreach_(?!norm)|clip_grad|_foreach_norm")),
)
BY_NAME = (
    (
        "matrix products",
        re.compile(r"^aten::(mm|addmm|bmm|baddbmm|linear|matmul|addbmm|_scaled_mm)|mkldnn_linear|gemm"),
    ),
    ("adapters and gates, by kernels", re.compile(r"^_(LoraProduct|Gated|GatedDown)(Backward)?$")),
    ("fills and copies", re.compile(r"^aten::(copy_|fill_|zero_|zeros|clone|contiguous|cat|_to_copy|empty|index)")),
)
REST = "other element-wise work"
KINDS = (
    "matrix products", "adapters and gates, by kernels", "attention", "norms", "head", "optimiser", "fills and copies",
    REST,
)  # fmt: skip
LENGTHS = (150, 180, 210, 230, 170, 260, 300, 190)
"""Tokens of eight of GSM8K's rows, question and answer."""


class Recording(TrainerCallback):
    """Profiles all steps after the first `warmup`."""

    def __init__(self, warmup: int, device: str):
        self.warmup, self.seconds, self.steps = warmup, 0.0, 0
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self.profiler = profile(activities=kinds, acc_events=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.warmup:
            self.profiler.start()
            self.started = time.perf_counter()
        if state.global_step == state.max_steps:
            self.seconds, self.steps = time.perf_counter() - self.started, state.global_step - self.warmup
            self.profiler.stop()


def main() -> None:
    options = _options()
    device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    recording = Recording(options.warmup, device)
    trainer = SFTTrainer(
        options.model,
        SFTConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=len(LENGTHS),
            max_steps=options.warmup + options.steps,
            dataset_kwargs={"skip_prepare_dataset": True},
            recompute=options.recompute,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
        ),
        train_dataset=_rows(LENGTHS),
        peft_config=None if options.full else _lora(),
        callbacks=[recording],
    )
    trainer.train()
    shares = by_kind(recording.profiler.events(), device)
    print(table(shares, recording.seconds, recording.steps))
    if options.json:
        Path(options.json).write_text(json.dumps({"seconds_per_step": recording.seconds / recording.steps, **shares}))


def by_kind(events: Sequence[Any], device: str) -> dict[str, float]:
    """Seconds of each kind."""
    seconds: Counter[str] = Counter(dict.fromkeys(KINDS, 0.0))
    for event in events:
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if own > 0:
            seconds[kind_of(event)] += own / 1e6
    return dict(seconds)


def kind_of(event: Any) -> str:
    names = list(_names(event))
    for name in names:
        for kind, pattern in INSIDE:
            if pattern.search(name):
                return kind
    return next((kind for kind, pattern in BY_NAME if pattern.search(names[0])), REST)


def _names(event: Any) -> Iterator[str]:
    """Its own name and those of its callers, innermost first."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def table(seconds: dict[str, float], wall: float, steps: int) -> str:
    total = sum(seconds.values()) or 1.0
    lines = ["| kind of work | ms a step | share |", "|---|---|---|"]
    lines += [f"| {kind} | {1e3 * spent / steps:.0f} | {spent / total:.0%} |" for kind, spent in seconds.items()]
    lines.append(f"| a step, by the clock | {1e3 * wall / steps:.0f} | |")
    return "\n".join(lines)


def _rows(lengths: Sequence[int]) -> list[dict[str, list[int]]]:
    """Tokens that mean nothing; the second half of each row is trained."""
    ids = [[100 + (31 * i + 7 * j) % 150 for j in range(n)] for i, n in enumerate(lengths)]
    return [{"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]} for row in ids]


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--full", action="store_true", help="all weights and not an adapter")
    parser.add_argument("--recompute", default="auto", choices=("auto", "none", "selective", "full"))
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--json", help="write the seconds of each kind here too")
    return parser.parse_args()


if __name__ == "__main__":
    main()

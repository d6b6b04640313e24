"""One measured run of one library, in a process of its own: GRPO steps, or sampling alone; prints one line of JSON.

The reward differs within every group, so that no completion may be left out. Completions end where the model ends them,
at the latest after `--tokens`; for sampling alone all of them have that length.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from worker import fast_bf16

STARTED = time.perf_counter()
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "trl": {
        "documented": {"use_cpu": True},
        "tuned": {"use_cpu": True, "gradient_checkpointing": False},
    },
    "posttrain": {"default": {}},
}


def main() -> None:
    options = _options()
    import torch

    torch.set_num_threads(options.threads)
    result = _sampling(options) if options.part == "sampling" else _steps(options)
    result["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps(result), flush=True)


def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Another number for every completion."""
    return [sum(ids) % 1009 / 1009 for ids in completion_ids]


def _steps(options: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """When each optimiser step ended."""

        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    library = import_module(options.library)
    clock = Clock()
    trainer = library.GRPOTrainer(
        model=options.model,
        reward_funcs=spread,
        args=library.GRPOConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=options.prompts * options.group,
            num_generations=options.group, max_completion_length=options.tokens, max_steps=options.steps,
            learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            bf16=fast_bf16(), model_init_kwargs={"dtype": _dtype()}, **VARIANTS[options.library][options.variant],
        ),
        train_dataset=Dataset.from_list(_rows(Path(options.data))),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][options.warmup :]
    seconds = clock.ends[-1] - clock.ends[options.warmup - 1]
    measured = options.steps - options.warmup
    length = sum(entry["completions/mean_length"] for entry in logs) / len(logs)
    return {
        "seconds_per_step": seconds / measured,
        "completion_tokens_per_second": length * options.prompts * options.group * measured / seconds,
        "mean_length": length,
        "grad_norms": [entry["grad_norm"] for entry in logs],
        "seconds_to_first_step": clock.ends[0] - STARTED,
    }


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """All completions have the same length; the adapter is on, as in training."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(options.model)
    prompts = [
        words.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        for row in _rows(Path(options.data))[: options.prompts]
    ]
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=_dtype())
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    make = _ours if options.library == "posttrain" else _theirs
    sample, products_alone = make(model, prompts, options)
    times, limits = [], []
    for number in range(options.warmup + options.steps):
        started = time.perf_counter()
        sample(number)
        times.append(time.perf_counter() - started)
        if products_alone is not None:  # each time, for the machine drifts
            limits.append(products_alone())
    seconds = sorted(times[options.warmup :])[options.steps // 2]
    rate = options.prompts * options.group * options.tokens / seconds
    return {"tokens_per_second": rate, "limit": sorted(limits)[len(limits) // 2] if limits else None}


def _ours(model: Any, prompts: list[list[int]], options: argparse.Namespace) -> Any:
    from posttrain import GRPOConfig
    from posttrain.rollout.engines import Request
    from posttrain.rollout.engines.local import LocalEngine
    from posttrain.rollout.sampling import Sampling
    from posttrain.session import Session

    session = Session.open(model, GRPOConfig(tempfile.mkdtemp(), report_to="none"))
    engine = LocalEngine(session.policy, ())
    requests = [Request(prompt, number, options.group) for number, prompt in enumerate(prompts)]

    def sample(number: int) -> None:
        engine.update_weights()  # as before each round
        engine.generate(requests, Sampling(max_tokens=options.tokens, seed=number))

    return sample, partial(_products_alone, engine, len(prompts) * options.group)


def _products_alone(engine: Any, rows: int) -> float:
    """Tokens a second, if a step were nothing but the products with the frozen weights."""
    import torch

    with torch.no_grad():
        lean = engine.lean()
        products = [*lean.products(), lean.head] if lean is not None else []
        inputs = [torch.randn(rows, product.width, dtype=engine.policy.base.dtype) for product in products]
        best = float("inf")
        for _ in range(12):
            started = time.perf_counter()
            for product, x in zip(products, inputs, strict=True):
                product.alone(x)
            best = min(best, time.perf_counter() - started)
    return rows / best


def _theirs(model: Any, prompts: list[list[int]], options: argparse.Namespace) -> Any:
    import torch

    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(one)) + one for one in prompts for _ in range(options.group)]
    mask = [[0] * (longest - len(one)) + [1] * len(one) for one in prompts for _ in range(options.group)]
    ids_BT, mask_BT = torch.tensor(rows), torch.tensor(mask)
    model.eval()

    def sample(number: int) -> None:
        torch.manual_seed(number)
        with torch.no_grad():
            model.generate(input_ids=ids_BT, attention_mask=mask_BT, do_sample=True, max_new_tokens=options.tokens,
                           min_new_tokens=options.tokens, pad_token_id=0)  # fmt: skip

    return sample, None


def _dtype() -> str:
    """Of the model, for both libraries: fp32 where the processor has no bf16 products."""
    return "bfloat16" if fast_bf16() else "float32"


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()[:64]
    return [{"prompt": [{"role": "user", "content": json.loads(line)["question"]}]} for line in lines]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", choices=VARIANTS, required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--part", choices=("steps", "sampling"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2, help="steps not counted, first")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()

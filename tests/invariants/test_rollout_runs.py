"""Runs that sample their own completions: killed and resumed they are the run that was not, however a step is cut."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

import posttrain
from posttrain.errors import OutOfMemoryError
from posttrain.rollout.engines.local import LocalEngine
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

ROWS = [{"prompt": [{"role": "user", "content": f"Say {i}"}], "answer": str(i)} for i in range(7)]
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_steps": 1,
    "max_sampling_rows": 5,
}
CASES: dict[str, dict[str, Any]] = {
    "a round a step": {},
    "a round of two steps, twice": {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 4.8, "entropy_coef_delta": 0.1},
    "kept batches": {"loss_type": "bnpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
}


def few_vowels(completions: list[Any], **_: Any) -> list[float]:
    return [-sum(c in "aeiou" for c in one[0]["content"]) / 4 for one in completions]


def make(folder: Path, adapter: bool = False, eval_dataset: Any = None, **settings: Any) -> posttrain.GRPOTrainer:
    words = chatml_tokenizer()
    return posttrain.GRPOTrainer(
        model=tiny_model("llama", len(words)),
        reward_funcs=few_vowels,
        args=posttrain.GRPOConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=ROWS,
        eval_dataset=eval_dataset,
        processing_class=words,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if adapter else None,
    )


def weights(trainer: posttrain.GRPOTrainer) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def samples(folder: Path) -> list[str]:
    return (folder / "samples.jsonl").read_text().splitlines()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("case", CASES)
def test_resumed_it_is_the_same_run(case: str, adapter: bool, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", adapter, **CASES[case])
    whole.train()
    for step in (1, 3, 5):
        folder = tmp_path / f"resumed at {step}"
        make(folder, adapter, **CASES[case]).train()
        resumed = make(folder, adapter, **CASES[case])
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert weights(resumed) == weights(whole)
        assert samples(folder) == samples(tmp_path / "whole")
        for mine, other in zip(resumed.state.log_history, whole.state.log_history, strict=False):
            for name in ("loss", "grad_norm", "reward", "kl", "completions/mean_length", "num_tokens", "entropy_coef"):
                assert mine.get(name) == other.get(name), name


def half_silent(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A sampler that does not say how likely every second token was, and of one that it never takes it."""
    made = [[5 + (31 * i + 17 * j) % 200 for j in range(3 + i % 4)] for i in range(len(prompts))]
    logps = [[None if j % 2 else -1.5 - j for j in range(len(ids))] for ids in made]
    logps[0][0] = -math.inf
    return {"prompt_ids": [[7, 8, 9]] * len(prompts), "completion_ids": made, "logprobs": logps}


@pytest.mark.parametrize("method", ["GRPO", "RLOO", "PPO"])
def test_what_the_sampler_has_not_said_stays_unsaid(method: str, tmp_path: Path) -> None:
    """In a checkpoint in the middle of a round; and what is logged is a mean over what it has said."""
    batch = {"per_device_train_batch_size": 8}
    several = {"GRPO": {**batch, "steps_per_generation": 2}, "RLOO": {**batch, "steps_per_generation": 2},
               "PPO": {"per_device_train_batch_size": 4, "num_mini_batches": 2, "num_ppo_epochs": 1}}  # fmt: skip
    words, length = chatml_tokenizer(), "response_length" if method == "PPO" else "max_completion_length"

    def made(folder: Path) -> Any:
        settings = {**SETTINGS, **several[method], length: SETTINGS["max_completion_length"], "logging_steps": 3}
        rewarded = {"reward_model" if method == "PPO" else "reward_funcs": few_vowels}
        return getattr(posttrain, f"{method}Trainer")(
            model=tiny_model("llama", len(words)), train_dataset=ROWS, processing_class=words, rollout_func=half_silent,
            args=getattr(posttrain, f"{method}Config")(str(folder), **settings), **rewarded,
        )  # fmt: skip

    whole = made(tmp_path / "whole")
    whole.train()
    resumed = made(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert weights(resumed) == weights(whole)
    name = "sampling/logp_difference"
    logs = [[one[name] for one in trainer.state.log_history if name in one] for trainer in (whole, resumed)]
    assert logs[0] == logs[1]
    assert all(1 < one < 5 for one in logs[0])  # ln 270 is 5.6, and the sampler said 1.5 to 3.5 and more


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2)
    trainer.rollouts.source.state = lambda position: {"rounds": [math.nan]}  # type: ignore[method-assign]
    with pytest.raises(posttrain.CheckpointError, match=r"the state of the run, 'loop', 'source', 'rounds' cannot be"):
        trainer.train()


@pytest.mark.parametrize("case", CASES)
def test_a_step_may_be_cut_as_memory_wants_it(case: str, tmp_path: Path) -> None:
    logs = []
    for budget in (10_000, 40):
        trainer = make(tmp_path / str(budget), token_budget=budget, **{**CASES[case], "save_strategy": "no"})
        trainer.train()
        steps = [one for one in trainer.state.log_history if "loss" in one][:2]  # later ones may sample other tokens
        logs.append([one[name] for one in steps for name in ("loss", "grad_norm")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-6)


def test_a_run_with_other_completions_is_another_run(tmp_path: Path) -> None:
    make(tmp_path, max_steps=2).train()
    with pytest.raises(posttrain.CheckpointError, match="how completions are sampled"):
        make(tmp_path, max_steps=4, temperature=0.7).train(resume_from_checkpoint=True)


CHANGED = {"scale_rewards": "none", "shuffle_dataset": False, "data_seed": 4, "dynamic_sampling": "skip"}


@pytest.mark.parametrize("changed", CHANGED)
def test_a_run_with_other_rounds_is_another_run(changed: str, tmp_path: Path) -> None:
    make(tmp_path, max_steps=2).train()
    with pytest.raises(posttrain.CheckpointError):
        make(tmp_path, max_steps=4, **{changed: CHANGED[changed]}).train(resume_from_checkpoint=True)


def test_trained_again_it_samples_again(tmp_path: Path) -> None:
    """Not what the model said that it was in the run before."""
    settings = {"steps_per_generation": 3, "max_steps": 2, "save_strategy": "no"}
    trainer = make(tmp_path, **settings)
    trainer.train()
    first = samples(tmp_path)
    trainer.train()
    second = samples(tmp_path)
    assert len(first) == len(second) == 24
    assert first != second
    gaps = [one["sampling/logp_difference"] for one in trainer.state.log_history if "loss" in one]
    assert max(gaps) < 1e-4


def test_a_seed_of_the_data_s_own(tmp_path: Path) -> None:
    orders = [make(tmp_path, data_seed=seed, save_strategy="no").rollouts.rounds.prompts(0) for seed in (None, 42, 5)]
    assert list(orders[0]) == list(orders[1]) != list(orders[2])  # 42 is the seed


def test_evaluation_in_training_uses_the_engine_that_is_there(tmp_path: Path) -> None:
    engines = []

    class Watch(TrainerCallback):
        def on_evaluate(self, *_: Any, **__: Any) -> None:
            engines.append(trainer.rollouts.engine)

    trainer = make(
        tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="no", eval_dataset=ROWS[:2]
    )
    trainer.add_callback(Watch())
    trainer.train()
    assert len(engines) == 3
    assert len({id(engine) for engine in engines}) == 1


def test_groups_without_signal_cost_nothing_and_change_nothing(tmp_path: Path) -> None:
    """With every reward the same there is no gradient, and nothing is computed."""
    trainer = make(tmp_path, max_steps=2, save_strategy="no")
    trainer.rewards.functions = {"same": lambda completions, **_: [1.0] * len(completions)}
    seen: list[int] = []
    inner = trainer.rollouts.source.micro_batches
    trainer.rollouts.source.micro_batches = lambda step: seen.append(len(made := inner(step))) or made  # type: ignore
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert seen == [0, 0]
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1.0
    assert trainer.state.log_history[0]["grad_norm"] == 0.0


def test_what_is_logged_of_a_round(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    lines = [json.loads(line) for line in samples(tmp_path)]
    assert len(lines) == 8
    assert {line["step"] for line in lines} == {1}
    assert lines[0]["prompt"] in [row["prompt"] for row in ROWS]
    assert all(line["rewards"] == {"few_vowels": few_vowels([line["completion"]])[0]} for line in lines)
    for group in (0, 1):
        assert sum(line["advantage"] for line in lines if line["group"] == group) == pytest.approx(0, abs=1e-6)
    assert trainer.state.log_history[0]["sampling/logp_difference"] < 1e-5


def by_number(prompts: list[Any], **_: Any) -> list[float]:
    """Completions of even prompts differ, those of odd ones do not."""
    numbers = [int(prompt[0]["content"].split()[1]) for prompt in prompts]
    return [float(i % 4) if number % 2 == 0 else 1.0 for i, number in enumerate(numbers)]


@pytest.mark.parametrize("how", ["none", "skip", "replace"])
def test_groups_without_signal_are_left_out_or_replaced(how: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=6, save_strategy="no", dynamic_sampling=how, max_resampling_rounds=8)
    trainer.rewards.functions = {"by_number": by_number}
    divisors: list[float] = []
    source = trainer.rollouts.source
    inner = source.micro_batches

    def watched(step: int) -> Any:
        made = inner(step)
        divisors.append(made[0].counts["tokens"] if made else 0)
        return made

    source.micro_batches = watched  # type: ignore[method-assign]
    trainer.train()
    lines = [json.loads(line) for line in samples(tmp_path)]
    odd = [line for line in lines if int(line["prompt"][0]["content"].split()[1]) % 2]
    per_step = [[line for line in lines if line["step"] == step] for step in range(1, 7)]
    assert odd
    assert all(len(step) == 8 if how != "replace" else len(step) >= 8 for step in per_step)
    counted = [line for line in lines if how == "none" or int(line["prompt"][0]["content"].split()[1]) % 2 == 0]
    expected = [sum(line["tokens"] for line in counted if line["step"] == step) for step in range(1, 7)]
    assert divisors == [tokens if any(line["advantage"] for line in step) else 0
                        for tokens, step in zip(expected, per_step, strict=True)]  # fmt: skip
    assert all(line["advantage"] == 0 for line in odd)
    if how == "replace":
        assert sum(len(step) for step in per_step) > 48


@pytest.mark.parametrize("loss", ["dapo", "bnpo", "grpo"])
def test_rounds_that_are_left_out_dilute_nothing(loss: str, tmp_path: Path) -> None:
    """Two rounds in a step, one of them without signal: the gradient is that of the other alone."""
    norms = []
    for rounds in (1, 2):
        folder = tmp_path / str(rounds)
        trainer = make(
            folder, max_steps=1, save_strategy="no", dynamic_sampling="skip", loss_type=loss, shuffle_dataset=False,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=2 // rounds,
        )  # fmt: skip
        trainer.rewards.functions = {"by_number": by_number}
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_evaluation_counts_every_group(tmp_path: Path) -> None:
    seen = []
    for how in ("none", "skip", "replace"):
        words = chatml_tokenizer()
        trainer = posttrain.GRPOTrainer(
            model=tiny_model("llama", len(words)), reward_funcs=by_number, train_dataset=ROWS, eval_dataset=ROWS,
            args=posttrain.GRPOConfig(str(tmp_path / how), **{**SETTINGS, "dynamic_sampling": how}),
            processing_class=words,
        )  # fmt: skip
        seen.append(trainer.evaluate()["eval_reward"])
    assert seen[0] == seen[1] == seen[2]


def noisy(completions: list[Any], **_: Any) -> list[float]:
    return [-sum(c in "aeiou" for c in one[0]["content"]) / 4 + random.random() + float(torch.rand(()))
            for one in completions]  # fmt: skip


def test_a_signal_in_the_step_that_begins_a_round(tmp_path: Path) -> None:
    """The round is sampled again, with the random state from before it: rewards may draw numbers."""
    settings = {"steps_per_generation": 2, "num_iterations": 2, "token_budget": 40, "max_steps": 6}

    def with_noise(folder: Path) -> posttrain.GRPOTrainer:
        trainer = make(folder, adapter=True, **settings)
        trainer.rewards.functions = {"noisy": noisy}
        return trainer

    whole = with_noise(tmp_path / "whole")
    whole.train()
    stopped = with_noise(tmp_path / "stopped")
    loop_forward = stopped.run._loop
    asked = iter(range(10_000))

    def watched(*given: Any) -> Any:
        loop = loop_forward(*given)
        inner = loop.forward

        def forward(batch: Any, needs: Any) -> Any:
            if loop.position == 4 and next(asked) == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(batch, needs)

        loop.forward = forward
        return loop

    stopped.run._loop = watched  # type: ignore[method-assign]
    with pytest.raises(posttrain.Interrupted):
        stopped.train()
    resumed = with_noise(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert weights(resumed) == weights(whole)
    assert samples(tmp_path / "stopped") == samples(tmp_path / "whole")


def test_a_reward_that_fails_in_evaluation_loses_nothing(tmp_path: Path) -> None:
    words, calls = chatml_tokenizer(), iter(range(100))

    def late(completions: list[Any], **_: Any) -> list[float]:
        if next(calls) == 3:
            raise RuntimeError("no more")
        return [float(i) for i in range(len(completions))]

    args = {**SETTINGS, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no", "reward_check": False}
    trainer = posttrain.GRPOTrainer(
        model=tiny_model("llama", len(words)), reward_funcs=late, train_dataset=ROWS, eval_dataset=ROWS[:2],
        args=posttrain.GRPOConfig(str(tmp_path), **args), processing_class=words,
    )  # fmt: skip
    with pytest.raises(posttrain.UserError, match="'late' failed") as raised:
        trainer.train()
    assert "step 3 is saved" in str(raised.value.__notes__)
    assert (tmp_path / "checkpoint-3" / "MANIFEST.json").is_file()


def out_of_memory_above(rows: int, at: int = 1) -> tuple[Callable[..., Any], list[int]]:
    """In the place of `LocalEngine.generate`: from call `at` on, no more than `rows` fit at once; what was tried."""
    generate, tried = LocalEngine.generate, list[int]()

    def runs_out(engine: LocalEngine, requests: Any, *given: Any) -> Any:
        tried.append(min(engine.max_rows, sum(one.count for one in requests)))
        made = generate(engine, requests, *given)
        if tried[-1] > rows and len(tried) >= at:  # with everything said, and told
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.10 GiB")
        return made

    return runs_out, tried


@pytest.mark.parametrize("at", [1, 3])
def test_a_completion_that_memory_does_not_suffice_for(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named, with a way out, and nothing lost."""
    with monkeypatch.context() as patches:
        trainer = make(tmp_path / "short", save_strategy="no")
        patches.setattr(LocalEngine, "generate", out_of_memory_above(0, at)[0])
        with pytest.raises(OutOfMemoryError) as caught:
            trainer.train()
    assert caught.value.message.startswith("sampling: wanted 2.1 GiB, ")
    assert "a single completion of up to 8 tokens, after a prompt of up to " in caught.value.message
    assert "max_completion_length" in str(caught.value.hint)
    assert caught.value.exit_code == 8
    saved = tmp_path / "short" / "checkpoint-2"
    assert getattr(caught.value, "__notes__", []) == ([f"Everything up to step 2 is saved: {saved}"] if at > 1 else [])
    if at > 1:
        whole, resumed = make(tmp_path / "whole"), make(tmp_path / "short")
        whole.train()
        resumed.train(resume_from_checkpoint=True)
        assert weights(resumed) == weights(whole)


def test_fewer_completions_at_once_where_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same completions come out, and the run stays with what fits."""
    whole, short = make(tmp_path / "whole"), make(tmp_path / "short")
    whole.train()
    runs_out, tried = out_of_memory_above(2)
    monkeypatch.setattr(LocalEngine, "generate", runs_out)
    short.train()
    assert tried[:2] == [5, 2]
    assert set(tried[1:]) == {2}
    (warned,) = [message for message in caplog.messages if message.startswith("E-OOM")]
    assert warned.startswith("E-OOM-0003 sampling: wanted 2.1 GiB, ")
    assert warned.endswith(" free. Retried with 5 → 2 completions at once (same completions). Run continues.")
    said, expected = (
        [json.loads(line)["completion"] for line in samples(tmp_path / name)] for name in ("short", "whole")
    )
    assert said == expected
    learned = weights(short)
    tried.clear()
    resumed = make(tmp_path / "short")
    resumed.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-3"))
    assert set(tried) == {2}
    assert weights(resumed) == learned


@pytest.mark.parametrize("spoilt", ["weights", "outputs"])
def test_a_model_that_says_no_numbers_is_named(spoilt: str, tmp_path: Path) -> None:
    """Weights that are no numbers are not saved over those that were."""
    trainer = make(tmp_path, save_steps=2, max_steps=6)

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step == 3 and spoilt == "weights":
                model.get_output_embeddings().weight.data[3] = torch.nan
            elif state.global_step == 3:  # finite, and their products are not
                model.get_output_embeddings().weight.data[:] = 3e38

    trainer.add_callback(Spoil)
    with pytest.raises(posttrain.NonFiniteError, match="sampling: what the model says") as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    if spoilt == "weights":
        assert note == f"The weights of step 3 are not finite, and not saved. Last checkpoint: {tmp_path}/checkpoint-2"
    else:
        assert note == f"Everything up to step 3 is saved: {tmp_path}/checkpoint-3"


def test_completions_are_printed_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"log_completions": True, "log_unique_prompts": True, "num_completions_to_print": 1}
    make(tmp_path / "some", max_steps=2, save_strategy="no", **shown).train()
    out = capsys.readouterr().out
    assert out.count("  completion  ") == 2
    assert "step 1  rewards {'few_vowels': " in out
    make(tmp_path / "all", max_steps=1, save_strategy="no", log_completions=True).train()
    assert capsys.readouterr().out.count("  completion  ") == 8
    make(tmp_path / "none", max_steps=1, save_strategy="no").train()
    assert "  completion  " not in capsys.readouterr().out

"""Settings of GRPO and RLOO: TRL's are all known, what is not honoured is refused by name, sizes must fit."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain
from posttrain.errors import ConfigError, UserError
from posttrain.trainers.opening import TRAINER_ARGUMENTS
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

trl = pytest.importorskip("trl")
GIVEN: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_every_field_of_theirs_is_known(method: str) -> None:
    theirs = {field.name for field in dataclasses.fields(getattr(trl, f"{method}Config"))}
    config = getattr(posttrain, f"{method}Config")
    assert theirs <= {field.name for field in dataclasses.fields(config)} | config.SPELLINGS.keys()


def test_fields_of_other_days_and_of_unsloth(tmp_path: Path) -> None:
    older = {"use_transformers_paged": True, "vllm_importance_sampling_cap": 2.0, "use_liger_loss": True}
    config = posttrain.GRPOConfig(str(tmp_path), unsloth_num_chunks=-1, vllm_sampling_params=None, **older, **GIVEN)
    assert config.vllm_importance_sampling_clip_max == 2.0
    with pytest.raises(ConfigError, match="vllm_sampling_params=3 is not honoured: set temperature"):
        posttrain.GRPOConfig(str(tmp_path), vllm_sampling_params=3, **GIVEN)
    with pytest.raises(ConfigError, match="GRPOConfig has no argument 'num_generation'\n  = did you mean"):
        posttrain.GRPOConfig(str(tmp_path), num_generation=3, **GIVEN)


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_defaults_are_theirs(method: str, tmp_path: Path) -> None:
    ours = getattr(posttrain, f"{method}Config")(str(tmp_path), **GIVEN)
    theirs = getattr(trl, f"{method}Config")(str(tmp_path), **GIVEN)
    ignored = {"bf16", "gradient_checkpointing", "activation_checkpointing", "logging_dir", "run_name", "report_to"}
    ignored |= {"accelerator_config"}
    different = {
        field.name: (getattr(ours, field.name), getattr(theirs, field.name))
        for field in dataclasses.fields(theirs)
        if hasattr(ours, field.name) and field.name not in ignored
        and getattr(ours, field.name) != getattr(theirs, field.name)
    }  # fmt: skip
    assert set(different) <= {"epsilon_high", "remove_unused_columns"}, different  # ours says what None means


SERVER: dict[str, Any] = {"use_vllm": True, "vllm_mode": "server"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_length": 512}, "max_length=512 is not honoured: set max_prompt_length"),
    ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end' is not honoured"),
    ({"dataset_streaming": True}, "dataset_streaming=True is not honoured"),
    ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True is not honoured"),
    ({"use_vllm": True, "vllm_mode": "server", "vllm_gpu_memory_utilization": 0.5}, "give it to `vllm serve`"),
    ({"generation_kwargs": {"stop": [""]}}, "must be texts that are not empty"),
    ({"generation_kwargs": "stop=e"}, "generation_kwargs='stop=e' must be a mapping"),
    ({"steps_per_generation": 0}, "steps_per_generation=0 must be at least 1"),
    ({"generation_batch_size": 0}, "generation_batch_size=0 must be a multiple"),
    ({"generation_kwargs": {"stop": [3]}}, "must be texts that are not empty"),
    ({"generation_kwargs": {"max_new_tokens": 900}}, "set max_completion_length alone"),
    ({"generation_kwargs": {"top_k": "a"}}, "top_k='a' must be a whole number"),
    ({"generation_kwargs": {"seed": -1}}, "seed=-1 must be at least 0"),
    ({"num_generations_eval": 0}, "num_generations_eval=0 must be at least 1"),
    ({"entropy_target": 0.5}, "entropy_target=0.5 is heeded with use_adaptive_entropy=True only"),
    ({"use_adaptive_entropy": True, "entropy_target": 0.0}, "entropy_target=0.0 must be above 0"),
    ({"use_adaptive_entropy": True, "entropy_coef_min": 2.0}, "entropy_coef_min=2.0 is above entropy_coef_max=1.0"),
    ({"log_completions_hub_repo": "a/b"}, "samples.jsonl"),
    ({"generation_kwargs": {"num_beams": 4}}, r"generation_kwargs\['num_beams'\] is not honoured"),
    ({"generation_kwargs": {"temperature": 0.5}}, "set temperature alone"),
    ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
    ({"num_generations": 1}, "num_generations=1 must be at least 2"),
    ({"num_generations": 3}, "no whole number of groups of num_generations=3"),
    ({"generation_batch_size": 12}, "must be a multiple of per_device_train_batch_size=8"),
    ({"generation_batch_size": 16, "steps_per_generation": 3}, "contradict each other"),
    ({"sync_ref_model": True}, "moves a reference that beta=0 does not ask"),
    ({"beta": -0.1}, "beta=-0.1 must be at least 0"),
    ({"loss_type": "ppo"}, "loss_type='ppo' is unknown"),
    ({"delta": 0.5}, r"delta=0.5 must be above 1 \+ epsilon"),
    ({"delta": 2.0, "loss_type": "cispo", "epsilon_high": 5.0}, "delta=2.0 is not honoured with loss_type='cispo'"),
    ({"loss_type": "sapo", "sapo_temperature_neg": -1.0}, "sapo_temperature_neg=-1.0 must be above 0"),
    ({"scale_rewards": ["group"]}, "scale_rewards"),
    ({"top_p": 0.0}, "top_p=0.0 must be"),
    ({"dynamic_sampling": "always"}, "dynamic_sampling='always' is unknown"),
    ({"reward_timeout": 0}, "reward_timeout=0 must be above 0 seconds"),
    ({"rollout_timeout": -1.0}, "rollout_timeout=-1.0 must be above 0 seconds"),
    ({"rollout_timeout": 1e10}, "must be above 0 seconds, and 1e"),
    ({"vllm_server_timeout": None}, "vllm_server_timeout=None must be a number"),
    ({"vllm_server_timeout": 0}, "vllm_server_timeout=0 must be above 0"),
    ({"vllm_server_timeout": -1}, "vllm_server_timeout=-1 must be above 0"),
    (
        {**SERVER, "vllm_server_host": "[::1"},
        r"'http://\[::1:8000' \(vllm_server_host and vllm_server_port\) is no add",
    ),
    ({**SERVER, "vllm_server_host": "::1"}, "'http://::1:8000' .* is no address"),
    ({**SERVER, "vllm_server_port": 99999}, "'http://0.0.0.0:99999' .* is no address"),
    ({**SERVER, "vllm_server_base_url": "localhost:8000"}, r"'localhost:8000' \(vllm_server_base_url\) is no address"),
    ({**SERVER, "vllm_server_base_url": "http://"}, r"'http://' \(vllm_server_base_url\) is no address"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_means_nothing_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        posttrain.GRPOConfig(str(tmp_path), **GIVEN, **settings)


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://0.0.0.0:8000"),
        ({"vllm_server_host": "[::1]", "vllm_server_port": 1}, "http://[::1]:1"),
        ({"vllm_server_base_url": "https://a.b/c"}, "https://a.b/c"),
    ],
)
def test_the_address_of_a_server(settings: dict[str, Any], url: str, tmp_path: Path) -> None:
    assert posttrain.GRPOConfig(str(tmp_path), **GIVEN, **SERVER, **settings).vllm_url() == url


def test_rloo_compares_in_evaluation_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_generations_eval=1 must be at least 2"):
        posttrain.RLOOConfig(str(tmp_path), num_generations_eval=1, **GIVEN)


@pytest.mark.parametrize("clip", [5, ("a", "b"), (1.0,), (2.0, 1.0)], ids=str)
def test_what_is_no_range(clip: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward_clip_range=.* must be two numbers"):
        posttrain.RLOOConfig(str(tmp_path), reward_clip_range=clip, **GIVEN)


def test_ppo_is_not_paid_for_leaving(tmp_path: Path) -> None:
    """Adaptive control over a horizon shorter than a round would turn the coefficient negative."""
    sizes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 8}
    with pytest.raises(ConfigError, match="horizon=20 is too short for rounds of 128 completions"):
        posttrain.PPOConfig(str(tmp_path), adap_kl_ctrl=True, horizon=20.0, **sizes, **GIVEN)
    with pytest.raises(ConfigError, match=r"horizon=-3\.0 must"):
        posttrain.PPOConfig(str(tmp_path), adap_kl_ctrl=True, horizon=-3.0, **GIVEN)


def test_two_spellings_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_iterations=3 means num_ppo_epochs=3, and num_ppo_epochs=2 contradicts"):
        posttrain.PPOConfig(str(tmp_path), num_ppo_epochs=2, num_iterations=3, **GIVEN)
    assert posttrain.PPOConfig(str(tmp_path), num_ppo_epochs=3, num_iterations=3, **GIVEN).num_ppo_epochs == 3
    for ratio, steps, meant in ((0.1, 5, 5), (0.1, 0, 0.1), (None, 5, 5)):  # as transformers has always had it
        assert (
            posttrain.GRPOConfig(str(tmp_path), warmup_ratio=ratio, warmup_steps=steps, **GIVEN).warmup_steps == meant
        )


@pytest.mark.parametrize(
    ("given", "name", "meant"),
    [
        ({"evaluation_strategy": None, "eval_strategy": "no"}, "eval_strategy", "no"),
        ({"evaluation_strategy": "no", "eval_strategy": None}, "eval_strategy", "no"),
        ({"per_gpu_train_batch_size": None, "per_device_train_batch_size": 16}, "per_device_train_batch_size", 16),
        ({"no_cuda": False, "use_cpu": True}, "use_cpu", True),
    ],
    ids=str,
)
def test_a_spelling_at_its_default_says_nothing(given: dict[str, Any], name: str, meant: Any, tmp_path: Path) -> None:
    """As configs are written out by versions that know both."""
    assert getattr(posttrain.GRPOConfig(str(tmp_path), **{**GIVEN, **given}), name) == meant


def test_the_length_of_old_trl_at_its_default(tmp_path: Path) -> None:
    assert posttrain.SFTConfig(str(tmp_path), max_seq_length=None, max_length=512, use_cpu=True).max_length == 512
    with pytest.raises(ConfigError, match="max_seq_length=256 means max_length=256, and max_length=None contradicts"):
        posttrain.SFTConfig(str(tmp_path), max_seq_length=256, max_length=None, use_cpu=True)


def test_a_stream_of_prompts_has_no_end(tmp_path: Path) -> None:
    from datasets import IterableDataset

    def rows() -> Any:
        while True:
            yield {"prompt": "Say 1"}

    with pytest.raises(ConfigError, match="the train prompts have no length, so they may have no end"):
        make(tmp_path, rows=IterableDataset.from_generator(rows))
    with pytest.raises(ConfigError, match="have no length"):
        make(tmp_path, rows=rows())


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


@pytest.mark.parametrize(
    ("tools", "message"),
    [({"name": "add"}, "not a list"), ("[{", "tools.* is not valid JSON"), ([3], r"tools\[0\].* not a tool")],
    ids=str,
)
def test_tools_that_are_none(tools: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(posttrain.DataError, match=message):
        make(tmp_path, rows=[{"prompt": [{"role": "user", "content": "a"}], "tools": tools}])


def test_tools_that_the_template_leaves_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="posttrain"):
        trainer = make(tmp_path, rows=[{"prompt": [{"role": "user", "content": "a"}], "tools": [TOOL]}])
    assert trainer.data_reports["train"].tools_left_out.count == 1
    assert "have tools that the chat template leaves out" in caplog.text


def make(folder: Path, rows: Any = None, **given: Any) -> posttrain.GRPOTrainer:
    words = chatml_tokenizer()
    args = given.pop("args", None) or posttrain.GRPOConfig(
        str(folder), **GIVEN, num_generations=2, per_device_train_batch_size=2, max_completion_length=8, max_steps=1,
        save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    return posttrain.GRPOTrainer(**{
        "model": tiny_model("llama", len(words)), "reward_funcs": lambda completions, **_: [1.0] * len(completions),
        "args": args, "train_dataset": [{"prompt": "Say 1"}] if rows is None else rows, "processing_class": words,
        **given,
    })  # fmt: skip


GIVEN_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"reward_funcs": None}, "reward_funcs is needed"),
    ({"reward_funcs": [3]}, "reward_funcs has 3"),
    ({"reward_funcs": torch.nn.Linear(2, 1)}, "reward_funcs has Linear, which is no reward model"),
    ({"reward_funcs": "posttrain.nothing:here"}, "cannot be imported"),
    ({"train_dataset": None}, "train_dataset is required"),
    ({"tools": [print]}, "tools is not honoured yet"),
    ({"environment_factory": print}, "environment_factory is not honoured yet"),
    ({"rows": [{"question": "a"}]}, 'has no `prompt`[^=]*\n.*\n.*dataset_columns={"question": "prompt"}'),
    ({"rows": [{"prompt": " "}]}, "is empty"),
    ({"rows": [{"prompt": [{"role": "assistant", "content": "a"}]}]}, "ends with a turn of the assistant"),
    ({"rows": [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}]}, "text and prompts that are messages"),
]


@pytest.mark.parametrize(("given", "message"), GIVEN_WRONG)
def test_what_is_given_wrong_is_named(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, posttrain.DataError), match=message):
        make(tmp_path, **given)


def test_what_means_nothing_without_vllm_is_taken(tmp_path: Path) -> None:
    args = posttrain.GRPOConfig(
        str(tmp_path), **GIVEN, use_vllm=False, vllm_gpu_memory_utilization=0.6, vllm_server_port=1,
        generation_kwargs={"do_sample": True},
    )  # fmt: skip
    assert args.sampling().temperature == 1.0


def no_reward(completions: Any, **_: Any) -> list[float]:
    return [0.0] * len(completions)


UNKNOWN: list[tuple[str, str, str | None]] = [
    ("GRPO", "label_smoothing", None),
    ("PPO", "loss_type", None),
    ("PPO", "value_modell", "did you mean 'value_model'?"),
    ("PPO", "reward_processing_class", "did you mean 'reward_processing_classes'?"),
    ("GRPO", "reward_func", "did you mean 'reward_funcs'?"),
    ("PPO", "num_mini_batches", "it is a setting: args=PPOConfig(num_mini_batches=...)"),
]


@pytest.mark.parametrize(("method", "name", "hint"), UNKNOWN)
def test_what_a_trainer_does_not_know_is_never_suggested(method: str, name: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(posttrain, f"{method}Trainer")(model=tiny_model("llama"), **{name: 1})
    assert caught.value.message == f"{method}Trainer has no argument {name!r}"
    assert caught.value.hint == hint


@pytest.mark.parametrize("method", ["SFT", "DPO", "KTO", "ORPO", "Reward", "GRPO", "RLOO", "PPO"])
def test_every_argument_of_a_trainer_may_be_meant(method: str) -> None:
    refused = {
        "data_collator", "compute_loss_func", "model_init", "preprocess_logits_for_metrics", "quantization_config",
        "tools", "environment_factory",
    }  # fmt: skip
    arguments = set(inspect.signature(getattr(posttrain, f"{method}Trainer")).parameters) - {"older", *refused}
    assert arguments <= set(TRAINER_ARGUMENTS)


def test_a_setting_given_to_the_trainer_has_the_name_it_has_in_its_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = chatml_tokenizer()
    given: dict[str, Any] = {
        "processing_class": words,
        "reward_model": no_reward,
        "train_dataset": [{"prompt": "a"}] * 8,
    }
    made = posttrain.PPOTrainer(
        posttrain.PPOConfig(str(tmp_path), **GIVEN), model=tiny_model("llama", len(words)), beta=0.1, **given
    )
    assert (made.args.kl_coef, made.args.beta) == (0.1, 0.1)
    assert "read beta as args.kl_coef=0.1" in caplog.text


def given_by(folder: Path, changes: dict[Any, Any]) -> posttrain.GRPOTrainer:
    def rollout(prompts: list[Any], _: Any) -> dict[str, Any]:
        made = {"prompt_ids": [[5, 6]] * len(prompts), "completion_ids": [[7, 8, 9]] * len(prompts)}
        return {**made, "logprobs": [[-1.0] * 3] * len(prompts)} | changes

    rewards = iter(range(100))
    return make(folder, rollout_func=rollout,
                reward_funcs=lambda completions, **_: [float(next(rewards)) for _ in completions])  # fmt: skip


MISTAKES: list[tuple[dict[Any, Any], str]] = [
    ({"completion_ids": [[7, 99999]] * 2, "logprobs": [[-1.0] * 2] * 2},
     r"gave token 99999 in completion_ids for train\[0\]; the model knows 0 to \d+"),
    ({"completion_ids": [[7, -1]] * 2, "logprobs": [[-1.0] * 2] * 2}, "gave token -1 in completion_ids"),
    ({"prompt_ids": [[], []]}, "gave empty prompt_ids"),
    ({"completion_ids": [[], []], "logprobs": [[], []]}, "gave empty completion_ids"),
    ({"logprobs": [[[-1.0]] * 3] * 2}, "gave logprobs that are no list of numbers"),
    ({3: [1, 2]}, "rollout_func gave the key 3, which is no text"),
    ({"completion_ids": [[7, 8, 9]]}, "gave 1 of completion_ids for 2 completions"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_of_a_rollout_func_are_named(changes: dict[Any, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        given_by(tmp_path, changes).train()


def test_completions_for_which_the_model_has_no_places(tmp_path: Path) -> None:
    def rollout(prompts: list[Any], _: Any) -> dict[str, Any]:
        return {"prompt_ids": [[5, 6]] * 2, "completion_ids": [[7] * 510, [7] * longest], "logprobs": None}

    def trained(family: str) -> None:
        model = tiny_model(family, len(chatml_tokenizer()))
        make(tmp_path, model=model, rollout_func=rollout,
             reward_funcs=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids]).train()  # fmt: skip

    longest = 510
    trained("gpt2")
    longest = 511
    trained("llama")
    with pytest.raises(ConfigError, match=r"rollout_func gave 2 prompt_ids and 511 completion_ids for train\[0\]; the "
                       "model has 512 places for them together"):  # fmt: skip
        trained("gpt2")


def test_a_rollout_func_that_fails_is_named(tmp_path: Path) -> None:
    trainer = make(tmp_path, rollout_func=lambda prompts: None)
    with pytest.raises(UserError, match="rollout_func failed: TypeError"):
        trainer.train()


def test_log_probabilities_may_be_missing(tmp_path: Path) -> None:
    trainer = given_by(tmp_path, {"logprobs": [[None, -1.0, None]] * 2})
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_column_called_text_reaches_the_rewards(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(completions: list[Any], text: list[str], **_: Any) -> list[float]:
        seen.extend(text)
        return [float(i) for i in range(len(completions))]

    args = posttrain.GRPOConfig(
        str(tmp_path), **GIVEN, num_generations=2, per_device_train_batch_size=2, max_completion_length=30, max_steps=1,
        generation_kwargs={"stop": ["a", "e", "<|im_start|>"]}, reward_check=False,
    )  # fmt: skip
    trainer = make(tmp_path, rows=[{"prompt": "Say 1", "text": "DATA"}], args=args, reward_funcs=reward)
    trainer.train()
    assert seen == ["DATA", "DATA"]


def test_long_prompts_lose_their_beginning(tmp_path: Path) -> None:
    args = posttrain.GRPOConfig(str(tmp_path), **GIVEN, num_generations=2, per_device_train_batch_size=2,
                                max_prompt_length=3)  # fmt: skip
    trainer = make(tmp_path, rows=[{"prompt": "one two three four five six"}], args=args)
    whole = chatml_tokenizer()("one two three four five six")["input_ids"]
    assert trainer.rollouts.prompts[0].ids.tolist() == whole[-3:]
    assert trainer.data_reports["train"].truncated.count == 1


def test_tokenizer_and_old_spellings_are_read(tmp_path: Path) -> None:
    words = chatml_tokenizer()
    trainer = posttrain.GRPOTrainer(
        model=tiny_model("llama", len(words)), tokenizer=words, train_dataset=[{"prompt": "Say 1"}],
        reward_funcs=[lambda completions, **_: [1.0] * len(completions)],
        args=posttrain.GRPOConfig(str(tmp_path), **GIVEN, num_generations=4, per_device_train_batch_size=4,
                                  evaluation_strategy="no"),
    )  # fmt: skip
    assert trainer.processing_class is words
    assert trainer.args.generation_batch_size == 4


def test_two_rewards_of_one_name_are_told_apart(tmp_path: Path) -> None:
    trainer = make(tmp_path, reward_funcs=[lambda completions, **_: [1.0] * len(completions)] * 2)
    assert list(trainer.rewards.functions) == ["<lambda>", "<lambda>_2"]

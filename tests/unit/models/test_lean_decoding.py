"""Lean decoding says what a whole forward says, for the models that it takes, and takes no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.fx.experimental.proxy_tensor import make_fx

from posttrain import native
from posttrain.models import adapters
from posttrain.models.decoding import Memory
from posttrain.models.forward import Policy, open_policy
from posttrain.models.lean_decoding import LeanRows, forward, lean_weights
from posttrain.models.lean_weights import LeanWeights
from posttrain.rollout.engines import Request
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.sampling import Sampling
from tests.tiny_models import FAMILIES, tiny_model

TAKEN = {"llama", "qwen2", "qwen3", "mistral"}
PROMPTS = [[5, 9, 13, 2, 40, 7], [21, 3, 8]]


def opened(family: str, dtype: torch.dtype = torch.float32, adapter: bool = False) -> Policy:
    model: Any = tiny_model(family).to(dtype).eval()
    if family == "mistral":
        model.config.sliding_window = 64
    if adapter:
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapters.specialise(model)
    return open_policy(model)


def rows_of(policy: Policy, capacity: int = 3, weights: LeanWeights | None = None) -> LeanRows:
    weights = weights or lean_weights(policy)
    assert weights is not None
    memory, lengths = Memory(room=4), [len(prompt) for prompt in PROMPTS]
    positions = torch.cat([torch.arange(n) for n in lengths])
    forward(policy, [*PROMPTS[0], *PROMPTS[1]], positions, memory.reading(lengths, [0, 1]))
    return LeanRows(weights, memory, capacity)


def whole(policy: Policy, tokens: list[int]) -> torch.Tensor:
    """The last hidden state after `tokens`."""
    return policy.base.base_model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_which_families_it_takes(family: str) -> None:
    assert (lean_weights(opened(family)) is not None) == (family in TAKEN)


@torch.no_grad()
def test_a_window_is_said() -> None:
    weights = lean_weights(opened("mistral"))
    assert weights is not None
    assert weights.reach == 64
    narrow = tiny_model("mistral").eval()  # of 5 tokens
    assert lean_weights(open_policy(narrow)) is None


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("family", sorted(TAKEN))
@torch.no_grad()
def test_as_the_whole_sequence(family: str, adapter: bool) -> None:
    policy = opened(family, adapter=adapter)
    rows = rows_of(policy)
    rows.admit(0, 2)
    rows.admit(1, 1)
    said = [[4, 17], [50, 2], [11, 12]]
    for step in range(2):
        hidden = rows.step([tokens[step] for tokens in said])
        for row, prompt in enumerate((0, 0, 1)):
            tokens = PROMPTS[prompt] + said[row][: step + 1]
            torch.testing.assert_close(hidden[row], whole(policy, tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_leave_and_others_take_their_places() -> None:
    policy = opened("llama")
    rows = rows_of(policy, capacity=2)
    rows.admit(0, 2)
    rows.step([4, 50])
    rows.keep([1])
    rows.make_room(2)
    rows.admit(1, 2)
    hidden = rows.step([60, 11, 12])
    for row, tokens in enumerate((PROMPTS[0] + [50, 60], PROMPTS[1] + [11], PROMPTS[1] + [12])):
        torch.testing.assert_close(hidden[row], whole(policy, tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_buffers_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.models.lean_decoding.BLOCK", 4)
    policy = opened("qwen3")
    rows = rows_of(policy)
    rows.admit(1, 1)
    tokens = list(PROMPTS[1])
    for token in range(30, 40):
        hidden = rows.step([token])
        tokens.append(token)
        torch.testing.assert_close(hidden[0], whole(policy, tokens), rtol=1e-4, atol=1e-5)


class Traced:
    """A recording as CUDA makes them: the first call is written down, operation by operation, with the very tensors
    that it found; what is not an input is the same for ever."""

    made = 0

    def __init__(self) -> None:
        self._replay: Any = None

    def run(self, function: Any, *inputs: torch.Tensor) -> torch.Tensor:
        if self._replay is None:
            Traced.made += 1
            self._replay = make_fx(function)(*inputs)
        return self._replay(*inputs)


@torch.no_grad()
@native.without_kernels()
@pytest.mark.parametrize("family", sorted(TAKEN))
def test_a_step_can_be_recorded_and_replayed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in it depends on anything but its inputs and buffers that stay, rows that go, come and grow included.
    What is recorded are torch's operations, on CUDA; a trace would not see the kernels."""
    monkeypatch.setattr("posttrain.models.lean_decoding.BLOCK", 16)
    policy = opened(family, adapter=True)
    weights, before = lean_weights(policy), Traced.made
    monkeypatch.setattr("posttrain.models.lean_decoding.Recording", Traced)
    rows = rows_of(policy, weights=weights)
    rows.admit(0, 2)
    said = [[4, 50], [17, 2], [9, 9], [61, 3]]
    for step in said:
        rows.step(step)
    rows.keep([1])
    rows.make_room(2)
    rows.admit(1, 2)
    tokens = [PROMPTS[0] + [step[1] for step in said], PROMPTS[1], PROMPTS[1]]
    for step in range(12):
        more = [(7 * step + 20 * row) % 60 for row in range(3)]
        hidden = rows.step(more)
        tokens = [[*row, token] for row, token in zip(tokens, more, strict=True)]
        for row, whole_row in enumerate(tokens):
            torch.testing.assert_close(hidden[row], whole(policy, whole_row), rtol=1e-4, atol=1e-5)
    assert Traced.made - before == 3  # at 16 places, with other rows, and at 32 places


@torch.no_grad()
def test_what_is_trained_is_taken_anew() -> None:
    policy = opened("llama", adapter=True)
    weights = rows_of(policy).weights
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.mul_(-1.5)
    weights.take(2)
    rows = rows_of(policy, weights=weights)
    rows.admit(0, 1)
    torch.testing.assert_close(rows.step([4])[0], whole(policy, [*PROMPTS[0], 4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", True), ("llama", False), ("gemma3", True), ("gpt2", True)],
    ids=["tied", "untied", "own forward", "own forward, other names"],
)
@torch.no_grad()
def test_tokens_that_are_trained(family: str, tied: bool) -> None:
    """The head that says them is as trained as the embeddings, whoever asks for it and whenever."""
    torch.manual_seed(0)
    model: Any = tiny_model(family).eval()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    tokens = [4, 40] if tied else {"embed_tokens": [4, 40], "lm_head": [4, 40]}
    lora = LoraConfig(r=3, target_modules="all-linear", trainable_token_indices=tokens)
    model = get_peft_model(model, lora)
    adapters.specialise(model)
    policy = open_policy(model)
    engine = LocalEngine(policy, [], max_rows=2)
    asked = [Request(prompt, number, 2) for number, prompt in enumerate(PROMPTS)]
    for _ in range(2):
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
        engine.update_weights()
        for request, made in zip(asked, engine.generate(asked, Sampling(max_tokens=4)), strict=True):
            for one in made:
                ids = torch.tensor([[*request.prompt_ids, *one.ids.tolist()]])
                logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(one.logps), logp[-len(one.ids) :], rtol=1e-4, atol=1e-5)
    assert (engine.lean() is not None) == (family in TAKEN)


@torch.no_grad()
def test_in_bf16_it_is_as_near_as_the_model_s_own_forward() -> None:
    policy, exact = opened("llama", torch.bfloat16, adapter=True), opened("llama", adapter=True)
    exact.model.load_state_dict(policy.model.state_dict())
    rows = rows_of(policy)
    rows.admit(0, 1)
    tokens = [*PROMPTS[0], 4]
    hidden, expected = rows.step([4])[0].float(), whole(exact, tokens)
    own = whole(policy, tokens).float()
    assert (hidden - expected).abs().max() <= 2 * (own - expected).abs().max() + 0.02

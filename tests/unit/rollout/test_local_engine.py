"""Sampling in the process: what is said equals what a whole forward says of it, whoever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posttrain.errors import ConfigError, NonFiniteError, Stopped
from posttrain.models.forward import Policy, open_policy
from posttrain.rollout.engines import Completion, Request
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.sampling import Sampling
from tests.tiny_models import FAMILIES, tiny_model

PROMPTS = [[5, 9, 13, 2, 40, 7], [21, 3, 8], [50, 60, 70, 80]]
REQUESTS = [Request(prompt, key, 3) for key, prompt in enumerate(PROMPTS)]
ENDS = (11, 30, 31, 32, 33, 34, 35, 36, 37, 38)


def engine(family: str = "llama", max_rows: int = 64, ends: tuple[int, ...] = ENDS) -> LocalEngine:
    return LocalEngine(open_policy(tiny_model(family).eval()), ends, decode=lambda ids: "".join(map(letter, ids)),
                       max_rows=max_rows)  # fmt: skip


def letter(token: int) -> str:
    return chr(ord("a") + token % 26)


def said_by_the_whole(policy: Policy, prompt: list[int], ids: np.ndarray, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = policy.base(input_ids=torch.tensor([[*prompt, *ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def same(one: list[list[Completion]], other: list[list[Completion]]) -> bool:
    return all(
        np.array_equal(a.ids, b.ids) and np.allclose(a.logps, b.logps, atol=1e-5)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_a_whole_forward(family: str) -> None:
    sampler = engine(family)
    made = sampler.generate(REQUESTS, Sampling(max_tokens=9, temperature=0.8, top_k=40))
    for prompt, completions in zip(PROMPTS, made, strict=True):
        assert len(completions) == 3
        for one in completions:
            expected = said_by_the_whole(sampler.policy, prompt, one.ids, 0.8)
            torch.testing.assert_close(torch.tensor(one.logps), expected, rtol=1e-4, atol=1e-5)


def test_who_else_is_in_the_batch_does_not_matter() -> None:
    sampling = Sampling(max_tokens=9, seed=3)
    together = engine().generate(REQUESTS, sampling)
    assert same(together, engine(max_rows=2).generate(REQUESTS, sampling))
    assert same(together, [engine().generate([request], sampling)[0] for request in REQUESTS])
    assert not same(together, engine().generate(REQUESTS, Sampling(max_tokens=9, seed=4)))
    assert len({tuple(one.ids) for one in together[0]}) == 3


def test_completions_end_at_an_end_token_or_for_want_of_room() -> None:
    made = [one for group in engine().generate(REQUESTS, Sampling(max_tokens=9)) for one in group]
    assert {one.is_ended for one in made} == {True, False}
    for one in made:
        assert one.is_ended == (one.ids[-1] in ENDS)
        assert one.is_ended or len(one.ids) == 9
        assert not set(one.ids[:-1]) & set(ENDS)


@pytest.mark.parametrize("lean", [True, False])
def test_completions_end_where_learned_positions_do(lean: bool, caplog: pytest.LogCaptureFixture) -> None:
    sampler = engine("gpt2", ends=())
    sampler._is_tried = not lean
    requests = [Request([5] * 508, 0, 2), Request([5], 1)]
    long, short = sampler.generate(requests, Sampling(max_tokens=9))
    assert [(len(one.ids), one.is_ended) for one in (*long, *short)] == [(4, False), (4, False), (9, False)]
    assert caplog.messages[-1] == (
        "sampling 2 of 3 completions end early: the model has places for 512 tokens, prompts included"
    )
    assert list(sampler.stream(requests[0], Sampling(max_tokens=9))) == long[0].ids.tolist()
    unhurried = sampler.generate(requests[:1], Sampling(max_tokens=4))[0]
    assert [one.ids.tolist() for one in unhurried] == [one.ids.tolist() for one in long]
    assert sum("end early" in one for one in caplog.messages) == 1


@pytest.mark.parametrize(
    ("family", "prompt", "message"),
    [
        ("gpt2", [5] * 512, "a prompt has 512 tokens, and GPT2LMHeadModel 512 places: there is none for a completion"),
        ("gpt2", [5, 97], "a prompt has token 97, and GPT2LMHeadModel embeddings for 97 tokens only"),
        ("llama", [5, 97], "a prompt has token 97, and LlamaForCausalLM embeddings for 97 tokens only"),
    ],
)
def test_prompts_that_the_model_cannot_read(family: str, prompt: list[int], message: str) -> None:
    requests = [Request([5], 0), Request(prompt, 1)]
    with pytest.raises(ConfigError) as caught:
        engine(family).generate(requests, Sampling(max_tokens=9))
    assert caught.value.message == message
    with pytest.raises(ConfigError):
        list(engine(family).stream(requests[1], Sampling(max_tokens=9)))


def test_the_likeliest_token_is_what_transformers_generates() -> None:
    sampler = engine(ends=(2,))
    (made,) = sampler.generate([Request(PROMPTS[0], 0)], Sampling(max_tokens=8, temperature=0.0))
    expected = sampler.policy.base.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0
    )[0, len(PROMPTS[0]) :]
    assert made[0].ids.tolist() == expected.tolist()


def test_stop_strings_end_a_completion_and_are_not_part_of_its_text() -> None:
    plain = engine(ends=()).generate([Request(PROMPTS[1], 0)], Sampling(max_tokens=12))[0][0]
    text = "".join(map(letter, plain.ids))
    stop = text[4:7]
    made = engine(ends=()).generate([Request(PROMPTS[1], 0)], Sampling(max_tokens=12, stop=(stop,)))[0][0]
    assert made.is_ended
    assert made.text == text[: text.index(stop)]
    assert made.ids.tolist() == plain.ids.tolist()[: len(made.ids)]
    assert "".join(map(letter, made.ids)).endswith(stop)


def test_a_penalty_on_repetition_counts_the_prompt() -> None:
    sampling = Sampling(max_tokens=20, temperature=0.0, repetition_penalty=50.0)
    (made,) = engine(ends=()).generate([Request(PROMPTS[0], 0)], sampling)
    assert len(set(made[0].ids.tolist())) == 20
    assert not set(made[0].ids.tolist()) & set(PROMPTS[0])


def test_weights_that_are_no_numbers_are_said() -> None:
    sampler = engine()
    with torch.no_grad():
        sampler.policy.base.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"no finite number in 4 of 4 rows"):
        sampler.generate([Request(PROMPTS[0], 0, 4)], Sampling(max_tokens=9))


def test_a_signal_ends_it() -> None:
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        engine().generate(REQUESTS, Sampling(max_tokens=9), lambda: next(asked))


def test_the_model_is_given_back_as_it_was() -> None:
    sampler = engine()
    sampler.policy.model.train()
    sampler.generate(REQUESTS, Sampling(max_tokens=2))
    assert sampler.policy.model.training

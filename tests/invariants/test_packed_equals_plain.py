"""What is computed on packed sequences is what each sequence gives alone: log-probabilities and every gradient, for all
families, full and LoRA, beyond the sliding window too. A model for which that is not so is found out at load.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from posttrain import ConfigError, SFTConfig
from posttrain.models import adapters, attention, capabilities
from posttrain.models.forward import Policy, open_policy
from posttrain.session import Session
from posttrain.types import Batch, Needs
from tests.tiny_batches import random_batch
from tests.tiny_models import FAMILIES, SIZES, VOCABULARY, tiny_model

LENGTHS = (11, 1, 7, 23, 2, 6)  # the tiny models' sliding window is 5
EXACT = 5e-6  # relative; fp32 rounding over two or three layers


def _spread(model: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def _gemma2() -> Any:
    """Attention scores and logits are both capped, tightly enough here that it matters."""
    caps = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "sliding_window": 5, "head_dim": 8}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCABULARY, **SIZES, **caps, attn_implementation="eager"))


OTHERS: dict[str, Callable[[], Any]] = {
    "gemma2": _gemma2,
    "cohere": lambda: CohereForCausalLM(CohereConfig(vocab_size=VOCABULARY, **SIZES, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(vocab_size=VOCABULARY, **SIZES, logits_scaling=3.0)),
}


def family_model(family: str) -> Any:
    torch.manual_seed(0)
    return tiny_model(family) if family in FAMILIES else _spread(OTHERS[family]())


def with_adapter(model: Any, **options: Any) -> Any:
    """LoRA with a B that is not zero any more."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def weights_of(batch: Batch) -> torch.Tensor:
    """What the log-probabilities are summed with: every row has another weight."""
    return torch.linspace(-1, 2, len(batch.rows_R))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each sequence alone through the model's own forward, its logits and a plain log-softmax."""
    pieces = []
    for index, (start, length) in enumerate(zip(batch.layout.starts, batch.layout.lengths, strict=True)):
        ids = batch.input_ids_T[start : start + length]
        logp = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        own = batch.sequence_R == index
        pieces.append(logp[batch.rows_R[own] - start, batch.target_R[own]])
    logp_R = torch.cat(pieces)
    (logp_R * weights_of(batch)).sum().backward()
    return logp_R.detach(), gradients(model)


def packed(policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logp_R = policy(batch, Needs()).logp_R
    (logp_R * weights_of(batch)).sum().backward()
    return logp_R.detach(), gradients(policy.model)


def assert_same(one: Any, other: Any, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    assert one[1].keys() == other[1].keys()
    assert one[1]
    largest = max(gradient.norm() for gradient in other[1].values())
    for name, gradient in one[1].items():
        reference = other[1][name]
        assert (gradient - reference).norm() <= tolerance * reference.norm() + 1e-7 * largest, name


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- packed = padded = plain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_full(family: str) -> None:
    model, batch = family_model(family), random_batch(LENGTHS)
    expected = plain(model, batch)
    own = model.config._attn_implementation
    policy = open_policy(model)
    assert policy.is_packed
    assert_same(packed(policy, batch), expected)
    policy.is_packed = False
    model.set_attn_implementation(own)
    assert_same(packed(policy, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family: str) -> None:
    model, batch = with_adapter(family_model(family)), random_batch(LENGTHS)
    expected = plain(model, batch)
    assert all("lora_" in name for name in expected[1])
    assert adapters.specialise(model) > 0 or family == "gpt2"  # whose layers are Conv1D
    own = model.config._attn_implementation
    policy = open_policy(model)
    assert policy.is_packed
    assert_same(packed(policy, batch), expected)
    policy.is_packed = False
    policy.base.set_attn_implementation(own)
    assert_same(packed(policy, batch), expected)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}], ids=str)
def test_lora_variants(options: dict[str, Any]) -> None:
    model, batch = with_adapter(family_model("qwen2"), **options), random_batch(LENGTHS)
    expected = plain(model, batch)
    adapters.specialise(model)
    assert_same(packed(open_policy(model), batch), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_or_embedding_trained_beside_an_adapter(family: str) -> None:
    """`modules_to_save` trains copies of whole modules, which then are the head and the embedding."""
    embedding = "wte" if family == "gpt2" else "embed_tokens"
    model = with_adapter(family_model(family), modules_to_save=["lm_head", embedding])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    batch = random_batch(LENGTHS)
    expected = plain(model, batch)
    assert any("lm_head.modules_to_save" in name for name in expected[1])
    adapters.specialise(model)
    assert_same(packed(open_policy(model), batch), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_single_tokens_trained_beside_an_adapter(family: str) -> None:
    """`trainable_token_indices` replaces rows of the embedding, and of the head where that is tied."""
    model = with_adapter(family_model(family), trainable_token_indices={"embed_tokens": [5, 6, 7]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_(0, 0.3)
    batch = random_batch(LENGTHS, vocabulary=12)
    expected = plain(model, batch)
    adapters.specialise(model)
    assert_same(packed(open_policy(model), batch), expected)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_close_to_exact_as_a_plain_bf16_forward(family: str, lora: bool, tmp_path: Path) -> None:
    """Values and the gradients of fp32 masters or adapters, against fp32; rounding may fall otherwise, not worse."""
    model, batch = family_model(family), random_batch(LENGTHS)
    model = with_adapter(model) if lora else model
    exact = plain(model, batch)
    low = copy.deepcopy(model)
    for name, parameter in low.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
    by_itself = plain(low, batch)
    arguments = _arguments(tmp_path)
    arguments.bf16 = True
    session = Session.open(model, arguments)
    assert session.policy.is_packed
    logp_R = session.policy(batch, Needs()).logp_R
    (logp_R * weights_of(batch)).sum().backward()
    session.precision.settle()
    ours = logp_R.detach(), {name: parameter.grad for name, parameter in session.trained.items()}
    assert ours[1].keys() == exact[1].keys()

    def error(run: Any) -> tuple[float, float]:
        """Relative, of the values and of all gradients together."""
        gap = sum((run[1][name].double() - value).square().sum() for name, value in exact[1].items())
        size = sum(value.double().square().sum() for value in exact[1].values())
        return ((run[0] - exact[0]).norm() / exact[0].norm()).item(), float(gap / size) ** 0.5

    for mine, theirs in zip(error(ours), error(by_itself), strict=True):
        assert mine <= 1.5 * theirs + 1e-3
        assert mine < 0.06
    session.close()


def test_entropy_and_likeliest_token() -> None:
    model, batch = family_model("qwen3"), random_batch(LENGTHS)
    rows = []
    with torch.no_grad():
        for start, length in zip(batch.layout.starts, batch.layout.lengths, strict=True):
            rows.append(model(input_ids=batch.input_ids_T[start : start + length][None]).logits[0])
        logp_RV = torch.cat(rows)[batch.rows_R].log_softmax(-1)
    outputs = open_policy(model)(batch, Needs(entropy=True, uniform_logp=True))
    assert outputs.entropy_R is not None
    assert outputs.uniform_logp_R is not None
    torch.testing.assert_close(outputs.entropy_R, -(logp_RV.exp() * logp_RV).sum(-1), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(outputs.uniform_logp_R, logp_RV.mean(-1), rtol=EXACT, atol=EXACT)
    assert torch.equal(outputs.is_top1_R, logp_RV.argmax(-1) == batch.target_R)
    assert not outputs.entropy_R.requires_grad


def test_one_sequence_and_many_of_one_token() -> None:
    model = family_model("lfm2")
    policy = open_policy(copy.deepcopy(model))
    for lengths in ((9,), (1, 1, 3, 1), (2, 2, 2)):
        batch = random_batch(lengths, share=1.0)
        assert_same(packed(policy, batch), plain(model, batch))


# --- models that do not honour the layout ---------------------------------------------------------------------------


class OldLlama(LlamaForCausalLM):
    """A family that transformers' attention interface does not reach."""

    _supports_attention_backend = False


class LoudLlama(LlamaForCausalLM):
    """Its logits are not its head times its hidden states."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


def _as(kind: type, model: Any) -> Any:
    model.__class__ = kind
    return model


def _attends_across(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Attention that knows nothing of segments."""
    original = attention.packed_attention

    def across(*args: Any, layout: Any = None, **kwargs: Any) -> Any:
        return original(*args[:4], None, *args[5:], layout=None, is_causal=True, **kwargs)

    monkeypatch.setattr(attention, "packed_attention", across)
    return family_model("llama")


def _convolves_across(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(capabilities, "adapt_to_packing", lambda model: None)
    return family_model("lfm2")


def _counts_positions_itself(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Segments stay apart, but each continues the positions of the one before."""
    model = family_model("gpt2")
    model.transformer.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    return model


def _is_older_than_the_interface(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _as(OldLlama, family_model("llama"))


@pytest.mark.parametrize(
    "make", [_attends_across, _convolves_across, _counts_positions_itself, _is_older_than_the_interface]
)
def test_a_model_that_does_not_honour_the_layout_runs_padded(
    make: Callable[[pytest.MonkeyPatch], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("posttrain"), "propagate", True)
    model, batch = make(monkeypatch), random_batch(LENGTHS)
    expected, own = plain(model, batch), model.config._attn_implementation
    policy = open_policy(model)
    assert not policy.is_packed
    assert model.config._attn_implementation == own
    name = type(model).__name__
    assert [record.getMessage() for record in caplog.records if record.name.startswith("posttrain")] == [
        f"{name} does not honour packed sequences; training with padded batches"
    ]
    assert_same(packed(policy, batch), expected)


def test_logits_that_are_not_head_times_hidden_are_refused(tmp_path: Path) -> None:
    model = _as(LoudLlama, family_model("llama").bfloat16())
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    own = model.config._attn_implementation
    with pytest.raises(ConfigError, match=r"LoudLlama: log-probabilities differ from its own forward by up to \d.*;"
                                          r" its logits are more than its head times its hidden states"):  # fmt: skip
        Session.open(model, _arguments(tmp_path))
    assert model.config._attn_implementation == own
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name][1])


# --- noise, generation, recomputation -------------------------------------------------------------------------------


def _arguments(folder: Path, **options: Any) -> SFTConfig:
    return SFTConfig(str(folder), bf16=False, report_to="none", **options)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_noise_goes_by_each_sequence_s_own_length(family: str, is_packed: bool) -> None:
    """Uniform within alpha / sqrt(length x D), on what the embedding gives (Gemma scales it)."""
    model, batch, alpha = family_model(family), random_batch((40, 300, 7)), 5.0
    policy = open_policy(model, neftune_alpha=alpha)
    policy.is_packed = is_packed
    seen: list[torch.Tensor] = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs.get("inputs_embeds")), with_kwargs=True
    )
    model.train()
    with torch.no_grad():
        policy(batch, Needs())
    clean = model.get_input_embeddings()(batch.input_ids_T).detach()
    for row, (start, length) in enumerate(zip(batch.layout.starts, batch.layout.lengths, strict=True)):
        noisy = seen[0][0, start : start + length] if is_packed else seen[0][row, :length]
        noise = noisy - clean[start : start + length]
        bound = alpha / (length * 32) ** 0.5
        assert 0.97 * bound < noise.abs().max() <= bound * (1 + 1e-5)
        assert noise.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    with torch.no_grad():
        policy(batch, Needs())
    assert not torch.equal(seen[0], seen[1])
    model.eval()
    policy(batch, Needs())
    assert seen[2] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_same_while_open(family: str, tmp_path: Path) -> None:
    """Also with left padding, and beyond the sliding window; after closing, the model has its own attention again."""
    model = family_model(family).eval()
    own = model.config._attn_implementation
    ids = random_batch((9, 9)).input_ids_T.view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids[1, :4] = 0

    def generated() -> tuple[torch.Tensor, torch.Tensor]:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
        return output.sequences, torch.stack(output.logits)

    before = generated()
    session = Session.open(model, _arguments(tmp_path))
    assert model.config._attn_implementation == attention.PACKED_ATTENTION
    session.policy(random_batch(LENGTHS), Needs())
    during = generated()
    session.close()
    assert model.config._attn_implementation == own
    for other in (during, generated()):
        assert torch.equal(other[0], before[0])
        torch.testing.assert_close(other[1], before[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_activations_changes_nothing(family: str, lora: bool, tmp_path: Path) -> None:
    """Bit for bit, dropout of the adapter included."""
    ends, calls = [], []
    for recompute in (False, True):
        model = family_model(family)
        model = with_adapter(model, lora_dropout=0.3) if lora else model
        session = Session.open(model, _arguments(tmp_path, gradient_checkpointing=recompute))
        counted: list[int] = []
        norms = ("0.input_layernorm", "0.ln_1", "0.operator_norm")
        next(m for name, m in model.named_modules() if name.endswith(norms)).register_forward_pre_hook(
            lambda *_, seen=counted: seen.append(1)
        )
        model.train()
        torch.manual_seed(3)
        ends.append(packed(session.policy, random_batch(LENGTHS)))
        calls.append(len(counted))
        session.close()
        assert not session.policy.base.is_gradient_checkpointing
    assert calls[0] == 1
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1].keys() == ends[1][1].keys()
    assert all(torch.equal(gradient, ends[1][1][name]) for name, gradient in ends[0][1].items())
    assert calls[1] == 2

"""Tiny random models of every family the engine promises, built on the spot. All dropout is off."""

from __future__ import annotations

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 97
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **SPECIAL,
}


def _gpt2(vocabulary: int) -> PreTrainedModel:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=512, **dropout, **SPECIAL)
    return GPT2LMHeadModel(config)


def _lfm2(vocabulary: int) -> PreTrainedModel:
    layers = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
    return Lfm2ForCausalLM(Lfm2Config(vocab_size=vocabulary, **{**SIZES, **layers}, block_auto_adjust_ff_dim=False))


def _gemma3(vocabulary: int) -> PreTrainedModel:
    special = {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=vocabulary, **SIZES, **special))


FAMILIES = {
    "llama": lambda v: LlamaForCausalLM(LlamaConfig(vocab_size=v, **SIZES)),
    "qwen2": lambda v: Qwen2ForCausalLM(Qwen2Config(vocab_size=v, **SIZES)),
    "qwen3": lambda v: Qwen3ForCausalLM(Qwen3Config(vocab_size=v, head_dim=8, **SIZES)),
    "gemma3": _gemma3,
    "mistral": lambda v: MistralForCausalLM(MistralConfig(vocab_size=v, sliding_window=5, head_dim=8, **SIZES)),
    "lfm2": _lfm2,
    "gpt2": _gpt2,
}


def tiny_model(family: str = "llama", vocabulary: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model; weights are spread widely enough that every layer matters to the logits."""
    torch.manual_seed(seed)
    model = FAMILIES[family](vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.05)
    return model

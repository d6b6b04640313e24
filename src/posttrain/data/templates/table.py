"""What must be known about each template beside its text. A new one is a `.jinja` file and a line here."""

from __future__ import annotations

from dataclasses import dataclass

EOS = "eos_token"
"""Stands for the tokenizer's own end-of-sequence token."""


@dataclass(frozen=True)
class Template:
    """`ends`: the tokens that end an assistant's turn (more than one where tool calls or last turns end otherwise).
    `tokens`: the other markers that it writes. `bos`: "template" writes it, "wanted" writes it where the tokenizer puts
    one before plain text, "none" has none. `falls_back`: to end-of-sequence where `ends` are no tokens."""

    name: str
    ends: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    bos: str = "template"
    tools: bool = False
    thinks: bool = False
    system: bool = True
    falls_back: bool = False


IM = ("<|im_start|>",)
CALLS = ("<tool_call>", "</tool_call>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
INST = ("[INST]", "[/INST]")
TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
PHI = ("<|system|>", "<|user|>", "<|assistant|>")
PHI_TOOLS = ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>")
LFM = (
    "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
    "<|tool_response_start|>", "<|tool_response_end|>",
)  # fmt: skip
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
SEEK = (
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip

_ALL = (
    Template("chatml", ("<|im_end|>",), IM, "wanted", tools=True, falls_back=True),
    Template("alpaca", (EOS,), bos="wanted"),
    Template("llama-2", (EOS,)),  # [INST] is text there
    Template("llama-3", ("<|eot_id|>",), HEADERS),
    Template("llama-3.1", ("<|eot_id|>",), HEADERS, tools=True),
    Template("gemma", ("<end_of_turn>",), ("<start_of_turn>",), system=False),
    Template("gemma-3", ("<end_of_turn>",), ("<start_of_turn>",)),
    Template("qwen-2.5", ("<|im_end|>",), IM, "none", tools=True),
    Template("qwen-3", ("<|im_end|>",), IM, "none", tools=True, thinks=True),
    Template("mistral", (EOS,), (*INST, *TOOLS), tools=True),
    Template("mistral-nemo", (EOS,), (*INST, *TOOLS), tools=True),
    Template("mistral-small", (EOS,), (*INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    Template("phi-3", ("<|end|>", EOS), PHI, "none"),
    Template("phi-4", ("<|im_end|>",), (*IM, "<|im_sep|>"), "none"),
    Template("phi-4-mini", ("<|end|>", EOS), (*PHI, *PHI_TOOLS), "none", tools=True),
    Template("lfm2", ("<|im_end|>",), (*IM, *LFM), tools=True),
    Template("zephyr", (EOS,), bos="wanted"),  # its roles are text
    Template("vicuna", (EOS,), bos="wanted"),
    Template("smollm2", ("<|im_end|>",), IM, "none"),
    Template("smollm3", ("<|im_end|>",), IM, "none", tools=True, thinks=True),
    Template("granite-3", ("<|end_of_text|>",), ("<|start_of_role|>", "<|end_of_role|>"), "none", tools=True),
    Template("command-r", ("<|END_OF_TURN_TOKEN|>",), COHERE),
    Template("deepseek-r1", ("<｜end▁of▁sentence｜>",), SEEK, tools=True, thinks=True),
    Template("tulu", (EOS,)),  # its roles are text
    Template("openchat", ("<|end_of_turn|>",)),
    Template("nemotron-mini", (EOS,), ("<extra_id_0>", "<extra_id_1>"), "none", tools=True),
)  # fmt: skip
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}

ALIASES: dict[str, str] = {
    "im": "chatml",
    "hermes": "chatml",
    "yi": "chatml",
    "llama-3.2": "llama-3.1",
    "llama-3.3": "llama-3.1",
    "gemma-2": "gemma",
    "qwen": "qwen-2.5",
    "qwen-2": "qwen-2.5",
    "mistral-v3": "mistral",
    "mistral-7b": "mistral",
    "tekken": "mistral-nemo",
    "mistral-v7": "mistral-small",
    "phi-3.5": "phi-3",
    "lfm-2": "lfm2",
    "smollm-2": "smollm2",
    "smollm": "smollm2",
    "smollm-3": "smollm3",
    "granite": "granite-3",
    "aya": "command-r",
    "cohere": "command-r",
    "deepseek-r1-distill": "deepseek-r1",
    "olmo-2": "tulu",
    "tulu-3": "tulu",
    "falcon-3": "tulu",
    "minitron": "nemotron-mini",
}
"""Other names. `deepseek` alone, `phi` or `mistral-large` are left out: they could mean several."""

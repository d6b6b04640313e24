"""Named chat templates, for models that bring none. Both mark what the assistant says for exact masks.

* `chatml`: `<|im_start|>role ... <|im_end|>`, with tools as Hermes and Qwen write them.
* `alpaca`: `### Instruction:` and `### Response:`, for base models without chat tokens.

A turn ends with a token that the tokenizer has as one piece, so that the model can learn to stop: `<|im_end|>` where it
is in the vocabulary, else the end-of-sequence token.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = """\
{%- set end = "END_OF_TURN" or eos_token -%}
{%- if tools -%}
{{- "<|im_start|>system\\n" -}}
{%- if messages[0].role == "system" -%}{{- messages[0].content + "\\n\\n" -}}{%- endif -%}
{{- "You may call these functions:\\n<tools>" -}}
{%- for tool in tools -%}{{- "\\n" + (tool | tojson) -}}{%- endfor -%}
{{- "\\n</tools>\\nA call is a JSON object within tags: <tool_call>\\n" -}}
{{- '{"name": <function-name>, "arguments": <args-json-object>}' + "\\n</tool_call>" + end + "\\n" -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and loop.first and message.role == "system") -%}
{{- "<|im_start|>" + message.role + "\\n" -}}
{%- if message.role == "assistant" -%}
{%- generation -%}
{{- message.content or "" -}}
{%- for call in message.tool_calls or [] -%}
{%- if not loop.first or message.content -%}{{- "\\n" -}}{%- endif -%}
{{- "<tool_call>\\n" + ((call.function or call) | tojson) + "\\n</tool_call>" -}}
{%- endfor -%}
{{- end + "\\n" -}}
{%- endgeneration -%}
{%- else -%}
{{- message.content + end + "\\n" -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""

ALPACA = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{{- "### Response:\\n" -}}
{%- generation -%}{{- message.content + eos_token + "\\n\\n" -}}{%- endgeneration -%}
{%- elif message.role == "user" -%}
{{- "### Instruction:\\n" + message.content + "\\n\\n" -}}
{%- else -%}
{{- message.content + "\\n\\n" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "### Response:\\n" -}}{%- endif -%}
"""

TEMPLATES: dict[str, str] = {"chatml": CHATML, "alpaca": ALPACA}


def resolve_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str | None:
    """The template to render with: None for the tokenizer's own, else the text of the one named, or of the file."""
    if name in (None, "auto"):
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the data are conversations, but the tokenizer has no chat template",
                hint='set chat_template="chatml" (or the path of a .jinja file), or train on text',
            )
        return None
    assert name is not None
    if name in TEMPLATES:
        ends = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else ""
        return TEMPLATES[name].replace("END_OF_TURN", ends)
    if "{{" in name or "{%" in name:
        return name
    return _template_file(name)


def _template_file(name: str) -> str:
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    similar = difflib.get_close_matches(name, TEMPLATES, n=1)
    hint = f"did you mean {similar[0]!r}?" if similar else f"known: {', '.join(TEMPLATES)}, or a .jinja file"
    raise ConfigError(f"no chat template is called {name!r}, and there is no such file", hint=hint)

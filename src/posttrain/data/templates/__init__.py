"""Named chat templates, for models that bring none: a `.jinja` file each, and what must be known about it in a table.

All mark what the assistant says with `{% generation %}`, for exact masks without rendering prefixes. They are written
so that what the model is given while training is what it is given in use, which a few models' own templates are not
(Mistral's moves the system message along; DeepSeek R1's drops the last thought): those files say so at their head.

A turn must end with one token of the tokenizer, or the model cannot learn to stop: a template whose end-of-turn token
the tokenizer lacks is refused (E-DATA-0040), except ChatML, which then ends turns with the end-of-sequence token. Other
markers that the tokenizer lacks (`<|im_start|>`, ...) are written as ordinary text, and the report names them.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.templates.table import ALIASES, EOS, TEMPLATES, Template
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TEMPLATES",
    "Template",
    "end_tokens",
    "find_template",
    "is_a_program",
    "is_ours",
    "missing_tokens",
    "resolve_template",
    "template_text",
    "without_markers",
]

FOLDER = Path(__file__).parent
BOS, END = "{{- BOS_IF_WANTED -}}\n", '"END_OF_TURN"'
MARKERS = re.compile(r"[ ]*\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


def find_template(name: str) -> Template | None:
    """The entry called `name`, however it is spelt (`Llama3.1`, `llama_3.1`); None where there is none."""
    return _spelt().get(_plain(name))


def resolve_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str | None:
    """The template to render with: None for the tokenizer's own, else the text of the one named, or of the file.

    Raises ConfigError: E-DATA-0040 for a template whose turns end with a token that the tokenizer lacks."""
    if name in (None, "auto"):
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the data are conversations, but the tokenizer has no chat template",
                hint='choose one: chat_template="chatml" (or the path of a .jinja file); or train on text',
            )
        return None
    assert name is not None
    found = find_template(name)
    if found is not None:
        return _fitted(found, tokenizer)
    if "{{" in name or "{%" in name:
        return name
    return _template_file(name)


def is_a_program(name: str | None) -> bool:
    """Whether `name` is a template or a file of one, rather than an entry of the table or the tokenizer's own."""
    return name not in (None, "auto") and find_template(str(name)) is None


def missing_tokens(tokenizer: PreTrainedTokenizerBase, name: str | None) -> tuple[str, ...]:
    """The markers of the template called `name` that are no tokens of the tokenizer's, and so are written as text."""
    found = find_template(name) if name else None
    if found is None:
        return ()
    vocabulary = tokenizer.get_vocab()
    return tuple(token for token in (*found.ends, *found.tokens) if token != EOS and token not in vocabulary)


def end_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[str, ...]:
    """What a turn of the template called `name` ends with: the stop strings for generation."""
    found = find_template(name)
    if found is None:
        return ()
    vocabulary, eos = tokenizer.get_vocab(), tokenizer.eos_token
    named = [eos if end == EOS or (end not in vocabulary and found.falls_back) else end for end in found.ends]
    return tuple(dict.fromkeys(str(end) for end in named if end))


@lru_cache
def template_text(name: str) -> str:
    """The file of the template called `name`, which must be in the table."""
    return (FOLDER / f"{name}.jinja").read_text("utf-8")


def without_markers(template: str) -> str:
    """`template` without `{% generation %}`, which other programs do not know: the text that is saved with a model."""
    return MARKERS.sub(lambda found: f"{{#{found[1]} {found[2]}#}}" if found[1] or found[2] else "", template)


def is_ours(template: str) -> bool:
    """Whether `template` is a text of this library, which may be rendered without a sandbox process."""
    return template in _our_texts()


@lru_cache
def _our_texts() -> frozenset[str]:
    texts = [
        _filled(template_text(name), bos, end)
        for name, template in TEMPLATES.items()
        for bos in (True, False)
        for end in {template.ends[0], ""}
    ]
    return frozenset(texts + [without_markers(text) for text in texts])


def _fitted(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary, eos = tokenizer.get_vocab(), tokenizer.eos_token
    absent = [end for end in template.ends if end != EOS and end not in vocabulary]
    wants_eos = EOS in template.ends or (absent and template.falls_back)
    if wants_eos and not isinstance(eos, str):
        message = f"chat_template={template.name!r} ends turns with an end-of-sequence token, which the tokenizer lacks"
        raise ConfigError(message, hint='name one: eos_token="..."', code="E-DATA-0040")
    if absent and not template.falls_back:
        message = f"chat_template={template.name!r} ends turns with {', '.join(absent)}, no token of this tokenizer's"
        hint = (
            'the model could not learn to stop; chat_template="chatml" ends turns with the end-of-sequence token '
            "instead, or take the tokenizer of that model family"
        )
        raise ConfigError(message, hint=hint, code="E-DATA-0040")
    wants_bos = template.bos == "wanted" and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return _filled(template_text(template.name), wants_bos, "" if absent else template.ends[0])


def _filled(text: str, bos: bool, end: str) -> str:
    return text.replace(BOS, "{{- bos_token -}}\n" if bos else "").replace(END, f'"{end}"')


@lru_cache
def _spelt() -> dict[str, Template]:
    spelt = {_plain(name): template for name, template in TEMPLATES.items()}
    return spelt | {_plain(alias): TEMPLATES[name] for alias, name in ALIASES.items()}


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


def _template_file(name: str) -> str:
    path = Path(name)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            message = f"{path}: the chat template is not UTF-8 (byte {error.start})"
            raise ConfigError(message, hint="write it as UTF-8 text") from None
    similar = difflib.get_close_matches(name.lower(), [*TEMPLATES, *ALIASES], n=1)
    hint = (
        f"did you mean {similar[0]!r}?"
        if similar
        else f"known: {', '.join(TEMPLATES)}, a .jinja file, or the folder of a tokenizer"
    )
    raise ConfigError(f"no chat template is called {name!r}, and there is no such file", hint=hint)

"""What a row says, whatever its format: the prompt, the answers, and the words of both that a person would read.

A prompt and its completion are one conversation, written as text or as messages or cut in two: its last assistant turn
is the answer, all before it the prompt. So the same question and answer are the same in every format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.data.codes import SKIP, UNFORESEEN, Row, bad_row, broken_promise
from posttrain.data.columns import read_columns, rename_columns
from posttrain.data.conversation import SYSTEM, is_answered, unanswered
from posttrain.data.formats import all_formats, choose, detect, require
from posttrain.data.formats.rated import is_unrated
from posttrain.data.margins import has_margin
from posttrain.data.oddities import oddities
from posttrain.data.passed_over import NOTHING, PassedOver, of_tokens, passed_over
from posttrain.data.places import half_a_character
from posttrain.data.ratings import ratings_of
from posttrain.data.render import Supervision
from posttrain.data.settings import DataSettings
from posttrain.data.tokens import COLUMNS, from_tokens, is_tokenized, not_heeded
from posttrain.errors import UserError
from posttrain.types import Content, Example, Message, Origin

TURN, PART = "\r\t\r", "\t\r\t"
"""What ends a turn, and what parts a role from its words, in canonical text: white space that stands in no text."""


SPACE = " \t\r\n"
OF_METHODS: dict[str, tuple[str, ...]] = {"sft": (), "preference": ("margin",), "rated": ("label",)}
"""The columns that each method looks at beside the answers."""


@dataclass(slots=True)
class Said:
    """`prompt` and `answers` in canonical form, for comparing; `asked` (the last user turn) and `spoken` (the last turn
    of each answer) as written; `length` counts the characters of all texts. `rest` is what else makes a row another
    row: tools and template arguments, never a column of the user's own. `is_answered`: the assistant says something
    that may be trained. `over` is what nothing is made of; `is_unrated`: there is a `label`, and it is no rating;
    `has_margin`: there is one, and it says something. `odd` names what was perhaps not meant as it is read
    (oddities.py)."""

    format: str
    method: str
    prompt: str
    answers: tuple[str, ...]
    asked: str
    spoken: tuple[str, ...]
    length: int
    label: bool | None = None
    rest: str = ""
    is_answered: bool = True
    over: PassedOver = NOTHING
    is_unrated: bool = False
    has_margin: bool = False
    odd: tuple[str, ...] = ()


class RowReader:
    """Rows of any format that any method trains on, as what they say."""

    def __init__(self, settings: DataSettings):
        self.names, self.text_field = settings.column_map, settings.text_field
        self.formats = all_formats(settings.text_field)
        self.format = choose(settings.format, self.formats)
        self.format_name = settings.format

    def read(self, row: Row, origin: Origin) -> Said:
        """Raises DataError for a row that cannot be used."""
        named = rename_columns(row, self.names, origin)
        return self._tokens(named, origin) if is_tokenized(named) else self.trainable(row, origin)[1]

    def example(self, row: Row, origin: Origin) -> Example:
        """The same as training would get it. Raises DataError for a row that cannot be used."""
        return self.trainable(row, origin)[0]

    def trainable(self, row: Row, origin: Origin) -> tuple[Example, Said]:
        """With what it says."""
        example, what = self.parsed(row, origin)
        check_trainable(example, what, row, origin)
        return example, what

    def parsed(self, row: Row, origin: Origin) -> tuple[Example, Said]:
        """Both of a row that is not tokens."""
        try:
            given = rename_columns(row, self.names, origin)
            row = read_columns(given, {}, origin)
            example, described = self._example(row, origin)
            what = said(example, described)
            if what.method == "rated":
                ratings_of(example)  # raises where there is no answer to rate
            what.over = passed_over(example, self.formats, OF_METHODS[what.method], self.format is not None)
            what.is_unrated = what.method == "sft" and is_unrated(row)
            what.odd = tuple(oddities(example, given, row))
            return example, what
        except UserError:
            raise
        except UNFORESEEN as error:
            raise broken_promise(error, row, origin) from error

    def _example(self, row: Row, origin: Origin) -> tuple[Example, str]:
        """With its format, in words."""
        found = self.format or detect(row, origin, self.formats)
        require(found, self.format_name, row, origin)
        return found.parse(row, origin), found.describe(row)

    def _tokens(self, row: Row, origin: Origin) -> Said:
        """Checked as training does, but for the size of the vocabulary."""
        supervision = Supervision()
        (branch,) = from_tokens(row, origin, supervision, None, ()).branches
        if not branch.supervised[1:].any():  # nothing stands before the first that could predict it
            hint = f"drop such rows, or skip them ({SKIP})"
            raise bad_row("E-DATA-0022", origin, "no token of the row would be trained", row=row, hint=hint)
        text = f"{branch.ids.tolist()}{branch.supervised.tolist()}{row.get('completion_mask')}"
        what = Said("read as tokens: column `input_ids`", "sft", "", (text,), "", (), len(branch.ids))
        what.over = of_tokens(row, {*COLUMNS}.difference(not_heeded(row, supervision)), self.formats)
        return what


def check_trainable(example: Example, said: Said, row: Row, origin: Origin) -> None:
    """Raises DataError for a row that is right in form, and that no model can be trained on."""
    if not said.is_answered:
        silent = next(one for one in example.completions if isinstance(one, list) and not is_answered(one))
        raise unanswered(silent, None, row, origin)
    rest = json.dumps(json.loads(said.rest), ensure_ascii=False) if "\\ud" in said.rest else ""
    for text in (said.prompt, *said.answers, rest):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, written as \\ud83d in the JSON
            raise half_a_character(row, origin) from None


def said(example: Example, described: str) -> Said:
    is_answered = all(map(_is_answered, example.completions))
    prompt, answers = _conversation(example)
    label = example.columns.get("label") if described.endswith("rated by `label`") else None
    return Said(
        format=described,
        method="preference" if len(answers) > 1 else "rated" if label is not None else "sft",
        prompt=_canonical(prompt),
        answers=tuple(map(_canonical, answers)),
        asked=_last(prompt, "user"),
        spoken=tuple(_last(answer, "assistant") for answer in answers),
        length=sum([_length(content) for content in (prompt, *answers)]),
        label=label,
        rest=_rest(example),
        has_margin=has_margin(example),
        is_answered=is_answered,
    )


def _rest(example: Example) -> str:
    """Tools and template arguments: the same words with others are another text to the model."""
    parts = [example.tools or [], dict(example.template_kwargs)]
    return json.dumps(parts, sort_keys=True, default=str) if any(parts) else ""


def _conversation(example: Example) -> tuple[Content | None, tuple[Content, ...]]:
    """The prompt and the answers as messages, but for plain text, which nobody says."""
    prompt, answers = example.prompt, example.completions
    if prompt is None:
        return _split(answers[0]) if isinstance(answers[0], list) else (None, answers)
    before = as_messages(prompt, "user")
    after = [as_messages(answer, "assistant") for answer in answers]
    if len(after) > 1:
        return before, tuple(after)
    return _split([*before, *after[0]]) if after else (before, ())


def as_messages(content: Content, role: str) -> list[Message]:
    """`content` as what `role` says, if it is text; nothing said is no message."""
    return content if isinstance(content, list) else [{"role": role, "content": content}] if content else []


def _is_answered(content: Content) -> bool:
    """By its flags, where it has any; the roles decide otherwise."""
    if not isinstance(content, list):
        return True
    return is_answered(content)


def _split(messages: list[Message]) -> tuple[Content | None, tuple[Content, ...]]:
    """A conversation as all before its last assistant turn, and from there on."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "assistant":
            return messages[:index], (messages[index:],)
    return messages, ([],)


def _canonical(content: Content | None) -> str:
    if not isinstance(content, list):
        return _bare(content or "")
    return "".join([_turn(message) for message in content])


def _bare(text: str) -> str:
    """`text` from its first line to its last word. How far that line is indented counts, for code depends on it; one
    space does not, for completions of text begin with it. Empty lines before and white space behind tell no two rows
    apart."""
    text = text.rstrip(SPACE)
    if not text or text[0] not in SPACE:
        return text
    start = len(text) - len(text.lstrip(SPACE))
    indent = text[text.rfind("\n", 0, start) + 1 : start]
    return text[start:] if indent == " " else indent + text[start:]


def _turn(message: Message) -> str:
    text = _bare(message.get("content") or "")
    if len(message) > 1 + ("content" in message):  # reasoning, tool calls, flags; a call may stand without content
        others: dict[str, Any] = {key: message[key] for key in sorted(message) if key not in ("role", "content")}
        text = f"{text}{PART}{json.dumps(others, ensure_ascii=False, default=str)}"
    return f"{message['role']}{PART}{text}{TURN}"


def _length(content: Content | None) -> int:
    if not isinstance(content, list):
        return len(content or "")
    return sum([len(message.get("content") or "") for message in content])


def _last(content: Content | None, role: str) -> str:
    """The last thing that `role` says."""
    if not isinstance(content, list):
        return content or ""
    for message in reversed(content):
        if message["role"] == role:
            text = message.get("content")
            return text if isinstance(text, str) else ""
    return ""


ANSWER = f"{TURN}assistant{PART}"


def earlier_answers(prompt: str) -> Iterator[tuple[int, int]]:
    """Where in a canonical prompt the assistant's turns stand, but for one that nothing comes before. A row of which
    such a turn is the answer is the beginning of this one."""
    found = prompt.find(ANSWER)
    while found >= 0:
        start = found + len(TURN)
        end = prompt.index(TURN, start)
        yield start, end + len(TURN)
        found = prompt.find(ANSWER, end)


ODD_SYSTEMS = tuple(f"{TURN}{role}{PART}" for role in SYSTEM)


def has_odd_systems(canonical: str) -> bool:
    """Whether there are several system turns, or one that is not the first."""
    return any(beginning in canonical for beginning in ODD_SYSTEMS)

"""Rows of one message each (`role` and `text`), as tables of conversations and OpenAssistant's trees have them.

They are no format: which messages belong together stands in other rows. Without this check their `text` would be read
as a text of its own, and a question be trained like its answer.
"""

from __future__ import annotations

from posttrain.data.codes import Row, bad_row
from posttrain.data.conversation import ALIASES, ROLES
from posttrain.errors import DataError
from posttrain.types import Origin

WHO, WHAT = ("role", "from", "speaker", "author"), ("text", "content", "value", "message")
OF_A_TREE = ("parent_id", "message_id")
GROUPS = ("conversation_id", "conv_id", "dialog_id", "dialogue_id", "thread_id", "session_id", "message_tree_id", "id")
MESSAGES = '{"messages": [{"role": "user", "content": "..."}, ...]}'


def check_not_single(row: Row, origin: Origin, is_text: bool) -> None:
    """Raises DataError (E-DATA-0152) for a row that is one message of a conversation; `is_text`: it could be read as
    text."""
    who = next((name for name in WHO if _is_role(row.get(name))), None)
    what = next((name for name in WHAT if isinstance(row.get(name), str)), None)
    if who is not None and what is not None:
        raise _single(who, what, row, origin, is_text)


def _is_role(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() in (*ROLES, *ALIASES)


def _single(who: str, what: str, row: Row, origin: Origin, is_text: bool) -> DataError:
    about = f"is one message of a conversation (`{who}` and `{what}`), not a conversation or a text"
    group = next((name for name in GROUPS if row.get(name) is not None), None)
    way = f"write the rows of each conversation{f' (`{group}`)' if group else ''} as one: {MESSAGES}"
    if all(name in row for name in OF_A_TREE):
        way = f"the rows are a tree: write each path along `parent_id`, from its root to an answer, as one: {MESSAGES}"
    if is_text:
        way += "; if each is a text of its own, name the format: --format text (dataset.format)"
    return bad_row("E-DATA-0152", origin, about, field=who, seen=row[who], row=row, hint=way)

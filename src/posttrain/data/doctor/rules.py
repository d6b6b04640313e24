"""The repairs by name, so that one of them can be asked for: those of `data check --fix`, and roles renamed by hand."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.codes import Row
from posttrain.data.conversation import ALIASES, ROLES
from posttrain.data.formats.sharegpt import CALLS
from posttrain.errors import ConfigError

REPAIRS = {
    "drop-unusable": "dropped_unusable",
    "drop-duplicates": "dropped_duplicates",
    "drop-equal-pairs": "dropped_equal_pairs",
    "strip-control-characters": "stripped_control_characters",
    "rename-roles": "renamed_roles",
}
"""Each under the name that its count has in reports. Columns are renamed by `--map`."""
RENAME = "rename-role"
CONVERSATIONS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected")
TRAINED = (
    *CONVERSATIONS,
    "text",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
    "chat_template_kwargs",
)
"""Columns that formats read."""
ROLE_KEYS = ("role", "from")


@dataclass(frozen=True)
class Rules:
    """`names` of `REPAIRS` to apply; `roles`, in lower case, under their new names."""

    names: frozenset[str] = frozenset(REPAIRS)
    roles: Mapping[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.names


def parse_rules(texts: Iterable[str]) -> Rules:
    """`drop-duplicates`, `rename-role:assitant=assistant`, ...; without any, all repairs that ask nobody."""
    names, roles = set[str](), dict[str, str]()
    for text in texts:
        name, _, rest = text.partition(":")
        if name == RENAME:
            old, new = _renaming(text, rest)
            roles[old] = new
        elif text in REPAIRS:
            names.add(text)
        else:
            known = (*REPAIRS, f"{RENAME}:OLD=NEW")
            similar = difflib.get_close_matches(text, known, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"known: {', '.join(known)}"
            raise ConfigError(f"--rule {text}: there is no such repair", hint=hint)
    return Rules(frozenset(names), roles) if names or roles else Rules()


def _renaming(text: str, rest: str) -> tuple[str, str]:
    old, equals, new = (part.strip() for part in rest.rpartition("="))
    if not (old and equals and new):
        raise ConfigError(f"--rule {text!r} is not of the form {RENAME}:OLD=NEW", hint=f"{RENAME}:assitant=assistant")
    known = (*ROLES, *ALIASES, *CALLS)
    if new not in known:
        similar = difflib.get_close_matches(new, known, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"roles: {', '.join(ROLES)}"
        raise ConfigError(f"--rule {text}: {new!r} is no role either", hint=hint)
    return old.lower(), new


def rename_roles(row: Row, roles: Mapping[str, str], seen: set[str]) -> tuple[Row, set[str]]:
    """`row` with its messages' roles renamed, and which of `roles` it has; all that it has are added to `seen`.
    Messages may stand in any column, for it may be renamed only when it is read."""
    found: set[str] = set()

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if not isinstance(value, dict):
            return value
        key = next((key for key in ROLE_KEYS if isinstance(value.get(key), str)), None)
        if key is None:
            return value
        old = value[key].strip().lower()
        seen.add(old)
        if old not in roles:
            return value
        found.add(old)
        return {**value, key: roles[old]}

    if not roles:
        return row, found
    return {key: renamed(v) if key in CONVERSATIONS or isinstance(v, list) else v for key, v in row.items()}, found


def unmatched(roles: Mapping[str, str], used: set[str], seen: set[str]) -> ConfigError | None:
    """What to say of a role that is in no row."""
    left = sorted(set(roles) - used)
    if not left:
        return None
    similar = difflib.get_close_matches(left[0], seen, n=1)
    hint = f"did you mean {similar[0]}?" if similar else f"roles there are: {', '.join(sorted(seen)[:20]) or 'none'}"
    return ConfigError(f"--rule {RENAME}:{left[0]}={roles[left[0]]}: no message has that role", hint=hint)

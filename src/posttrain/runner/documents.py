"""YAML and JSON configuration files, read the way people mean them.

`2e-4` is a number (PyYAML reads YAML 1.1, where it is a string), `010` is ten and not eight, a date is a word, `on`,
`off`, `yes` and `no` are words (a setting that is true or false understands them), and a key that stands twice is an
error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import ConfigError

FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)$"
)
BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INTEGER = re.compile(r"^[-+]?[0-9][0-9_]*$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's idea of numbers and booleans."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own attribute, replaced here as a whole)
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rsplit(":", 1)[1] not in ("float", "int", "bool", "timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                problem = f"a key must be a word, this is a {type(key).__name__}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(str(self.construct_scalar(node)).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOLEAN, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in a `.yaml`, `.yml` or `.json` file. Raises ConfigError naming file, line and column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml", ".json"))[:5]
        hint = f"in that folder: {', '.join(near)}" if near else "posttrain recipes show sft > sft.yaml makes one"
        raise ConfigError(f"{path}: no such file", hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    document = _json(text, path) if path.suffix == ".json" else _yaml(text, path)
    if not isinstance(document, dict):
        seen = "nothing" if document is None else f"a {type(document).__name__}"
        raise ConfigError(f"{path}: must hold a mapping of settings, holds {seen}",
                          hint="posttrain recipes show sft > sft.yaml makes one")  # fmt: skip
    return document


def parse_value(text: str) -> Any:
    """A value given on the command line, read as YAML: `2e-4` is a number, `null` is nothing, `[a, b]` a list."""
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, RecursionError):
        return text


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        hint = "JSON has no comments; use YAML for those" if "//" in text else None
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: {error.msg}", hint=hint) from None
    except _DuplicateError as error:
        found = [match.start() for match in re.finditer(re.escape(json.dumps(error.key)) + r"\s*:", text)]
        line = text.count("\n", 0, found[1]) + 1 if len(found) > 1 else 1
        raise ConfigError(f"{path}:{line}: key {error.key!r} stands twice") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a configuration") from None


class _DuplicateError(ValueError):
    def __init__(self, key: str):
        super().__init__(key)
        self.key = key


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise _DuplicateError(key)
    return dict(pairs)


def _yaml(text: str, path: Path) -> Any:
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: {error.problem}") from None
    except yaml.YAMLError as error:  # a control character
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a configuration") from None

"""Rendering a chat template with Jinja's immutable sandbox, set up as transformers does it.

Our own templates are rendered here and now. All others run this file as a script in a child process (sandbox.py), so
it imports nothing of posttrain, and nothing heavy. What the model sees in use is what transformers renders: a test
compares the two over every template there is.

The sandbox keeps a template from reaching Python's internals; it does not bound time or memory, the child process does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

if __name__ == "__main__":  # a child process without site packages: they are where its parent has them
    sys.path[:] = json.loads(sys.argv[1])

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Span = tuple[int, int]
SECONDS = 2
MEGABYTES = 512
OUTPUT = 4_000_000
"""What a rendering may take in a child process: processor seconds, memory, and characters beside those it was given."""


_MARKS: ContextVar[str] = ContextVar("marks", default="")


class _Beyond(Exception):
    """More time, memory or output than any conversation needs."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what stands between is what the assistant says. While there are marks,
    it is written between these two characters, wherever a macro or a variable carries it."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Macro) -> str:
        marks = _MARKS.get()
        return f"{marks[0]}{caller()}{marks[1]}" if marks else str(caller())


class _Namespace(Namespace):
    """Without attributes that begin with an underscore, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names with an underscore in front are not allowed")


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def answer(template: str, values: Mapping[str, Any], marked: bool = False, limit: int | None = None) -> dict[str, Any]:
    """What `template` makes of `values` (`messages`, `tools`, ...; plain JSON): `{"rendered": text}`, or with `marked`
    `{"rendered": [text, spans]}`, the characters `[start, end)` between generation markers; `{"error": why}` where it
    fails or refuses; `{"broken": why, "line": n}` where it is no template; `{"limit": why}` where it goes beyond
    bounds, such as `limit` characters of output."""
    try:
        return {"rendered": _marked(template, values, limit) if marked else _write(template, values, "", limit)}
    except _Beyond as error:
        return {"limit": str(error)}
    except (MemoryError, RecursionError) as error:
        return {"limit": f"it takes too much {'memory' if isinstance(error, MemoryError) else 'recursion'}"}
    except TemplateSyntaxError as error:
        return {"broken": (error.message or "it cannot be read")[:2000], "line": error.lineno}
    except SyntaxError as error:  # what Jinja takes and Python does not: a `break` outside of a loop
        return {"broken": error.msg, "line": None}
    except Exception as error:  # a template is code of its own
        return {"error": (str(error) or type(error).__name__)[:2000]}


def _marked(template: str, values: Mapping[str, Any], limit: int | None) -> tuple[str, list[Span]]:
    text = _write(template, values, "", limit)
    marks = _unused(text + json.dumps(values, ensure_ascii=False))
    plain, spans = _unmarked(_write(template, values, marks, limit), marks)
    if plain != text:
        raise TemplateError("it changes what it has marked with {% generation %}, so the place of that is not known")
    return text, spans


def _write(template: str, values: Mapping[str, Any], marks: str, limit: int | None) -> str:
    token = _MARKS.set(marks)
    try:
        pieces, length = [], 0
        for piece in _compiled(template).generate(**values):
            pieces.append(piece)
            length += len(piece)
            if limit is not None and length > limit:
                raise _Beyond(f"it writes more than {limit:,} characters".replace(",", " "))
        return "".join(pieces)
    finally:
        _MARKS.reset(token)


def _unused(text: str) -> str:
    """Two characters that do not occur in `text`."""
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    return next(free) + next(free)


def _unmarked(text: str, marks: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    length = depth = start = 0
    for piece in re.split(f"([{marks}])", text):
        if piece == marks[0]:
            start, depth = (length if depth == 0 else start), depth + 1
        elif piece == marks[1]:
            depth -= 1
            if depth == 0:
                spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), [span for span in spans if span[0] < span[1]]


def _serve() -> None:
    """Answer requests, a line of JSON each, until the pipe is closed. `setitimer` ends a rendering that takes too long
    by the signal's default action, whatever the interpreter is busy with."""
    import resource
    import signal

    known: dict[str, str] = {}
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whatever the parent does with it
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):  # no files, no processes
        resource.setrlimit(limit, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        soft = MEGABYTES * 1_000_000 + 32 * len(line)
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard < 0 else min(soft, hard), hard))
        request = json.loads(line)
        if "template" in request:
            known[request["key"]] = request["template"]
        template, values = known[request["key"]], request["values"]
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            reply = answer(template, values, request["marked"], OUTPUT + 4 * len(line))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()

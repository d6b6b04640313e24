"""Run as a script in a sandbox of its own: the tests of a program, which runs in another one.

The names that the tests use and do not make themselves are the program's. Calling them asks the program through a pipe
and gives plain values; names of Python's own are never the program's. The verdict goes to the parent with the word that
the parent gave, which the program has never seen.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import os
import sys
from typing import Any

sys.path.insert(0, sys.argv[0].rpartition("/")[0])

from channel import Broken, Channel, pack, take_standard_streams, unpack  # type: ignore[import-not-found]
from limits import set_limits  # type: ignore[import-not-found]


class Program:
    """Asks the program."""

    def __init__(self, channel: Channel):
        self.channel = channel

    def ask(self, kind: str, of: int, **more: Any) -> Any:
        self.channel.send({"kind": kind, "of": of, **more})
        reply = self.channel.receive()
        if not isinstance(reply, dict):
            raise Broken
        if "error" in reply:
            raise _error(reply)
        return unpack(reply.get("value"), lambda number: Remote(self, number))


def number_of(value: Any) -> int:
    if isinstance(value, Remote):
        return object.__getattribute__(value, "_number")
    raise TypeError(f"{type(value).__name__} cannot be given to the program")


def _error(reply: dict[str, Any]) -> BaseException:
    """An exception of Python's own by its name; anything else is a RuntimeError."""
    kind = getattr(builtins, str(reply["error"]), None)
    said = f"{reply['error']}: {reply.get('said')}"
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not UnicodeDecodeError:
        try:
            return kind(reply.get("said"))
        except TypeError:
            pass
    return RuntimeError(said)


class Remote:
    """An object of the program's. It is equal to itself alone, in no order, and true."""

    def __init__(self, program: Program, number: int):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def _ask(self, kind: str, **more: Any) -> Any:
        program: Program = object.__getattribute__(self, "_program")
        return program.ask(kind, object.__getattribute__(self, "_number"), **more)

    def __getattr__(self, name: str) -> Any:
        return object.__getattribute__(self, "_ask")("get", name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name=name, value=pack(value, number_of))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value, after = self._ask("call", args=pack(args, number_of), kwargs=pack(kwargs, number_of))
        for mine, changed in zip(args, after, strict=True):
            if type(mine) is list and type(changed) is list:
                mine[:] = changed
            elif type(mine) in (dict, set) and type(changed) is type(mine):
                mine.clear()
                mine.update(changed)
        return value

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __iter__(self) -> Any:
        return iter(self._ask("list"))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", value=pack(key, number_of))


def names_of(tests: list[str]) -> tuple[set[str], set[str]]:
    """Names that the tests use, and those among them that are modules of Python's: used without an import, since most
    programs import them, and never the program's."""
    names, modules = set(), set()
    for text in tests:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        modules |= {node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                  and isinstance(node.value, ast.Name) and node.value.id in sys.stdlib_module_names}  # fmt: skip
    return names, modules


def run(program: Program, names: list[str], tests: list[str], folder: str) -> dict[str, Any]:
    """How many of the tests pass, and why the first that fails does."""
    shared: dict[str, Any] = {}
    used, modules = names_of(tests)
    for name in used.intersection(names):
        if name in modules:
            shared[name] = importlib.import_module(name)
        elif not hasattr(builtins, name):
            shared[name] = program.ask("get", 0, name=name)
    passed, why = 0, None
    for number, text in enumerate(tests):
        path = os.path.join(folder, f"test_{number}.py")
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        spec = importlib.util.spec_from_file_location(f"test_{number}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        vars(module).update(shared)
        try:
            spec.loader.exec_module(module)
            passed += 1
        except Broken:
            return {"passed": passed, "of": len(tests), "why": "the program ended"}
        except BaseException as error:
            why = why or f"test {number}: {type(error).__name__}: {str(error)[:200]}"
        shared.update({key: value for key, value in vars(module).items() if not key.startswith("__")})
    return {"passed": passed, "of": len(tests), "why": why}


def main() -> None:
    verdicts = Channel(open(os.devnull, "rb"), os.fdopen(os.dup(2), "wb"))  # noqa: SIM115 - as long as the process
    channel = take_standard_streams()
    given = channel.receive()  # from the parent, before the program has said anything
    set_limits(given["seconds"], given["megabytes"])
    os.set_inheritable(verdicts.writer.fileno(), False)
    try:
        if channel.receive() != "ready":
            raise Broken
        verdicts.send({"word": given["word"], "began": True})
        began = channel.receive()
        if not isinstance(began, dict) or "error" in began:
            said = began if isinstance(began, dict) else {}
            verdict = {"passed": 0, "of": len(given["tests"]), "why": f"{said.get('error')}: {said.get('said')}"}
        else:
            names = began.get("names")
            if not isinstance(names, list):
                raise Broken
            verdict = run(Program(channel), [str(name) for name in names], given["tests"], given["folder"])
    except Broken:
        verdict = {"passed": 0, "of": len(given["tests"]), "why": "the program ended"}
    verdicts.send({"word": given["word"], **verdict})


if __name__ == "__main__":
    main()

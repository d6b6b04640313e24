"""Run as a script in the sandbox: the program that a model wrote, whose functions its tests call through a pipe.

It is given the program and its limits, never the tests. Whatever the program does to this process, all it can say is
what its functions return.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

sys.path.insert(0, sys.argv[0].rpartition("/")[0])

from channel import Broken, Channel, pack, take_standard_streams, unpack  # type: ignore[import-not-found]
from limits import set_limits  # type: ignore[import-not-found]


class Host:
    """Objects that the tests hold by number; 0 is the program itself."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.objects: list[Any] = []

    def keep(self, value: Any) -> int:
        self.objects.append(value)
        return len(self.objects) - 1

    def find(self, number: int) -> Any:
        return self.objects[number]

    def serve(self) -> None:
        while True:
            request = self.channel.receive()
            try:
                reply = {"value": pack(self.does(request), self.keep)}
            except Broken:
                raise
            except BaseException as error:
                reply = {"error": type(error).__name__, "said": _said(error)}
            self.channel.send(reply)

    def does(self, request: dict[str, Any]) -> Any:
        kind, target = request["kind"], self.objects[request["of"]]
        if kind == "get":
            return getattr(target, request["name"])
        if kind == "set":
            return setattr(target, request["name"], unpack(request["value"], self.find))
        if kind == "has":
            return hasattr(target, request["name"])
        if kind in ("str", "repr"):
            return str(target) if kind == "str" else repr(target)
        if kind == "len":
            return len(target)
        if kind == "list":
            return list(target)
        if kind == "item":
            return target[unpack(request["value"], self.find)]
        args, kwargs = unpack(request["args"], self.find), unpack(request["kwargs"], self.find)
        value = target(*args, **kwargs)
        return (value, list(args))  # lists that it has changed


def _said(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""


def main() -> None:
    channel = take_standard_streams()
    host = Host(channel)
    given = channel.receive()
    set_limits(given["seconds"], given["megabytes"])
    path = given["folder"] + "/program.py"
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(given["text"])
    spec = importlib.util.spec_from_file_location("program", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    channel.send("ready")  # from here on the clock runs
    sys.modules["program"] = module
    host.keep(module)
    try:
        spec.loader.exec_module(module)
        reply: dict[str, Any] = {"names": [str(name) for name in list(vars(module)) if not name.startswith("__")]}
    except BaseException as error:
        reply = {"error": type(error).__name__, "said": _said(error)}
    channel.send(reply)
    host.serve()


if __name__ == "__main__":
    main()

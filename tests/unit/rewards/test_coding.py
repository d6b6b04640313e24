"""Programs against their tests: those that are right, those that are wrong, and what the tests may ask of them."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from posttrain import ConfigError
from posttrain.rewards import code, code_tests
from posttrain.rewards.coding import program_of
from posttrain.rewards.functions import RewardError
from posttrain.rewards.sandbox import walls
from posttrain.rewards.sandbox.run import Limits, Verdict, examine

WHY = walls.why_none()
needs_sandbox = pytest.mark.skipif(WHY is not None, reason=f"no sandbox here: {WHY}")
BOTH = [pytest.param(True, marks=needs_sandbox, id="shut in"), pytest.param(False, id="unsandboxed")]
LIMITS = Limits(seconds=5)

RIGHT: dict[str, tuple[str, list[str]]] = {
    "a function": ("def add(a, b):\n    return a + b", ["assert add(1, 2) == 3", "assert add([1], [2]) == [1, 2]"]),
    "plain values of every kind": (
        "def same(x): return x",
        [
            "for x in (None, True, -7, 10**5000, 1.5, float('inf'), 'é\\n', b'\\x00', 2j, (1, [2]), {1, 2},\n"
            "          {(1,): {'a': ()}}):\n"
            "    assert same(x) == x and type(same(x)) is type(x)",
            "assert same(frozenset([1])) == frozenset([1])",
            "import math\nassert math.isnan(same(float('nan')))",
        ],
    ),
    "subclasses are what they hold": (
        "from collections import Counter, OrderedDict\ndef count(x): return Counter(x)\n"
        "class N(int): pass\ndef n(): return N(3)",
        ["assert count('aab') == {'a': 2, 'b': 1}", "assert n() == 3 and type(n()) is int"],
    ),
    "a class": (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)\n"
        "    def __str__(self): return f'Stack({self.items})'\n    def __getitem__(self, i): return self.items[i]\n"
        "    def __iter__(self): return iter(self.items)",
        ["s = Stack()\ns.push(1)\ns.push('b')\nassert len(s) == 2 and s[0] == 1 and list(s) == [1, 'b']\n"
         "assert str(s) == \"Stack([1, 'b'])\"\nassert s.pop() == 'b'\ns.items = [7]\nassert s.pop() == 7"],
    ),
    "what it raises": (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x",
        ["try:\n    f(-1)\nexcept ValueError as e:\n    assert str(e) == 'negative'\nelse:\n    assert False"],
    ),
    "lists changed in place": (
        "def sort(x): x.sort()\ndef put(d): d['k'] = 1",
        ["a = [3, 1, 2]\nassert sort(a) is None\nassert a == [1, 2, 3]", "d = {}\nput(d)\nassert d == {'k': 1}"],
    ),
    "functions that come back": ("def adder(n): return lambda x: x + n", ["assert adder(2)(3) == 5"]),
    "a module that the tests do not import": (
        "import math\ndef f(): return 0.1 + 0.2", ["assert math.isclose(f(), 0.3)"]
    ),
    "names of one test in the next": ("def f(): return 1", ["def check(g): assert g() == 1", "check(f)"]),
    "it prints": ("def f():\n    print('x' * 10**6)\n    return input if False else 1", ["assert f() == 1"]),
    "many names": ("for i in range(20_000): globals()[f'n{i}'] = i\ndef f(): return n7", ["assert f() == 7"]),
    "threads": (
        "import threading\ndef f():\n    t = threading.Thread(target=lambda: None)\n    t.start()\n    t.join()\n"
        "    return 1",
        ["assert f() == 1"],
    ),
    "Unicode": ("def größe(): return '𝔘'", ["assert größe() == '𝔘'"]),
}  # fmt: skip


@pytest.mark.parametrize("shut_in", BOTH)
@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(name: str, shut_in: bool) -> None:
    text, tests = RIGHT[name]
    assert examine(text, tests, LIMITS, shut_in) == Verdict(len(tests), len(tests))


WRONG: dict[str, tuple[str, str]] = {
    "wrong": ("def f(): return 2", "test 0: AssertionError: "),
    "no such name": ("def g(): return 1", "test 0: NameError: name 'f' is not defined"),
    "no Python": ("def f(: return 1", "SyntaxError: "),
    "it raises at once": ("1 / 0", "ZeroDivisionError: division by zero"),
    "it raises when called": ("def f(): raise KeyError('k')", "test 0: KeyError: "),
    "it leaves": ("import sys\ndef f(): sys.exit(0)", "test 0: RuntimeError: SystemExit: 0"),
    "it recurses": ("def f(): return f()", "test 0: RecursionError: "),
    "nothing": ("", "test 0: NameError"),
    "it takes too long": ("def f():\n    while True: pass", "it took too long"),
    "it sleeps": ("import time\ntime.sleep(1000)", "it took too long"),
    "it takes too much memory": ("def f(): return len('x' * 10**10)", "test 0: MemoryError"),
    "it says too much": ("def f(): return 'x' * 9_000_000", "the program ended"),
    "it is nested too deep": (
        "def f():\n    x = []\n    for _ in range(5000): x = [x]\n    return x",
        "test 0: RecursionError",
    ),
    "it says nonsense": ("import json\njson.dumps = lambda *a, **k: '{}'\ndef f(): return 1", "the program ended"),
    "it names what it lacks": ("def __getattr__(name): return lambda: 1", "test 0: NameError"),
    "it gives back a generator": ("def f(): yield 1", "test 0: AssertionError"),
    "NUL": ("def f(): return 1\x00", ""),
    "half a character": ("def f(): return '\ud83d'", ""),
}


@pytest.mark.parametrize("shut_in", BOTH)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs_fail_and_say_why(name: str, shut_in: bool) -> None:
    text, why = WRONG[name]
    started = time.monotonic()
    verdict = examine(text, ["assert f() == 1"], Limits(seconds=1.0), shut_in)
    assert (verdict.passed, verdict.of) == (0, 1)
    assert (verdict.why or "").startswith(why)
    assert time.monotonic() - started < 20


@needs_sandbox
def test_the_reward() -> None:
    good, bad = "Here:\n```python\ndef f(): return 1\n```\nDone.", "```python\ndef f(): return 2\n```"
    tests = ["assert f() == 1"]
    contents: list[Any] = [good, bad, [{"role": "assistant", "content": good}], good, good]
    made = code_tests(completions=contents, tests=[tests, tests, tests[0], None, ["", " "]])
    assert made == [1.0, 0.0, 1.0, None, None]
    human_eval = "def check(candidate):\n    assert candidate() == 1\n"
    made = code_tests(completions=[good, bad], tests=[human_eval] * 2, entry_point=["f", "f"])
    assert made == [1.0, 0.0]


def test_the_last_block_is_the_program() -> None:
    assert program_of("```python\na\n```\nno:\n```py\nb\nc\n```") == "b\nc"
    assert program_of("a = 1") == "a = 1"
    assert program_of("```\nb") == "b"


def test_refused_where_there_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walls, "why_none", lambda: "bubblewrap (bwrap) is not installed")
    with pytest.raises(ConfigError) as caught:
        code_tests(completions=["f = 1"], tests=["assert f == 1"])
    assert caught.value.message == (
        "code_tests runs what a model wrote, and there is no sandbox to run it in: bubblewrap (bwrap) is not installed"
    )
    assert caught.value.code == "E-REWARD-0004"
    assert "code(i_accept_unsandboxed_code=True)" in (caught.value.hint or "")
    assert code(i_accept_unsandboxed_code=True)(completions=["f = 1"], tests=["assert f == 1"]) == [1.0]


def test_a_machine_without_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    assert walls.why_none.__wrapped__() == "bubblewrap (bwrap) is not installed"
    monkeypatch.setattr(walls.sys, "platform", "darwin")
    assert walls.why_none.__wrapped__() == "bubblewrap is a program for Linux"


def test_a_bubblewrap_that_shuts_nothing_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """One that only runs what it is given is no sandbox: the trial inside looks for itself."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nwhile [ \"$1\" != -- ]; do shift; done; shift\nexec \"$1\" -I -S -B "
                    f"{walls.Path(walls.__file__).with_name('trial.py')}\n")  # fmt: skip
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    why = walls.why_none.__wrapped__()
    assert why == "bubblewrap cannot shut anything in here: it ended with 1"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "the data has no column tests"),
        ({"tests": [5]}, "a row's tests are int, not Python text or a list of texts"),
        ({"tests": [[1]]}, "a row's tests are list, not Python text"),
    ],
)
def test_what_is_no_test(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        code(i_accept_unsandboxed_code=True)(completions=["x"], **columns)


@needs_sandbox
def test_a_sandbox_that_is_gone_is_no_wrong_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_tests(completions=["f = 1"], tests=["assert f == 1"]) == [1.0]
    monkeypatch.setattr(walls.shutil, "which", lambda name: "/bin/false")
    with pytest.raises(RewardError) as caught:
        code_tests(completions=["f = 1"], tests=["assert f == 1"])
    assert caught.value.code == "E-REWARD-0005"
    assert caught.value.message == "code_tests: the sandbox did not start, 3 times in a row"


def test_limits_must_be_some() -> None:
    with pytest.raises(ConfigError, match="seconds must be above 0, megabytes 64 or more"):
        code(megabytes=1)

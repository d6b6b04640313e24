"""A deadline leaves no trace in what is started after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from posttrain.data.rendering import LimitError
from posttrain.data.sandbox import SANDBOX
from posttrain.rewards.deadline import Overdue, Shares, deadline


def test_programs_that_are_started_later_have_their_signals() -> None:
    with deadline(5):
        pass
    asked = "import signal; print(signal.getsignal(signal.SIGPROF) == signal.getsignal(signal.SIGUSR2) == 0)"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "True"


def test_a_template_is_ended_in_time_whatever_its_parent_ignores() -> None:
    previous = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        SANDBOX.close()
        started = time.monotonic()
        with pytest.raises(LimitError):
            SANDBOX.render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})
        assert time.monotonic() - started < 30
    finally:
        signal.signal(signal.SIGPROF, previous)
        SANDBOX.close()


def test_what_takes_too_long_is_ended_again_and_again() -> None:
    for _ in range(3):
        with pytest.raises(Overdue), deadline(0.2):  # noqa: PT012
            while True:
                pass


@pytest.mark.parametrize(
    ("count", "at_once", "expected"), [(1, 1, 5.0), (6, 1, 5.0), (40, 1, 1.0), (40, 8, 5.0), (10, 1, 2.4)]
)
def test_parts_have_all_their_time_unless_others_would_have_none(count: int, at_once: int, expected: float) -> None:
    assert Shares(5.0, count, at_once).next() == 5.0  # nobody waits
    with deadline(600), deadline(30):
        assert Shares(5.0, count, at_once).next() == pytest.approx(expected, rel=0.05)


def test_the_time_is_that_of_the_call_not_of_another_thread() -> None:
    def briefly() -> None:
        with deadline(0.5):
            time.sleep(0.1)

    with deadline(300):
        thread = threading.Thread(target=briefly)
        thread.start()
        time.sleep(0.05)
        assert Shares(5.0, 10).next() == 5.0
        thread.join()
        assert Shares(5.0, 10).next() == 5.0


def test_a_signal_of_the_users_own_is_the_users() -> None:
    came = []
    before = signal.signal(signal.SIGUSR2, lambda *_: came.append(True))
    try:
        with deadline(60):
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.05)
        assert came == [True]
        with pytest.raises(Overdue), deadline(0.1):
            time.sleep(5)
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.05)
        assert came == [True, True]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_nothing_is_left_armed_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"), deadline(0.1):
            pass
    until = time.monotonic() + 1.0
    while time.monotonic() < until:  # the timer of processor time would come in here
        pass

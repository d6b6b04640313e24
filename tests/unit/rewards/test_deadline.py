"""A deadline leaves no trace in what is started after it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from posttrain.data.rendering import LimitError
from posttrain.data.sandbox import SANDBOX
from posttrain.rewards.deadline import Overdue, deadline, fair_limit


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


@pytest.mark.parametrize(("count", "at_once", "expected"), [(1, 1, 5.0), (2, 1, 4.0), (16, 1, 0.5), (16, 2, 1.0)])
def test_parts_share_what_is_left(count: int, at_once: int, expected: float) -> None:
    assert fair_limit(5.0, count, at_once) == 5.0  # nobody waits
    with deadline(60), deadline(10):
        assert fair_limit(5.0, count, at_once) == pytest.approx(expected, rel=0.05)

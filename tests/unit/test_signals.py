"""Signals become a request; a second one does not wait; ignored ones stay ignored; handlers come back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from posttrain.signals import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    """As in a process started from a terminal, whatever the test runner was started from."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_asks_the_second_leaves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.received == name
        message = f"\n{name}: finishing the micro-batch and saving (once more to leave at once)\n"
        assert capsys.readouterr().err == message
        with pytest.raises(KeyboardInterrupt, match=f"second {name}"):
            os.kill(os.getpid(), getattr(signal, name))
        with pytest.raises(KeyboardInterrupt, match="second SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == name


def test_handlers_come_back_also_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with suppress(RuntimeError), StopRequest():
        assert not {signal.getsignal(number) for number in SIGNALS} & set(before)
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_what_was_ignored_stays_ignored() -> None:
    """`nohup posttrain train ... &` survives the terminal's end."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_outside_the_main_thread_it_does_nothing() -> None:
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]

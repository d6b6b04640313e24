"""The hub, asked once and briefly, before anything waits for it.

The libraries that load from it ask a hub that cannot be reached again and again, for half a minute and with a line of
their own each time. Who asks here first knows within seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

OFFLINE = "HF_HUB_OFFLINE=1 does so without asking the hub"
RETRIES = logging.getLogger("huggingface_hub.utils._http")


def answer(question: Callable[[float], Any]) -> Exception | None:
    """Why the hub does not answer `question`, which is given a timeout. In a thread, for a timeout of HTTP does not
    hold for looking up the name of the server, and counts anew for each of its addresses."""
    from huggingface_hub import constants

    seconds = constants.HF_HUB_ETAG_TIMEOUT
    silence = TimeoutError(f"no answer within {seconds} seconds (HF_HUB_ETAG_TIMEOUT sets how many)")
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            question(seconds)
            answers.append(None)
        except Exception as error:  # of whichever HTTP library huggingface_hub uses
            answers.append(error)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else silence


def is_an_answer(error: Exception | None) -> bool:
    """Whether the hub could be reached, whatever it said."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return error is None or isinstance(error, HfHubHTTPError | HFValidationError)


@contextmanager
def without_retries_told() -> Iterator[None]:
    """What is tried again is not for the user to read: what came of it is said once."""
    before = RETRIES.level
    RETRIES.setLevel(logging.ERROR)
    try:
        yield
    finally:
        RETRIES.setLevel(before)


def first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

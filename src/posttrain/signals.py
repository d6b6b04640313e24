"""Turn SIGINT, SIGTERM and SIGHUP into a request that the loop grants at the next safe point.

The first signal asks; work in progress ends, everything is saved, and the process leaves with status 75. A second one
does not wait: it raises KeyboardInterrupt where it stands, and the last checkpoint stays as it is. A signal that was
being ignored goes on being ignored (`nohup` has it so with SIGHUP).
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """Context manager. `received` is the name of the first signal, or None. Outside the main thread Python allows no
    handlers, so there it only ever says None."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}")
        self.received = signal.Signals(number).name
        print(f"\n{self.received}: finishing the micro-batch and saving (once more to leave at once)", file=sys.stderr)

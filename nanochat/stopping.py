"""What may stop or slow a training loop from outside: signals, and Python's garbage collector. Used by trainer.py."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator

PATIENCE_S = 3.0  # between a wish to stop and a demand


class StopRequest:
    """`asked` once there was a Ctrl-C, SIGTERM or lost terminal; a second, not at once, raises KeyboardInterrupt on the spot.

    torchrun passes on what the terminal has sent already: the same wish may come twice.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self._asked_at is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take these signals meanwhile, in the main thread; no other can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask_to_stop(number: int, frame: object) -> None:
            now = time.monotonic()
            if self._asked_at is not None and now - self._asked_at > PATIENCE_S:
                raise KeyboardInterrupt
            if self._asked_at is None and os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(OSError):  # not print, which may be what was interrupted
                    os.write(2, b"\nstopping once this step is saved; again: at once\n")
            self._asked_at = self._asked_at or now

        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup asks for
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, ask_to_stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def collect_garbage() -> None:
    """Free what is garbage, and never look at the rest again: the next call takes as long as there are new objects."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def frozen_garbage() -> Iterator[None]:
    """Keep Python's garbage collector, whose pauses grow with the heap, out of the training steps."""
    collect_garbage()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        gc.collect()

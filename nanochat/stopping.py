"""What may stop or slow a training loop from outside: signals, and Python's garbage collector. Used by trainer.py."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
from collections.abc import Iterator

PATIENCE_S = 3.0  # between a wish to stop and a demand


class StopRequest:
    """`asked` once there was a Ctrl-C or SIGTERM; a second one, not at once, raises KeyboardInterrupt where it meets us.

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
            self._asked_at = self._asked_at or now

        previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def frozen_garbage() -> Iterator[None]:
    """Keep Python's garbage collector, whose pauses grow with the heap, out of the training steps."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        gc.collect()

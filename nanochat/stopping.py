"""What may stop or slow a training loop from outside: signals, and Python's garbage collector. Used by trainer.py."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator

from nanochat.common import get_dist_info

PATIENCE_S = 3.0  # a second signal within this time counts as the same request


class StopRequest:
    """`asked` is True after Ctrl-C, SIGTERM or a lost terminal; a second signal, later, raises KeyboardInterrupt at once.

    torchrun forwards signals that the terminal has sent to us as well, so one request may arrive twice.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self._asked_at is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle these signals inside the `with` block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask_to_stop(number: int, frame: object) -> None:
            now = time.monotonic()
            if self._asked_at is not None and now - self._asked_at > PATIENCE_S:
                raise KeyboardInterrupt
            if self._asked_at is None and get_dist_info().rank == 0:
                with contextlib.suppress(OSError):  # not print: the signal may have interrupted a print
                    os.write(2, b"\nstopping once this step is saved; again: at once\n")
            self._asked_at = self._asked_at or now

        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
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

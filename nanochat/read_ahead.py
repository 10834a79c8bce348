"""A thread that runs an iterator ahead of its consumer. Used by dataloader.py."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Iterates over `items`, produced in a thread up to `depth` ahead; its errors reach the consumer.

    Closing or dropping it ends the thread, as does the end of the process: a thread that returned from torch's C++ after
    the interpreter has ended would abort the process. `items` must not refer to the object that holds this one.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        closed = threading.Event()
        thread = threading.Thread(target=_run, args=(items, self._queue, closed), daemon=True)
        self._end = weakref.finalize(self, _end, thread, self._queue, closed)
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        kind, item = self._queue.get()
        if kind == "item":
            return item
        self._queue.put((kind, item))  # so that another call does not wait forever
        raise item

    def close(self) -> None:
        """End the thread, and wait for it."""
        self._end()


def _end(thread: threading.Thread, items_queue: queue.Queue[tuple[str, Any]], closed: threading.Event) -> None:
    closed.set()
    with contextlib.suppress(queue.Empty):
        items_queue.get_nowait()  # room for the one item that the thread may still put there
    if thread is not threading.current_thread():  # garbage may be collected in that thread, too
        thread.join(timeout=5)


def _run(items: Iterable[Any], items_queue: queue.Queue[tuple[str, Any]], closed: threading.Event) -> None:
    try:
        for item in items:
            items_queue.put(("item", item))
            if closed.is_set():
                return
        items_queue.put(("end", StopIteration()))
    except BaseException as error:  # whatever it is, even a Rust panic, pass it to the waiting consumer
        items_queue.put(("end", error))

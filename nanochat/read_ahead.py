"""A thread that runs an iterator ahead of whoever consumes it. Used by dataloader.py."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Iterates over `items`, made in a thread up to `depth` ahead; what it raises reaches the consumer.

    Close it, or forget it, to end the thread; `items` must not refer to the object that holds this one.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._closed = threading.Event()
        weakref.finalize(self, self._closed.set)
        self._thread = threading.Thread(target=_run, args=(items, self._queue, self._closed), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        kind, item = self._queue.get()
        if kind == "item":
            return item
        self._queue.put((kind, item))  # so that asking once more does not wait for ever
        raise item

    def close(self) -> None:
        """End the thread, and wait for it."""
        self._closed.set()
        self._thread.join(timeout=5)


def _run(items: Iterable[Any], items_queue: queue.Queue[tuple[str, Any]], closed: threading.Event) -> None:
    def put(kind: str, item: Any) -> bool:
        while not closed.is_set():
            try:
                items_queue.put((kind, item), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in items:
            if not put("item", item):
                return
        put("end", StopIteration())
    except Exception as error:  # whatever it is, it belongs to the consumer
        put("end", error)

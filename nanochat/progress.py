"""Live progress of long work: a bar on a terminal, a line now and then elsewhere.

Used by trainer, evaluations, downloads, data_prep and tok_train.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

from nanochat.common import get_dist_info

T = TypeVar("T")
REFRESH_S = 0.2  # on a terminal
SHORT_BAR = 8  # columns of a bar at its shortest, and of the spaces beside it
LINE_S = 10.0  # elsewhere: seconds between lines, and at least a twentieth of the work


class _Console(Console):
    """A console that goes silent when the reader of its output or the terminal has gone, instead of ending the work."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(OSError):  # so that other prints do not fail on the broken pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self.quiet = True

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[None]:
        """If output cannot be written, go silent, except while a disk is full: then try again with the next output."""
        try:
            yield
        except OSError as error:
            self.quiet = error.errno != errno.ENOSPC


class Progress:
    """Shows the stage, steps done, further text and the time left; a context manager. Silent except on rank 0.

    total: None if unknown; it may change. start: steps done in an earlier session. work: maps a number of steps to their
    cost in any unit, if some steps take longer than others. The environment's NANOCHAT_STAGE ("2/6") is shown before the
    stage.
    """

    def __init__(
        self, stage: str, total: int | None, unit: str = "step", start: int = 0, work: Callable[[int], float] = float
    ) -> None:
        place = os.environ.get("NANOCHAT_STAGE")
        self.stage = f"[{place}] {stage}" if place else stage
        self.total, self.unit, self.start, self.work = total, unit, start, work
        self.active = get_dist_info().rank == 0
        self._console = _Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: RichProgress | None = None
        self._shown_at, self._shown_step = 0.0, start
        self._last: tuple[int, tuple[str, ...]] = (start, ())

    def __enter__(self) -> Progress:
        self._began = time.perf_counter()
        # The time left is estimated from the pace of the second half of the work done so far: the (time, step) where that
        # half began, and the next such point.
        self._paced_from = self._paced_next = (self._began, self.start)
        if self.active and self._console.is_terminal:
            count = "{task.completed:,} " + f"{self.unit}s"
            done: ProgressColumn = TextColumn(count) if self.total is None else MofNCompleteColumn()
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(None), done, TextColumn("{task.fields[news]}"),
                console=self._console, auto_refresh=False, expand=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self.start, news="starting")
            with self._console.unharmed():
                self._bar.start()
                self._bar.refresh()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            step, parts = self._last
            with self._console.unharmed():
                self._bar.update(self._task, completed=step, news=self._beside_the_bar(step, time.perf_counter(), parts))
                self._bar.refresh()
                self._bar.stop()

    def update(self, step: int, *parts: str) -> None:
        """Report that `step` of the total are done, and what else to show ("loss 2.5"); cheap enough for every step."""
        if not self.active:
            return
        self._last = step, parts
        now = time.perf_counter()
        if self._work_since(self.start, step) >= 2 * self._work_since(self.start, self._paced_next[1]):
            self._paced_from, self._paced_next = self._paced_next, (now, step)
        ended = self.total is not None and step >= self.total
        if self._bar is not None:
            if ended or now - self._shown_at >= REFRESH_S:
                self._shown_at = now
                with self._console.unharmed():
                    news = self._beside_the_bar(step, now, parts)
                    self._bar.update(self._task, total=self.total, completed=step, news=news)
                    self._bar.refresh()
            return
        far = step - self._shown_step >= (self.total or 0) / 20 and now - max(self._shown_at, self._began) >= LINE_S
        if ended or far or (step == self.start + 1 and self.total is not None):
            self._shown_at, self._shown_step = now, step
            done = f"{step}/{self.total}" if self.total is not None else f"{step}"
            self.print(f"{self.stage}: {self.unit} {done}  {self._describe(step, now, parts)}".rstrip())

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; each counts as a step done when the next one is requested."""
        for step, item in enumerate(items, self.start + 1):
            yield item
            self.update(step)

    def print(self, text: str) -> None:
        """Print a message above the bar."""
        if self.active:
            with self._console.unharmed():
                self._console.print(text, markup=False)

    def _beside_the_bar(self, step: int, now: float, parts: tuple[str, ...]) -> str:
        """The description without its last parts where the terminal has no room for them: never without the time."""
        count = f"{step:,} {self.unit}s" if self.total is None else f"{self.total}/{self.total}"
        room = self._console.width - len(self.stage) - len(count) - SHORT_BAR
        described = (self._describe(step, now, parts[:n]) for n in range(len(parts), 0, -1))
        return next((line for line in described if len(line) <= room), self._describe(step, now, ()))

    def _describe(self, step: int, now: float, parts: tuple[str, ...]) -> str:
        if self.total is None or step >= self.total:
            return "  ".join([*parts, format_seconds(now - self._began)])
        since, first = self._paced_from if self._paced_from[0] > self._began else self._paced_next
        done = self._work_since(first, step)
        if since == self._began or not done:  # the first step says nothing of the others: it loads and starts much
            return "  ".join(parts)
        left = (now - since) / done * self._work_since(step, self.total)
        return "  ".join([*parts, f"{format_seconds(left)} left"])

    def _work_since(self, first: int, step: int) -> float:
        return self.work(step) - self.work(first)


def format_seconds(seconds: float) -> str:
    """75 -> "1:15"; 3675 -> "1:01:15"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"

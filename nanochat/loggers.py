"""Loggers for a run's numbers besides metrics.jsonl: Weights & Biases, TensorBoard, trackio. Used by metrics.py, stage.py
and training_flags.py.

To add one, write a class with the members of Logger and enter it in LOGGERS; flags, help and replaying follow.
All get the same numbers under the names of metrics.jsonl.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from nanochat.common import NanochatError, complain
from nanochat.files import atomic_write

PROJECT = "nanochat"
OPEN_S = 10.0  # seconds to wait for a logger at the start, so that its prompts and messages come before the progress
CLOSE_S = 30.0  # seconds to wait at the end, for rows still to be sent
MAX_WAITING = 20_000  # rows; a logger that is further behind counts as stopped


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told about the stage whose numbers it gets."""

    stage_dir: Path
    name: str
    settings: Mapping[str, Any]
    resume_step: int | None = None  # the step it resumes from; None: it starts


class Logger(Protocol):
    """Opens the LoggedRun that it is made with: a new run, or the same one as before if the run is resumed.

    package: the package it imports, also an extra of pyproject.toml; None (the default of subclasses) if it needs none.
    """

    package: ClassVar[str | None] = None

    def __init__(self, run: LoggedRun) -> None: ...
    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class WandbLogger:
    """One Weights & Biases run per stage; its id is kept in the stage's directory. WANDB_MODE=offline works."""

    package: ClassVar[str | None] = "wandb"

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        id_file = run.stage_dir / "wandb_run_id"
        resumed = run.resume_step is not None and id_file.exists()
        self._run = wandb.init(
            project=PROJECT, name=run.name, config=dict(run.settings), dir=run.stage_dir,
            group=run.settings.get("tag"), job_type=run.settings.get("stage"),
            id=id_file.read_text(encoding="utf-8") if resumed else None, resume="allow" if resumed else None,
        )  # fmt: skip
        atomic_write(id_file, self._run.id)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step >= self._run.step:  # it already has, and would refuse, steps after the checkpoint of a killed run
            self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardLogger:
    """Event files in `tensorboard/` of the stage. A run hides what was written there after the step that it goes on from."""

    package: ClassVar[str | None] = "tensorboard"

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = 0 if run.resume_step is None else run.resume_step + 1  # a start that never got far may have left some
        self._writer = SummaryWriter(str(run.stage_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class TrackioLogger:
    """A trackio run in its local database (`trackio show`), or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    package: ClassVar[str | None] = "trackio"

    def __init__(self, run: LoggedRun) -> None:
        import trackio

        self._run = trackio.init(
            PROJECT, name=run.name, group=run.settings.get("tag"), config=dict(run.settings), embed=False,
            resume="never" if run.resume_step is None else "allow", auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, type[Logger]] = {"wandb": WandbLogger, "tensorboard": TensorBoardLogger, "trackio": TrackioLogger}


def check_installed(name: str) -> None:
    """Raise NanochatError if the package of a logger is missing."""
    package = getattr(LOGGERS[name], "package", None)
    if package is None:
        return
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:  # a mere folder of that name, such as wandb itself makes, has no origin
        raise NanochatError(
            f"{package} is not installed: bash runs/setup.sh {package}, or pip install {package}, or leave out {name}"
        )


class BackgroundLogger:
    """Runs a logger in its own thread: it may wait for a network, or fail, without affecting the training.

    If it fails or falls too far behind, one warning says how to send what it missed, and it gets nothing more.
    """

    def __init__(self, name: str, run: LoggedRun) -> None:
        self._name, self._run = name, run
        self._rows: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._opened, self._broken, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"log to {name}", daemon=True)
        self._thread.start()
        self._opened.wait(OPEN_S)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._put((step, numbers))

    def close(self) -> None:
        self._put(None)
        if not self._broken.is_set():
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                self._give_up(f"it has not taken everything {CLOSE_S:g} s after the end")

    def _put(self, row: tuple[int, Mapping[str, float]] | None) -> None:
        if self._broken.is_set():
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._give_up(f"it is {MAX_WAITING:,} rows behind")

    def _work(self) -> None:
        try:
            logger = LOGGERS[self._name](self._run)
            self._opened.set()
            while (row := self._rows.get()) is not None:
                logger.log(*row)
            logger.close()
        except Exception as error:  # whatever goes wrong in a package, service or disk, training goes on
            self._give_up(f"{type(error).__name__}: {error}")
        finally:
            self._opened.set()

    def _give_up(self, reason: str) -> None:
        with self._lock:
            known = self._broken.is_set()
            self._broken.set()
        if not known:
            complain(
                f"warning: nothing more goes to {self._name} ({' '.join(reason.split())}). The run is not affected, "
                f"metrics.jsonl has everything, and this sends it later: "
                f"python -m nanochat.metrics {self._run.stage_dir.parent.name} --to {self._name}"
            )

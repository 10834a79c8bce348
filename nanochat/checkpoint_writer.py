"""Writes a trainer's checkpoints while training goes on; keeps the newest and the best, and records which is the best.

Used by trainer.py. The tensors are copied, which takes as long as reading memory once; a thread then writes, hashes and
flushes the copy. It computes nothing with torch: a second team of OpenMP threads would slow the training down.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import BEST_FILE, prune, save_checkpoint
from nanochat.common import NanochatError
from nanochat.files import atomic_write, read_json
from nanochat.ranks import on_rank0

State = dict[str, torch.Tensor]


class CheckpointWriter:
    """Writes one checkpoint at a time into `stage_dir`, then removes all but the newest `keep_last` and the best.

    keep_last of 0 or less keeps all.
    """

    def __init__(self, stage_dir: Path, keep_last: int) -> None:
        self.stage_dir, self.keep_last = stage_dir, keep_last
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._copies: tuple[State, State] = ({}, {})  # buffers of the last snapshot, reused

    def start(self, step: int, model_state: State, optimizer_state: State, meta: dict[str, Any], best: int | None) -> None:
        """Copy the tensors and begin to write them. Call `wait` first. best: the step that must not be removed.

        If the host has no memory for copies, the tensors themselves are written while the caller waits.
        """
        try:
            self._copies = (_copy(model_state, self._copies[0]), _copy(optimizer_state, self._copies[1]))
            if any(tensor.is_cuda for tensor in (*model_state.values(), *optimizer_state.values())):
                torch.cuda.synchronize()
        except (RuntimeError, MemoryError):  # torch raises RuntimeError, also when the host is out of memory
            self._copies = ({}, {})
        if not self._copies[0]:  # not in the handler: the traceback keeps the copies alive
            self._write(step, model_state, optimizer_state, meta, best)  # `wait` raises any error
            return
        self._thread = threading.Thread(target=self._write, args=(step, *self._copies, meta, best), name="checkpoint")
        self._thread.start()

    def write(self, step: int, model_state: State, optimizer_state: State, meta: dict[str, Any], best: int | None) -> None:
        """The same, but in the caller's thread, without memory for copies. Raises any error at once."""
        self._write(step, model_state, optimizer_state, meta, best)
        self.wait()

    def prune(self, step: int, best: int | None) -> None:
        """Remove what need not be kept once `step` is there, whose best evaluation is that of step `best`."""
        if self.keep_last > 0:
            prune(self.stage_dir, step, self.keep_last, best)

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. Raises its error, once: most often OSError, for a full disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, model_state: State, optimizer_state: State, meta: dict[str, Any], best: int | None) -> None:
        try:
            save_checkpoint(self.stage_dir, step, model_state, optimizer_state, meta)
            self.prune(step, best)
        except Exception as error:  # whatever it is, `wait` raises it
            self._error = error


class Best:
    """The saved step with the best evaluation: best.json names it, and pruning keeps it.

    metric: the result that decides; with a leading -, lower is better.
    """

    def __init__(self, stage_dir: Path, metric: str, is_writer: bool) -> None:
        self.path, self.is_writer = stage_dir / BEST_FILE, is_writer
        self.name, self.sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
        self.record: dict[str, Any] = {}  # {"step": ..., "value": ...}, or nothing yet
        self._before: dict[str, Any] = {}  # the previous best, in case the new one's checkpoint fails

    @property
    def step(self) -> int | None:
        return self.record.get("step")

    def note(self, step: int, results: dict[str, float]) -> None:
        """Remember a saved step if its result is better than all earlier ones. NaN never is: nothing could replace it."""
        value = results.get(self.name, math.nan)
        if not math.isnan(value) and (not self.record or self.sign * value > self.sign * self.record["value"]):
            self.record, self._before = {"step": step, "value": value}, self.record
            self._write()

    def load(self, record: dict[str, Any], step: int) -> None:
        """Continue from the record that the checkpoint of `step` holds, or from the file's where that is better (a collective
        call). Only the file knows how that checkpoint was evaluated once it was saved; but it may name a later one, of an
        abandoned attempt."""
        self.record = record
        match on_rank0(self._read):
            case {"step": int(saved), self.name: int() | float()} as found if saved <= step:
                self.note(saved, found)
        self._write()

    def fall_back(self, steps: list[int]) -> None:
        """Go back to the previous best, or to none, if the best is not among the steps on disk."""
        if self.record and self.step not in steps:
            self.record = self._before if self._before.get("step") in steps else {}
            self._write()

    def _read(self) -> dict[str, Any]:
        try:
            return read_json(self.path)
        except NanochatError:  # damaged: then the checkpoint's own record is all that is known
            return {}

    def _write(self) -> None:
        if not self.is_writer:
            return
        with contextlib.suppress(OSError):  # a full disk: the next checkpoint will report it
            if self.record:
                atomic_write(self.path, json.dumps({"step": self.record["step"], self.name: self.record["value"]}))
            else:
                self.path.unlink(missing_ok=True)


def _copy(state: State, buffers: State) -> State:
    """Copies of the tensors on the host, in the given buffers if they fit; from a GPU the copy is asynchronous."""
    copies = {}
    for name, tensor in state.items():
        copy = buffers.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    return copies

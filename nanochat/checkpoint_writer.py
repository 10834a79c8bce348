"""Writes a trainer's checkpoints while training goes on; keeps the newest and the best.

Used by trainer.py. The tensors are copied, which takes as long as reading memory once; a thread then writes, hashes and
flushes the copy. It computes nothing with torch: a second team of OpenMP threads would slow the training down.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import prune, save_checkpoint

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


def _copy(state: State, buffers: State) -> State:
    """Copies of the tensors on the host, in the given buffers if they fit; from a GPU the copy is asynchronous."""
    copies = {}
    for name, tensor in state.items():
        copy = buffers.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    return copies

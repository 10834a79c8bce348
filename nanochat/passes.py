"""Forward and backward passes over the micro-batches of an update. Used by trainer.py, and by what measures its speed.

On a GPU a small model's pass is hundreds of kernels, and launching one takes longer than running it. There a pass is
recorded once, as a CUDA graph, and replayed with one call: 2.6 ms instead of 12.8 at depth 4, 101.8 instead of 103.6 at
depth 12 (dev/LOG.md, "A third time on an H200"). NANOCHAT_CUDA_GRAPHS=0 launches kernel by kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from nanochat.common import NanochatError, first_line, logger
from nanochat.compilation import side_stream
from nanochat.gpt import GPT
from nanochat.layers import Embedding

# (inputs, targets, ...), each with B rows; a pass may split it by rows. targets: (B, T) int64, -1: nothing to predict.
Batch = tuple[torch.Tensor, ...]
LossFn = Callable[[GPT, Batch], torch.Tensor]  # gives a sum over rows
Shape = tuple[int, tuple[torch.Size, ...]]  # of a pass: the number of idle blocks, and the inputs' shapes
PIECE_TOKENS = 1024  # tokens in an uncompiled pass on a CPU
STEP_BYTES = 8  # per parameter: the most that an update in one process allocates (see memory.step_bytes)


def recordable(loss_fn: LossFn) -> LossFn:
    """Mark a loss whose passes may be recorded as CUDA graphs: for batches of one shape it always runs the same kernels.

    It must compute on the device alone, from the batch, the model and constants: no `.item()`, no `if` that asks a tensor, no
    result whose shape depends on values, nothing copied from the host. Any other loss launches kernel by kernel.
    """
    loss_fn.recordable = True  # type: ignore[attr-defined]
    return loss_fn


@recordable
def summed_loss(model: GPT, batch: Batch) -> torch.Tensor:
    """The default objective: cross-entropy summed over the supervised tokens, in nats."""
    inputs, targets = batch[:2]
    return model(inputs, targets, loss_reduction="sum")


def count_supervised(batch: Batch) -> torch.Tensor:
    """The number of tokens that have a target: `summed_loss` sums over these."""
    return (batch[1] >= 0).sum()


class Passes:
    """Computes gradients of loss_fn: (model, batch) -> loss, a sum over rows; recorded if it is `recordable`."""

    def __init__(self, model: GPT, loss_fn: LossFn = summed_loss) -> None:
        self.model, self.loss_fn = model, loss_fn
        self._tables = list(model.tables().values())
        self._tried: Shape | None = None  # of the pass that was recorded, or that did not fit in memory
        self._recording: _Recording | None = None

    def run(self, batches: Sequence[Batch], count: torch.Tensor) -> torch.Tensor:
        """Add the gradients of (summed loss of the batches) / count to `.grad`; returns that quotient, () float32.

        Clear the gradients of the previous update first: those of recorded passes start from zero.
        """
        if self._may_record():
            self._record(batches[0], count)
        recording = self._recording
        if recording:
            recording.begin()
        loss = torch.zeros((), device=self.model.get_device())
        for batch in self._pieces(batches):
            if recording and self._shape_of(batch) == self._tried:
                loss += recording.replay(batch, count)
            else:
                loss += self.once(batch, count)
            _join_rows(self._tables)
        return loss

    @property
    def in_pieces(self) -> bool:
        """Whether a pass takes a few rows at a time: on a CPU, as long as the model is not compiled.

        Uncompiled, it keeps several times as much for the backward pass, and is faster when that fits into the cache. Not for
        sharded models: all their ranks must make the same number of passes.
        """
        model = self.model
        short_rows = model.config.sequence_len <= PIECE_TOKENS
        return short_rows and not model.is_compiled and not model.is_sharded and model.get_device().type == "cpu"

    def _pieces(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        if not self.in_pieces:
            return batches
        pieces: list[Batch] = []
        for batch in batches:
            rows = max(1, PIECE_TOKENS // batch[0].size(1))  # of each batch: in reinforcement learning texts differ in length
            pieces += zip(*(tensor.split(rows) for tensor in batch), strict=True)
        return pieces

    def once(self, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        part = self.loss_fn(self.model, batch) / count
        part.backward()
        return part.detach()

    def _shape_of(self, batch: Batch) -> Shape:
        return self.model.idle_blocks, tuple(tensor.shape for tensor in batch)

    def _may_record(self) -> bool:
        """Passes that wait for other ranks, or recompute blocks because memory is short, are not recorded."""
        model = self.model
        fixed = getattr(self.loss_fn, "recordable", False) and not model.is_sharded and not model.recompute_blocks
        allowed = os.environ.get("NANOCHAT_CUDA_GRAPHS", "1") != "0"
        return allowed and fixed and model.is_compiled and model.get_device().type == "cuda"

    def _record(self, batch: Batch, count: torch.Tensor) -> None:
        """Record a pass, once for each number of idle blocks; batches of other shapes are launched kernel by kernel."""
        shape = self._shape_of(batch)
        if self._tried is not None and self._tried[0] == shape[0]:
            return
        self._tried, self._recording = shape, None  # first, to free the memory of the old recording
        try:
            self._recording = _Recording.make(self, batch, count)
        except torch.OutOfMemoryError as error:
            logger.info("passes are launched kernel by kernel: %s", first_line(error)[:200])
        finally:
            self.model.zero_grad(set_to_none=True)


def _join_rows(tables: Sequence[Embedding]) -> None:
    """Add up what sparse gradients of tables (rows, channels) say of one row, before they grow larger than dense ones.

    PyTorch only appends a pass's rows to those of the passes before.
    """
    for table in tables:
        grad = table.weight.grad
        if table.sparse and grad is not None and grad._nnz() > table.weight.size(0):
            table.weight.grad = grad.coalesce()


class _Recording:
    """One pass as a CUDA graph, with its own tensors for the inputs and the gradients."""

    def __init__(self, passes: Passes, batch: Batch, count: torch.Tensor) -> None:
        """Call it when an earlier pass has created the gradients. Raises NanochatError if the pass cannot be recorded."""
        model = passes.model
        self.batch, self.count = batch, count
        self.gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
        self.constants = model.constants(batch[0].size(1))  # kept here: a graph does not keep its inputs alive
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(model.get_device())
        try:
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):  # other threads may go on
                self.loss = passes.once(self.batch, self.count)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # PyTorch's allocator may be broken now, so do not go on without the graph
            raise NanochatError(
                f"a training pass cannot be recorded here ({first_line(error)[:200]}): set NANOCHAT_CUDA_GRAPHS=0"
            ) from error

    @staticmethod
    def make(passes: Passes, batch: Batch, count: torch.Tensor) -> _Recording | None:
        """Warm up and record, if memory allows: a recording keeps a pass's memory, and evaluations need as much again."""
        model, device = passes.model, passes.model.get_device()
        batch, count = tuple(tensor.clone() for tensor in batch), count.clone()
        with side_stream(device):
            for _ in range(2):  # compile, and create everything that is created only once
                model.zero_grad(set_to_none=True)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                passes.once(batch, count)
        needed = 2 * (torch.cuda.max_memory_allocated(device) - before)
        needed += STEP_BYTES * sum(p.numel() for p in model.parameters())
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if free < needed:
            logger.info("passes are launched kernel by kernel: %.1f of %.1f GB are free", free / 1e9, needed / 1e9)
            return None
        return _Recording(passes, batch, count)

    def begin(self) -> None:
        """Set the gradients that replays add to, all zero."""
        torch._foreach_zero_([gradient for _, gradient in self.gradients])
        for parameter, gradient in self.gradients:
            parameter.grad = gradient

    def replay(self, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, by replaying the graph with it; overwritten by the next replay."""
        for mine, tensor in zip((*self.batch, self.count), (*batch, count), strict=True):
            mine.copy_(tensor)
        self.graph.replay()
        return self.loss

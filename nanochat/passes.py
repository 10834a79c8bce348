"""Forward and backward passes over the micro-batches of an update. Used by trainer.py, and by what measures its speed.

On a GPU the pass of a small model is hundreds of kernels, each of which takes less time than to launch it from here. There a
pass is recorded once, as a CUDA graph, and replayed by one call: at depth 4 that takes 2.6 in place of 12.8 ms, at depth 12
101.8 in place of 103.6 (dev/LOG.md, "A third time on an H200").
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from nanochat.common import first_line
from nanochat.compilation import side_stream
from nanochat.gpt import GPT

logger = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, ...]  # (inputs, targets, ...): targets (B, T) int64, -1 where there is nothing to predict


def summed_loss(model: GPT, batch: Batch) -> torch.Tensor:
    """The default objective: cross-entropy summed over the supervised tokens, in nats."""
    inputs, targets = batch[:2]
    return model(inputs, targets, loss_reduction="sum")


class Passes:
    """Makes a model's gradients of loss_fn: (model, batch) -> summed loss. Only the default one is ever recorded."""

    def __init__(self, model: GPT, loss_fn: Callable[[GPT, Batch], torch.Tensor] = summed_loss) -> None:
        self.model, self.loss_fn = model, loss_fn
        self._shape: tuple | None = None  # of the pass that was recorded, or could not be
        self._recording: _Recording | None = None

    def run(self, batches: Sequence[Batch], count: torch.Tensor) -> torch.Tensor:
        """Set `.grad`, None before, to the gradients of the batches' summed loss / count; returns that loss, () float32."""
        if self._may_record() and self._shape_of(batches[0]) != self._shape:
            self._recording = None  # its memory is needed
            self._shape, self._recording = self._shape_of(batches[0]), self._record(batches[0], count)
        recording = self._recording
        if recording:
            recording.begin()
        loss = torch.zeros((), device=self.model.get_device())
        for batch in batches:
            if recording and self._shape_of(batch) == self._shape:
                loss += recording.replay(batch, count)
            else:
                loss += self.once(batch, count)
        return loss

    def once(self, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        part = self.loss_fn(self.model, batch) / count
        part.backward()
        return part.detach()

    def _shape_of(self, batch: Batch) -> tuple:
        return (self.model.idle_blocks, *(tensor.shape for tensor in batch))

    def _may_record(self) -> bool:
        """What waits for other ranks, or recomputes because memory is short, is not recorded."""
        model = self.model
        fixed = self.loss_fn is summed_loss and not model.is_sharded and not model.recompute_blocks
        return fixed and model.is_compiled and model.get_device().type == "cuda"

    def _record(self, batch: Batch, count: torch.Tensor) -> _Recording | None:
        try:
            return _Recording(self, batch, count)
        except Exception as error:  # whatever it is that cannot be recorded, it can be run
            logger.info("passes are launched kernel by kernel: %s", first_line(error)[:200])
            return None
        finally:
            self.model.zero_grad(set_to_none=True)


class _Recording:
    """One pass as a CUDA graph, with tensors of its own for what goes in and for the gradients."""

    def __init__(self, passes: Passes, batch: Batch, count: torch.Tensor) -> None:
        device = passes.model.get_device()
        self.batch, self.count = tuple(tensor.clone() for tensor in batch), count.clone()
        with side_stream(device):
            for _ in range(2):  # compiles, and makes what is made once
                passes.model.zero_grad(set_to_none=True)
                torch.cuda.reset_peak_memory_stats(device)  # what is inside a replayed graph is not counted again
                before = torch.cuda.memory_allocated(device)
                passes.once(self.batch, self.count)
        needed = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if free < 2 * needed:  # a recording keeps what a pass takes, and evaluations need as much besides
            raise MemoryError(f"{free / 1e9:.1f} GB are free, twice {needed / 1e9:.1f} GB would be needed")
        self.gradients = [(p, p.grad) for p in passes.model.parameters() if p.grad is not None]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may do what they do
            self.loss = passes.once(self.batch, self.count)

    def begin(self) -> None:
        """Lay out the gradients that replays add to, all zero."""
        torch._foreach_zero_([gradient for _, gradient in self.gradients])
        for parameter, gradient in self.gradients:
            parameter.grad = gradient

    def replay(self, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        """The loss, good until the next replay."""
        for mine, tensor in zip((*self.batch, self.count), (*batch, count), strict=True):
            mine.copy_(tensor)
        self.graph.replay()
        return self.loss

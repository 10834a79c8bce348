"""Runs the model for generation: prompts in chunks, then one token at a time for many texts. Used by scheduler.py; scripts
that chat or measure use `prepare_for_inference`.

A decoding step is compiled once, for any number of texts and any length: on a CPU with the weights packed for its matrix
units, on CUDA with one graph for each batch size and length, both rounded to powers of two. A step with one text runs as
one with two, so on a CPU a text's tokens do not depend on how many others are in the batch. On a GPU, and in float32 on a
CPU that has not compiled, the draw does not depend on them, but logits may differ by rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.nn as nn

from nanochat.common import NanochatError, first_line, logger
from nanochat.compilation import can_compile, side_stream
from nanochat.gpt import GPT
from nanochat.kv_cache import BLOCK_SIZE, DecodeView, KVBlocks, PrefillView
from nanochat.layers import Linear

COLUMNS_STEP = 8  # blocks: the length of a batch's longest text is rounded up to a multiple of this
MOST_MODELS = 64  # that are compiled in a process, such as one for each GPU; PyTorch would stop after 8
CPU_OPTIONS = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"}
_compiling = threading.Lock()  # threads of several GPUs take turns: a process has only one compiler


class Int8Linear(nn.Module):
    """A matrix in int8 with one scale for each output channel: half the memory of bfloat16, rounded to 1 part in 254."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        """dtype: of the inputs. Scales are stored in it: converting them at each use fails to compile on a GPU."""
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-8)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale


def prepare_for_inference(model: GPT, weights: str = "auto") -> GPT:
    """Change a loaded model in place for generation only: matrices in the compute dtype ("auto") or in "int8".

    Raises NanochatError for any other name.
    """
    if weights not in ("auto", "int8"):
        raise NanochatError(f"weights {weights!r} are not known: choose auto or int8")
    model.eval().requires_grad_(False)
    dtype = model.get_compute_dtype()
    if weights == "int8":
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Linear) and child.in_features >= 64:  # leave the tiny gates exact
                    setattr(module, name, Int8Linear(child, dtype))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(dtype)
    return model


class ModelRunner:
    """Runs one model over KVBlocks, for at most `max_rows` texts in a decoding step."""

    def __init__(self, model: GPT, num_blocks: int, max_rows: int) -> None:
        self.model, self.device, config = model, model.get_device(), model.config
        self.max_blocks = -(-config.sequence_len // BLOCK_SIZE)
        self.memory = KVBlocks(config, num_blocks, self.device, model.get_compute_dtype())
        rows = max(2, max_rows)
        # The inputs of every decoding step, always written in place. Empty rows have block 0 everywhere.
        # The table is wider than any text: its full width would be a special case for the compiler.
        self.table = torch.zeros(rows, self.max_blocks + COLUMNS_STEP, dtype=torch.long, device=self.device)
        self.inputs = torch.zeros(3, rows, dtype=torch.long, device=self.device)  # tokens, those before them, positions
        self._staging = self.inputs  # where the host writes the inputs
        if self.device.type != "cpu":
            self._staging = torch.zeros(3, rows, dtype=torch.long, pin_memory=self.device.type == "cuda")
        self._copied = torch.cuda.Event() if self.device.type == "cuda" else None  # recorded when inputs are copied
        self._columns = torch.zeros(-(-self.max_blocks // COLUMNS_STEP) * COLUMNS_STEP, device=self.device)
        model.rotary(None, config.sequence_len)  # make the whole table now: compiled code must not see it grow
        self._compiled: Callable[..., torch.Tensor] | None = None  # of _decode_step
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._may_capture = True  # until a step cannot be captured

    # ------------------------------------------------------------------------- prompts

    @torch.inference_mode()
    def prefill(self, tokens: list[int], before: int, start: int, blocks: list[int], every: bool = False) -> torch.Tensor:
        """Compute `tokens`, which follow the first `start` tokens of a text; `before` is the token just before them.

        Returns the logits after the last one, (1, vocab_size) float32; with `every`, after each, (T, vocab_size).
        """
        model, T = self.model, len(tokens)
        view = PrefillView(self.memory, blocks, start, T)
        ids = torch.tensor([tokens], device=self.device)
        previous = torch.tensor([[before, *tokens[:-1]]], device=self.device)
        positions = torch.arange(start, start + T, device=self.device)[None]
        last = None if every else torch.tensor([T - 1], device=self.device)
        views = [view] * model.config.n_layer
        x = model.trunk(ids, model.rotary(positions, T), views, places=last, previous=previous)
        return model.logits(x[0] if every else x)

    @torch.inference_mode()
    def copy_block(self, source: int, targets: list[int]) -> None:
        """Copy the keys and values of one block to others."""
        blocks = torch.tensor(targets, device=self.device)
        for memory in (*self.memory.keys, *self.memory.values):
            memory[blocks] = memory[source].clone()

    # ------------------------------------------------------------------------- decoding

    def set_block(self, row: int, column: int, block: int) -> None:
        self.table[row, column].fill_(block)  # assigning it would copy from the host, and wait

    def set_row(self, row: int, blocks: list[int]) -> None:
        """Assign a row of the batch to a text with these blocks."""
        self.table[row] = torch.tensor(blocks + [0] * (self.table.size(1) - len(blocks)), device=self.device)

    def move_row(self, source: int, target: int) -> None:
        """Move the text in row `source` to row `target`; `source` becomes empty."""
        if source != target:
            self.table[target] = self.table[source]
        self.table[source] = 0

    @torch.inference_mode()
    def decode(self, tokens: list[int], previous: list[int], positions: list[int]) -> torch.Tensor:
        """Compute one more token for each of the first B rows; returns logits (B, vocab_size) float32.

        previous: the token before each.
        """
        B = len(tokens)
        if self._copied is not None:
            self._copied.synchronize()  # if tokens are forced, nothing else waits for the previous step
        staging = self._staging.numpy()  # writing through numpy takes a tenth of the time of making a tensor
        staging[0, :B], staging[1, :B], staging[2, :B] = tokens, previous, positions
        rows = self._rows_to_run(B)
        staging[:, B:rows] = 0
        if self._staging is not self.inputs:
            self.inputs.copy_(self._staging, non_blocking=self._copied is not None)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.device))
        columns = -(-(max(positions) + 1) // (BLOCK_SIZE * COLUMNS_STEP)) * COLUMNS_STEP
        return self._run(rows, columns)[:B]

    def _rows_to_run(self, B: int) -> int:
        """At least two, so that a single text is computed like several; on CUDA a power of two, for fewer graphs."""
        rows = max(2, B)
        return min(1 << (rows - 1).bit_length(), self.table.size(0)) if self.device.type == "cuda" else rows

    def _run(self, rows: int, columns: int) -> torch.Tensor:
        if not self.is_compiled or self.device.type != "cuda":
            return self._step(*self._arguments(rows, columns))
        columns = 1 << (columns - 1).bit_length()  # fewer graphs
        arguments = self._arguments(rows, min(columns, self._columns.size(0)))
        if (rows, columns) not in self._graphs and self._may_capture:
            self._capture(rows, columns, arguments)
        if (rows, columns) not in self._graphs:
            return self._step(*arguments)
        graph, logits = self._graphs[rows, columns]
        graph.replay()
        return logits

    def _arguments(self, rows: int, columns: int) -> tuple:
        memory = self.memory
        return (
            *(row[:rows] for row in self.inputs), self.table[:rows], self._columns[:columns], memory.keys, memory.values,
        )  # fmt: skip

    def _decode_step(
        self,
        tokens: torch.Tensor,
        previous: torch.Tensor,
        positions: torch.Tensor,
        table: torch.Tensor,
        columns: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        """The step that is compiled. tokens, previous, positions: (B,); others: see DecodeView. Returns (B, vocab_size)."""
        model = self.model
        view = DecodeView(keys, values, table, positions, columns, self.max_blocks)
        rotary, views = model.rotary(positions[:, None], 1), [view] * model.config.n_layer
        x = model.trunk(tokens[:, None], rotary, views, previous=previous[:, None])
        return model.logits(x[:, 0])

    # ------------------------------------------------------------------------- compiling

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    @property
    def _step(self) -> Callable[..., torch.Tensor]:
        return self._compiled or self._decode_step

    def compile(self, frozen: bool = True) -> str | None:
        """Compile the decoding step; returns the reason if that is impossible.

        frozen: the weights will not change afterwards, so a CPU can pack them for its matrix units. No other thread may
        compute meanwhile: while it traces, the compiler replaces parts of PyTorch for all threads.
        """
        return can_compile(self.device) or self._compile(frozen)

    @torch.inference_mode()
    def _compile(self, frozen: bool) -> str | None:
        self.model.compute_dtype = self.model.get_compute_dtype()  # compiled code cannot query the CPU's features
        import torch._dynamo.config as dynamo_config  # imported here because it takes a second
        from torch._inductor import config as inductor_config

        options = dict(CPU_OPTIONS) if self.device.type == "cpu" and frozen else {}
        if options and any(isinstance(module, Int8Linear) for module in self.model.modules()):
            options["max_autotune_gemm_backends"] = "CPP,ATEN"  # the template has no kernel for some int8 products
        compiled: Callable[..., torch.Tensor] = torch.compile(self._decode_step, fullgraph=True)
        scratch = self._scratch()
        try:
            # Not as options of torch.compile: freezing must already be set when the graph is traced.
            with _compiling, inductor_config.patch(options), dynamo_config.patch(recompile_limit=MOST_MODELS):
                compiled(*scratch, self.memory.keys, self.memory.values)
        except Exception as error:  # whatever the compiler raises, generation works without it
            return f"the compiler failed: {first_line(error)[:200]}"
        self._compiled = compiled
        return None

    @torch.inference_mode(False)  # tensors of the same kind as the real ones
    def _scratch(self) -> tuple[torch.Tensor, ...]:
        """Inputs for two rows that touch only block 0, with their sizes marked as dynamic."""
        ids = torch.zeros(3, self.table.size(0), dtype=torch.long, device=self.device)
        table = torch.zeros_like(self.table)
        tensors = (*(row[:2] for row in ids), table[:2], self._columns[:COLUMNS_STEP])
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return tensors

    def _capture(self, rows: int, columns: int, arguments: tuple) -> None:
        """Record the compiled step for one batch size and length as a CUDA graph, which a single call replays."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)  # PyTorch's default stream is on one GPU
        current = torch.cuda.current_stream(self.device)
        with _compiling:
            with side_stream(self.device):
                for _ in range(2):  # compile, and fill PyTorch's memory pools
                    self._step(*arguments)
            try:
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    logits = self._step(*arguments)
            except Exception as error:  # whatever it is, texts go on: trying again at each step would end them all
                torch.cuda.set_stream(current)  # PyTorch may not have left the other one
                logger.warning("further decoding steps are launched kernel by kernel: %s", first_line(error)[:200])
                self._may_capture = False
                return
        self._graphs[rows, columns] = (graph, logits)

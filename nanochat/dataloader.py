"""Packs documents into rows of token ids for pretraining. Used by scripts/base_train and scripts/base_eval.

Every row begins with BOS and is full. Whole documents are placed best fit first; when none fits, the first of a waiting
document goes in and the rest goes on in later rows, again behind a BOS: nothing is cut away and nothing is read twice.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nanochat.common import NanochatError
from nanochat.dataset import Source
from nanochat.tokenizer import Tokenizer

BUFFER_DOCUMENTS = 256  # documents to choose from when a row is filled
READ_DOCUMENTS = 64  # documents that the thread tokenizes at a time
PREFETCH = 8  # batches of such documents that may wait


class TokenLoader:
    """Iterates over (inputs, targets), each (batch_size, sequence_len) int64 on `device`.

    With `loop`, epochs follow each other in the same order without end. Without, every token of the split is a target
    once; what is left of the last batch is padding, with targets of -1. Rank r of n reads documents r, r + n, ...
    Tokenization runs in a thread ahead of the consumer. Close it, or use it in a `with` statement, to end the thread.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_len: int,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        loop: bool = True,
        num_threads: int = 2,
    ) -> None:
        self.source, self.tokenizer, self.split = source, tokenizer, split
        self.batch_size, self.row_len = batch_size, sequence_len + 1
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.loop, self.num_threads = loop, num_threads
        self.bos = tokenizer.get_bos_token_id()
        self.epoch = 0
        self.next_document = rank  # the first document of this epoch that is not in the buffer yet
        self._tokens_read = self._tokens_placed = 0
        # (epoch, document, offset, tokens from there on), the longest waiting first
        self._buffer: list[tuple[int, int, int, np.ndarray]] = []
        self._reader: _Reader | None = None
        self._exhausted = False

    # ------------------------------------------------------------------------- filling the buffer

    def _refill(self) -> None:
        """Take tokenized documents from the thread until the buffer is full or the data ends."""
        if self._reader is None:
            self._reader = _Reader(self, self.epoch, self.next_document)
        while len(self._buffer) < BUFFER_DOCUMENTS and not self._exhausted:
            item = self._reader.get()
            if item is None:
                self._exhausted = True
                return
            epoch, document, tokens = item
            self._buffer.append((epoch, document, 0, tokens))
            self._tokens_read += len(tokens)
            self.epoch, self.next_document = epoch, document + self.world_size

    # ------------------------------------------------------------------------- packing

    def _next_row(self) -> tuple[np.ndarray, int] | None:
        """(ids (row_len,), how many are real) of the next row; None when there is nothing left."""
        self._refill()
        if not self._buffer:
            return None
        row = np.full(self.row_len, self.bos, dtype=np.int64)
        used = 0
        while used < self.row_len - 1:
            self._refill()
            if not self._buffer:
                break
            room = self.row_len - used - 1  # behind the BOS that opens a document, or its continuation
            index, length = self._choose(room, used == 0)
            epoch, document, offset, tokens = self._buffer[index]
            row[used + 1 : used + 1 + length] = tokens[:length]
            used += 1 + length
            self._tokens_placed += length
            del self._buffer[index]
            if length < len(tokens):  # back in the queue, so that a batch is of many documents and not of one book
                self._buffer.append((epoch, document, offset + length, tokens[length:]))
        return row, max(used, 1)

    def _choose(self, room: int, row_is_empty: bool) -> tuple[int, int]:
        """(index in the buffer, tokens to take): the longest document that fits, else the first part of another.

        The longest waiting opens each row, whole or in part, so that none waits for ever.
        """
        if row_is_empty:
            return 0, min(room, len(self._buffer[0][3]))
        lengths = np.fromiter((len(entry[3]) for entry in self._buffer), dtype=np.int64, count=len(self._buffer))
        fitting = np.where(lengths <= room, lengths, -1)
        best = int(fitting.argmax())
        if fitting[best] > 0:
            return best, int(fitting[best])
        return 0, min(room, int(lengths[0]))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.full((self.batch_size, self.row_len), self.bos, dtype=np.int64)
        lengths = np.zeros(self.batch_size, dtype=np.int64)
        for i in range(self.batch_size):
            found = self._next_row()
            if found is None:
                break
            rows[i], lengths[i] = found
        if not lengths.any():
            raise StopIteration
        targets = rows[:, 1:].copy()
        targets[np.arange(1, self.row_len) >= lengths[:, None]] = -1
        inputs = torch.from_numpy(np.ascontiguousarray(rows[:, :-1]))
        batch = inputs, torch.from_numpy(targets)
        if self.device.type == "cuda":
            return tuple(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in batch)
        return tuple(tensor.to(self.device) for tensor in batch)

    # ------------------------------------------------------------------------- state

    def stats(self) -> dict[str, float]:
        """Tokens read so far, and the share of them that was given out; what still waits is not lost."""
        waiting = sum(len(entry[3]) for entry in self._buffer)
        used = self._tokens_placed / max(1, self._tokens_read - waiting)
        return {"tokens_read": self._tokens_read, "tokens_used": self._tokens_placed, "share": used, "epoch": self.epoch}

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is (not the thread), JSON: the buffer by document and offset, and the next document."""
        return {
            "epoch": self.epoch,
            "next_document": self.next_document,
            "buffer": [list(entry[:3]) for entry in self._buffer],
            "tokens_read": self._tokens_read,
            "tokens_placed": self._tokens_placed,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the loader that gave this state would have. Raises NanochatError if the data is not the same."""
        if state["world_size"] != self.world_size:
            raise NanochatError(
                f"this run's data was divided among {state['world_size']} processes, not {self.world_size}: "
                "resume with as many"
            )
        self.close()
        self._exhausted = False
        self.epoch, self.next_document = state["epoch"], state["next_document"]
        self._tokens_read, self._tokens_placed = state["tokens_read"], state["tokens_placed"]
        wanted = sorted({document for _, document, _ in state["buffer"]})
        texts = dict(zip(wanted, self._documents_at(wanted), strict=False))
        if len(texts) < len(wanted):
            raise NanochatError(f"{self.source.name} has fewer documents than when this run began: restore it")
        tokens = dict(zip(texts, self._tokenize(list(texts.values())), strict=True))
        self._buffer = [(epoch, doc, offset, tokens[doc][offset:]) for epoch, doc, offset in state["buffer"]]

    def _documents_at(self, indices: list[int]) -> Iterator[str]:
        """The documents with these numbers (ascending), in one pass."""
        remaining = iter(indices)
        index = next(remaining, None)
        if index is None:
            return
        for number, text in enumerate(self.source.documents(self.split, index), index):
            if number == index:
                yield text
                index = next(remaining, None)
                if index is None:
                    return

    def _tokenize(self, texts: list[str]) -> list[np.ndarray]:
        rows = self.tokenizer.encode(texts, num_threads=self.num_threads)
        return [np.asarray(row, dtype=np.int32) for row in rows]

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Reader:
    """A thread that reads and tokenizes ahead, through a bounded queue; its failure reaches the consumer."""

    def __init__(self, loader: TokenLoader, epoch: int, next_document: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(PREFETCH)
        self._ready: Iterator[tuple[int, int, np.ndarray]] = iter(())
        self._closed = threading.Event()
        self._step = loader.world_size
        # The thread holds what it needs but not the loader, so that a forgotten loader can be collected.
        arguments = (loader.source, loader.split, loader.rank, loader.world_size, loader.loop, loader._tokenize)
        self._thread = threading.Thread(target=self._run, args=(*arguments, epoch, next_document), daemon=True)
        self._thread.start()

    def _run(self, source, split, rank, world_size, loop, tokenize, epoch: int, first: int) -> None:
        try:
            while True:
                number, texts, found = first, [], False
                for text in source.documents(split, first, world_size):
                    found = True
                    texts.append(text)
                    if len(texts) == READ_DOCUMENTS:
                        if not self._put((epoch, number, tokenize(texts))):
                            return
                        number, texts = number + world_size * len(texts), []
                if texts and not self._put((epoch, number, tokenize(texts))):
                    return
                if not found and first == rank:
                    raise NanochatError(f"{source.name} has no {split} document for rank {rank} of {world_size}")
                if not loop:
                    self._put(None)
                    return
                epoch, first = epoch + 1, rank
        except Exception as error:  # whatever it is, it belongs to the consumer
            self._put(error)

    def _put(self, item: Any) -> bool:
        """Wait for room; False once the reader is closed."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def get(self) -> tuple[int, int, np.ndarray] | None:
        """(epoch, document number, tokens) of the next document, or None at the end of the data."""
        while True:
            item = next(self._ready, None)
            if item is not None:
                return item
            chunk = self._queue.get()
            if chunk is None:
                return None
            if isinstance(chunk, Exception):
                raise chunk
            epoch, number, rows = chunk
            self._ready = iter([(epoch, number + i * self._step, row) for i, row in enumerate(rows)])

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=5)

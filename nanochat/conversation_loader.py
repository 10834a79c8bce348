"""Packs whole conversations into rows, supervised on the assistant's tokens. Used by scripts/chat_sft.

A row holds as many conversations as fit, best fit first, and is padded; no conversation is cut to fill a row. One that is
longer than a row is truncated to it and counted; one that then has nothing supervised is left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nanochat.common import NanochatError
from nanochat.tokenizer import Tokenizer
from tasks.common import Task

BUFFER_SIZE = 128  # conversations to choose from when a row is filled


class ConversationLoader:
    """Iterates over (inputs, targets), each (batch_size, sequence_len) int64; targets are -1 where not supervised.

    With `loop`, epochs follow each other without end, each in an order of its own; without, one pass in the task's own
    order, the last batch filled with padding. Each rank reads every world_size-th conversation.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_len: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        loop: bool = True,
        seed: int = 42,
    ) -> None:
        if len(task) < world_size:
            raise NanochatError(f"{len(task)} conversations are too few for {world_size} ranks: give more data")
        self.task, self.tokenizer = task, tokenizer
        self.batch_size, self.row_len = batch_size, sequence_len + 1
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.loop, self.seed = loop, seed
        self.epoch = 0
        self.cursor = rank  # the next place in the epoch's order
        self.counts: Counter[str] = Counter()
        self._order = self._make_order()
        self._buffer: list[tuple[int, np.ndarray, np.ndarray]] = []  # (index, ids, mask), in the order they were read

    # ------------------------------------------------------------------------- reading

    def _make_order(self) -> np.ndarray:
        if not self.loop:
            return np.arange(len(self.task))
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.task))

    def _render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of a conversation, cut to a row's length."""
        ids, mask = self.tokenizer.render_conversation(self.task[index], max_tokens=self.row_len + 1)
        return np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=bool)

    def _refill(self) -> None:
        """Read conversations until the buffer is full or the data ends."""
        unusable = 0
        while len(self._buffer) < BUFFER_SIZE:
            if self.cursor >= len(self._order):
                if not self.loop:
                    return
                self.epoch, self.cursor = self.epoch + 1, self.rank
                self._order = self._make_order()
            index = int(self._order[self.cursor])
            self.cursor += self.world_size
            ids, mask = self._render(index)
            self.counts["conversations"] += 1
            if len(ids) > self.row_len:
                self.counts["truncated"] += 1
                ids, mask = ids[: self.row_len], mask[: self.row_len]
            if not mask[1:].any():
                self.counts["skipped"] += 1
                unusable += 1
                if unusable > len(self.task):
                    raise NanochatError(
                        f"no conversation has an assistant's token within {self.row_len - 1} tokens: raise --max-seq-len"
                    )
                continue
            self._buffer.append((index, ids, mask))

    # ------------------------------------------------------------------------- packing

    def _next_row(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids (row_len,) and targets (row_len - 1,) of the next row; None when there is nothing left."""
        self._refill()
        if not self._buffer:
            return None
        ids = np.full(self.row_len, self.tokenizer.get_bos_token_id(), dtype=np.int64)
        mask = np.zeros(self.row_len, dtype=bool)
        used = 0
        while self._buffer:
            fitting = [i for i, entry in enumerate(self._buffer) if len(entry[1]) <= self.row_len - used]
            if not fitting:
                break
            # The oldest opens a row, so that none waits for ever; then the longest that fits.
            best = 0 if used == 0 else max(fitting, key=lambda i: len(self._buffer[i][1]))
            _, conversation, supervised = self._buffer.pop(best)
            ids[used : used + len(conversation)] = conversation
            mask[used : used + len(conversation)] = supervised
            used += len(conversation)
            if not self._buffer:
                self._refill()
        self.counts["tokens"] += used
        self.counts["slots"] += self.row_len
        return ids, np.where(mask[1:], ids[1:], -1)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [row for row in (self._next_row() for _ in range(self.batch_size)) if row is not None]
        if not rows:
            raise StopIteration
        inputs = np.full((self.batch_size, self.row_len - 1), self.tokenizer.get_bos_token_id(), dtype=np.int64)
        targets = np.full_like(inputs, -1)
        for i, (ids, row_targets) in enumerate(rows):
            inputs[i], targets[i] = ids[:-1], row_targets
        tensors = torch.from_numpy(inputs), torch.from_numpy(targets)
        if self.device.type == "cuda":
            return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in tensors)
        return tuple(t.to(self.device) for t in tensors)

    # ------------------------------------------------------------------------- state

    def stats(self) -> dict[str, float]:
        """Conversations read, truncated and skipped so far, and the share of the rows that is not padding."""
        names = ("conversations", "truncated", "skipped")
        filled = self.counts["tokens"] / max(1, self.counts["slots"])
        return {**{name: self.counts[name] for name in names}, "epoch": self.epoch, "filled": filled}

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "buffer": [index for index, _, _ in self._buffer],
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the loader that gave this state would have, on the same task and number of ranks."""
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self.counts = Counter(state["counts"])
        self._order = self._make_order()
        self._buffer = [
            (index, ids[: self.row_len], mask[: self.row_len])
            for index, (ids, mask) in ((index, self._render(index)) for index in state["buffer"])
        ]


def estimate_tokens(task: Task, tokenizer: Tokenizer, sequence_len: int, sample_size: int = 1000) -> int:
    """Tokens in one pass over a task, from the mean length of conversations evenly spread over it."""
    indices = np.unique(np.linspace(0, len(task) - 1, min(sample_size, len(task))).astype(int))
    lengths = [len(tokenizer.render_conversation(task[int(i)], max_tokens=sequence_len + 1)[0]) for i in indices]
    return round(sum(lengths) / len(lengths) * len(task))

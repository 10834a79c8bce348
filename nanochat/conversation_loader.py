"""Packs whole conversations into rows, supervised on the assistant's tokens. Used by scripts/chat_sft.py;
same_run.py uses its fingerprint of conversations.

A row holds as many conversations as fit, best fit first, and is padded; no conversation is cut to fill a row. One that is
longer than a row is truncated and counted; if nothing supervised remains, it is skipped and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nanochat.common import NanochatError
from nanochat.devices import to_device
from nanochat.lanes import count_lanes, epoch_order, rank_lanes, rows_of_rank
from nanochat.ranks import gather_objects
from nanochat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tasks.common import Conversation, Task

LANE_CONVERSATIONS = 16  # to choose from when a row is filled


class ConversationLoader:
    """Iterates over (inputs, targets), each (batch_size, sequence_len) int64; targets are -1 where not supervised.

    With `loop`, epochs follow each other without end, each in its own order; without, one pass in the task's own order,
    with the last batches padded. Conversations are dealt in turn to lanes (lanes.py): the n-th rows of all ranks together
    are the same for any number of ranks that divides lanes.LANES.
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
        if not len(task):
            raise NanochatError("there is no conversation to learn from: give more data")
        self.task, self.tokenizer = task, tokenizer
        self.batch_size, self.row_len = batch_size, sequence_len + 1
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.loop, self.seed = loop, seed
        self.rows = 0  # made by this rank
        self.counts: Counter[str] = Counter()
        self._unusable: set[int] = set()  # conversations whose answers begin behind a row's end: not tokenized again
        self._set_lanes(count_lanes(world_size))

    def _set_lanes(self, num_lanes: int) -> None:
        self.num_lanes = num_lanes
        self._lanes = {lane: _Lane(cursor=lane) for lane in rank_lanes(num_lanes, self.rank, self.world_size)}

    # ------------------------------------------------------------------------- reading

    def _index(self, cursor: int) -> int | None:
        """The index of the conversation at a place in the run; None when the data has ended."""
        epoch, at = divmod(cursor, len(self.task))
        if not self.loop:
            return at if epoch == 0 else None
        return int(epoch_order(self.seed, epoch, len(self.task))[at])

    def _render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of a conversation, at most one token longer than a row."""
        ids, mask = self.tokenizer.render_conversation(self.task[index], max_tokens=self.row_len + 1)
        return np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=bool)

    def _refill(self, lane: _Lane) -> None:
        """Read conversations until the lane has enough to choose from or the data ends.

        Those of an epoch are all given out before the next one's are read, which would otherwise be chosen in their place.
        """
        while len(lane.buffer) < LANE_CONVERSATIONS and (index := self._index(lane.cursor)) is not None:
            if lane.buffer and lane.cursor // len(self.task) > (lane.cursor - self.num_lanes) // len(self.task):
                break
            lane.cursor += self.num_lanes
            if index not in self._unusable:
                ids, mask = self._render(index)
                if mask[1 : self.row_len].any():
                    lane.buffer.append((index, ids, mask))
                    continue
                self._unusable.add(index)
                if self.loop and len(self._unusable) == len(self.task):
                    raise NanochatError(
                        f"no conversation has an assistant's token within {self.row_len - 1} tokens: raise --max-seq-len"
                    )
            self.counts["skipped"] += 1

    # ------------------------------------------------------------------------- packing

    def _next_row(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids (row_len,) and targets (row_len - 1,) of the next row; None when there is nothing left."""
        turns = list(self._lanes.values())
        lane = turns[self.rows % len(turns)]
        self._refill(lane)
        if not lane.buffer:  # it has ended, without a next epoch: its rows are empty, so that other lanes' keep their numbers
            for other in turns:
                self._refill(other)
            if not any(other.buffer for other in turns):
                return None
        self.rows += 1
        return self._fill(lane)

    def _fill(self, lane: _Lane) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full(self.row_len, self.tokenizer.get_bos_token_id(), dtype=np.int64)
        mask = np.zeros(self.row_len, dtype=bool)
        used = 0
        while lane.buffer:
            # The oldest opens a row, so that none waits forever; then the longest that fits.
            fitting = [i for i, entry in enumerate(lane.buffer) if len(entry[1]) <= self.row_len - used] if used else [0]
            if not fitting:
                break
            _, conversation, supervised = lane.buffer.pop(max(fitting, key=lambda i: len(lane.buffer[i][1])))
            self.counts["conversations"] += 1
            self.counts["truncated"] += len(conversation) > self.row_len
            count = min(len(conversation), self.row_len)
            ids[used : used + count] = conversation[:count]
            mask[used : used + count] = supervised[:count]
            used += count
            if not lane.buffer:
                self._refill(lane)
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
        return to_device(inputs, self.device), to_device(targets, self.device)

    # ------------------------------------------------------------------------- state

    def stats(self) -> dict[str, float]:
        """Counts of conversations delivered, truncated and skipped, and the share of rows that is not padding.

        Over all ranks (a collective call).
        """
        counts: Counter[str] = sum(map(Counter, gather_objects(dict(self.counts))), Counter())
        filled = counts["tokens"] / max(1, counts["slots"])
        return {**{name: counts[name] for name in ("conversations", "truncated", "skipped")}, "filled": filled}

    def state_dict(self) -> dict[str, Any]:
        """This rank's place in the data, as JSON."""
        lanes = {str(number): {"cursor": lane.cursor, "buffer": [index for index, _, _ in lane.buffer]}
                 for number, lane in self._lanes.items()}  # fmt: skip
        return {"num_lanes": self.num_lanes, "rows": self.rows, "lanes": lanes, "counts": dict(self.counts)}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue on the same task as the loaders that saved these states would have; states: one for each rank then.

        Raises NanochatError if this number of ranks cannot share the data.
        """
        self._set_lanes(states[0]["num_lanes"])
        saved = {number: lane for state in states for number, lane in state["lanes"].items()}
        for number, lane in self._lanes.items():
            lane.cursor = saved[str(number)]["cursor"]
            lane.buffer = [(index, *self._render(index)) for index in saved[str(number)]["buffer"]]
        self.rows = rows_of_rank([state["rows"] for state in states], self.world_size)
        if len(states) == self.world_size:
            self.counts = Counter(states[self.rank]["counts"])
        else:
            self.counts = sum((Counter(state["counts"]) for state in states), Counter()) if self.rank == 0 else Counter()


@dataclass
class _Lane:
    cursor: int  # the next conversation, by its place in the run
    buffer: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)  # (index, ids, mask), as they were read


def estimate_tokens(task: Task, tokenizer: Tokenizer, sequence_len: int, sample_size: int = 1000) -> int:
    """Estimated tokens, padding included, in one pass over a task, by packing a sample spread evenly over it."""
    sample: Any = list(_spread(task, sample_size))
    loader = ConversationLoader(sample, tokenizer, 1, sequence_len, loop=False)
    loader._set_lanes(1)  # a single lane, so that only the last row is not full
    rows = sum(1 for _ in loader)
    return round(rows / len(sample) * len(task) * sequence_len)


def check_answers(task: Task, tokenizer: Tokenizer, sequence_len: int) -> None:
    """Raise NanochatError before training if there is no answer to validate on."""
    num_bytes = tokenizer.get_token_bytes()  # 0 for the end of an answer, which is all that an empty one has
    rows = ConversationLoader(task, tokenizer, 1, sequence_len, loop=False)
    if not any(num_bytes[targets[targets >= 0]].any() for _, targets in rows):
        raise NanochatError(
            f"none of the {len(task)} conversations held out to validate on has an assistant's text within {sequence_len} "
            "tokens: raise --max-seq-len, or give more conversations"
        )


def fingerprint(task: Task) -> str:
    """A hash of a sample spread evenly over a task: differs between tasks, but may miss a few changes."""
    return hashlib.sha256(json.dumps(list(_spread(task)), sort_keys=True).encode()).hexdigest()


def _spread(task: Task, most: int = 1000) -> Iterator[Conversation]:
    for i in np.unique(np.linspace(0, len(task) - 1, min(most, len(task))).astype(int)):
        yield task[int(i)]

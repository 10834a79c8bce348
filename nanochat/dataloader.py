"""Packs documents into rows of token ids for pretraining. Used by scripts/base_train and scripts/base_eval.

Every row begins with BOS and is full. Whole documents are placed best fit first. When none fits, the beginning of one
fills the row and its rest follows in later rows, again behind a BOS. So no text is dropped and none is read twice.

On the way: documents -> dealt to lanes (lanes.py) -> tokenized, in one thread -> packed, in another -> batches.
"""

from __future__ import annotations

import bisect
import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.common import NanochatError
from nanochat.dataset import Document, Source
from nanochat.devices import to_device
from nanochat.lanes import LANES, count_lanes, lightest_lane, rank_lanes, rows_of_rank
from nanochat.read_ahead import ReadAhead
from nanochat.tokenizer import Tokenizer

LANE_DOCUMENTS, LANE_ROWS = 32, 32  # a lane holds this many documents to choose from, or this many rows if they are long
CHUNK_DOCUMENTS, CHUNK_SIZE = 128, 1_000_000  # documents tokenized at a time; fewer if they exceed this many characters
CHUNKS_AHEAD = 4
FAR = 4096  # documents: across a larger gap, reopening the file beats reading through it
BATCHES_AHEAD = 4


class TokenLoader:
    """Iterates over (inputs, targets), each (batch_size, sequence_len) int64 on `device`.

    With `loop`, epochs repeat without end in the same order. Without it, each token of the split is a target once, and
    the last batches are padded with targets of -1. The n-th rows of all ranks together are the same for any number of ranks;
    with `loop`, for any that divides lanes.LANES. Tokenizing and packing run in threads ahead of the consumer; close the
    loader, or use it in a `with` statement, to end them.
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
    ) -> None:
        self.source, self.tokenizer, self.split = source, tokenizer, split
        self.batch_size, self.row_len = batch_size, sequence_len + 1
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.loop = loop
        lanes = count_lanes(world_size) if loop else LANES
        # Without a next epoch, lanes end, and only a rank that packs all of them knows whose turn is next.
        packed = rank_lanes(lanes, rank, world_size) if loop else range(lanes)
        self._lanes = {lane: _Lane(self.row_len) for lane in packed}
        self._place = _Place(_Reading(0, 0, (0,) * lanes), 0, 0, _snapshot(self._lanes))
        self._batches: ReadAhead[tuple[np.ndarray, np.ndarray, _Place]] | None = None

    def _start(self) -> ReadAhead[tuple[np.ndarray, np.ndarray, _Place]]:
        place, bos = self._place, self.tokenizer.get_bos_token_id()
        first = {number: lane.next for number, lane in self._lanes.items()}
        dealt = _deal(self.source, self.split, self.loop, place.reading, first, self.tokenizer.get_vocab_size())
        tokenized = ReadAhead(_tokenize(dealt, self.tokenizer), CHUNKS_AHEAD)
        # Row n is for rank n % world_size, whether a rank packs only its own rows or those of all.
        rows, own = self.batch_size, slice(None)
        if not self.loop:
            rows, own = rows * self.world_size, slice(self.rank, None, self.world_size)
        return ReadAhead(_Packer(tokenized, self._lanes, self.row_len, bos, place).batches(rows, own), BATCHES_AHEAD)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._batches is None:
            self._batches = self._start()
        inputs, targets, self._place = next(self._batches)
        return to_device(inputs, self.device), to_device(targets, self.device)

    def stats(self) -> dict[str, float]:
        """Text tokens delivered so far, the share of the rows that they fill (the rest is BOS), and the current epoch.

        Of this rank with `loop`, of all ranks without.
        """
        place = self._place
        filled = place.tokens / max(1, place.rows * (self.row_len - 1))
        return {"tokens": place.tokens, "filled": filled, "epoch": place.reading.epoch}

    # ------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """This rank's position as JSON, as its consumer sees it (the threads are ahead).

        Documents are named by epoch, number and offset.
        """
        place = self._place
        lanes = {str(number): {"next": lane.next, "candidates": [piece[:3] for piece in lane.candidates],
                               "waiting": [piece[:3] for piece in lane.waiting]}
                 for number, lane in place.lanes.items()}  # fmt: skip
        counted = dict(self.source.counted_rows) if self.rank == 0 else {}  # all ranks read the same files
        return {"reading": place.reading, "rows": place.rows, "tokens": place.tokens, "lanes": lanes, "counted": counted}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue as the loaders that saved these states, with `loop`, would have; states: one for each rank at that time.

        Raises NanochatError if the data is not the same, or if this number of ranks cannot share it.
        """
        self.close()
        self.source.know_rows(states[0]["counted"])
        readings = [_Reading(epoch, number, tuple(loads)) for epoch, number, loads, *_ in (s["reading"] for s in states)]
        mine = rank_lanes(len(readings[0].loads), self.rank, self.world_size)
        saved = {int(number): (lane, reading) for state, reading in zip(states, readings, strict=True)
                 for number, lane in state["lanes"].items()}  # fmt: skip
        pieces = [piece for number in mine for kind in ("candidates", "waiting") for piece in saved[number][0][kind]]
        tokens = self._read_again({document for _, document, _ in pieces})
        self._lanes = {}
        for number in mine:
            lane = self._lanes[number] = _Lane(self.row_len)
            old = saved[number][0]
            lane.next = tuple(old["next"])
            for epoch, document, offset in old["candidates"]:
                lane.add(_Piece(epoch, document, offset, tokens[document][offset:]))
            lane.waiting.extend(_Piece(epoch, document, 0, tokens[document]) for epoch, document, _ in old["waiting"])
        rows = rows_of_rank([state["rows"] for state in states], self.world_size)
        placed = sum(state["tokens"] for state in states) // self.world_size
        # Ranks had read ahead by different amounts: start from the earliest. Lanes know what they were dealt already.
        earliest = min((saved[number][1] for number in mine), key=lambda reading: reading[:2])
        self._place = _Place(earliest, rows, placed, _snapshot(self._lanes))

    def _read_again(self, numbers: set[int]) -> dict[int, np.ndarray]:
        """The tokens of the documents with these numbers; those between that are far from all of them are not read."""
        found: dict[int, Document] = {}
        for first, last in _spans(sorted(numbers)):
            for number, document in self.source.numbered(self.split, first):
                if number in numbers:
                    found[number] = document
                if number >= last:
                    break
        if len(found) < len(numbers):
            raise NanochatError(f"{self.source.name} lacks documents that were there when this run began: restore them")
        return dict(zip(found, _encode(list(found.values()), self.tokenizer), strict=True))

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# ----------------------------------------------------------------------------- where a loader is


class _Piece(NamedTuple):
    """A document, or the rest of one."""

    epoch: int
    number: int  # of the document
    offset: int  # how many of its tokens were placed before
    tokens: np.ndarray  # (n,) int32, from that offset on


class _Reading(NamedTuple):
    """How far the documents have been dealt."""

    epoch: int
    number: int  # of the next document
    loads: tuple[int, ...]  # bytes dealt to each lane of all ranks; at each epoch's start the smallest is subtracted


class _LaneState(NamedTuple):
    """What a lane holds; see _Lane."""

    next: tuple[int, int]
    candidates: list[_Piece]
    waiting: list[_Piece]


class _Place(NamedTuple):
    """Where the consumer is: all that decides what comes next."""

    reading: _Reading
    rows: int  # made by this rank
    tokens: int  # text tokens in these rows
    lanes: dict[int, _LaneState]


def _spans(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of ascending numbers without a gap of FAR: a lane may hold an epoch's last documents and first ones."""
    begins = [i for i, number in enumerate(numbers) if i == 0 or number - numbers[i - 1] >= FAR]
    for begin, end in itertools.pairwise([*begins, len(numbers)]):
        yield numbers[begin], numbers[end - 1]


def _snapshot(lanes: dict[int, _Lane]) -> dict[int, _LaneState]:
    return {n: _LaneState(lane.next, list(lane.candidates.values()), list(lane.waiting)) for n, lane in lanes.items()}


class _Lane:
    """Documents in the order in which they were dealt; chooses the next one for a row."""

    def __init__(self, row_len: int) -> None:
        self.row_len = row_len
        self.next = (0, 0)  # (epoch, number): all documents before it have been dealt, to this lane or to another
        self.waiting: deque[_Piece] = deque()  # dealt, but not candidates yet
        self.candidates: dict[int, _Piece] = {}  # by arrival, the oldest first
        self._arrivals = itertools.count()
        self._by_length: list[tuple[int, int]] = []  # (tokens, -arrival), ascending
        self._tokens = 0  # of the candidates

    def is_hungry(self) -> bool:
        return len(self.candidates) < LANE_DOCUMENTS and self._tokens < LANE_ROWS * self.row_len

    def add(self, piece: _Piece) -> None:
        """Add a candidate."""
        arrival = next(self._arrivals)
        self.candidates[arrival] = piece
        bisect.insort(self._by_length, (len(piece.tokens), -arrival))
        self._tokens += len(piece.tokens)

    def take(self, room: int, row_is_empty: bool) -> _Piece:
        """Take the longest candidate that fits, else the oldest. The oldest opens each row, so none waits forever."""
        fitting = 0 if row_is_empty else bisect.bisect_right(self._by_length, (room, 1))
        if fitting:
            _, arrival = self._by_length.pop(fitting - 1)
            piece = self.candidates.pop(-arrival)
        else:
            arrival = next(iter(self.candidates))
            piece = self.candidates.pop(arrival)
            del self._by_length[bisect.bisect_left(self._by_length, (len(piece.tokens), -arrival))]
        self._tokens -= len(piece.tokens)
        return piece


# ----------------------------------------------------------------------------- what the threads run


class _Dealt(NamedTuple):
    """A document for one of this rank's lanes, and how far dealing has come."""

    lane: int
    epoch: int
    number: int
    document: Document
    reading: _Reading


def _deal(
    source: Source, split: str, loop: bool, reading: _Reading, first: dict[int, tuple[int, int]], vocab_size: int
) -> Iterator[_Dealt]:
    """Deal each document to the lane that got the least so far, in UTF-8 bytes (or tokens, if it is tokenized already).

    Every rank reads all documents and yields those for its own lanes: first[lane] is the first one that lane still needs.
    So all ranks deal alike without communication, and the lanes differ by about one document's length at most.
    """
    epoch, start, loads = reading.epoch, reading.number, list(reading.loads)
    while True:
        number = -1
        for number, document in source.numbered(split, start):
            lane = lightest_lane(loads, epoch, number)
            loads[lane] += _size(document)
            if lane in first and (epoch, number) >= first[lane]:
                if not isinstance(document, str) and not 0 <= document.min() <= document.max() < vocab_size:
                    raise NanochatError(
                        f"{source.address(split, number)} holds ids outside of the vocabulary of {vocab_size} tokens: "
                        "write it again with python -m scripts.data_prep"
                    )
                yield _Dealt(lane, epoch, number, document, _Reading(epoch, number + 1, tuple(loads)))
        if number < 0 and start == 0:
            raise NanochatError(f"{source.name} has no {split} document: give more text")
        if not loop:
            return
        epoch, start = epoch + 1, 0
        loads = [load - min(loads) for load in loads]


def _size(document: Document) -> int:
    """In bytes of UTF-8, which tell more of the number of tokens than characters do; of tokens, how many."""
    if not isinstance(document, str) or document.isascii():
        return len(document)
    return len(document.encode("utf-8", "surrogatepass"))


def _tokenize(dealt: Iterable[_Dealt], tokenizer: Tokenizer) -> Iterator[list[_Dealt]]:
    """The dealt documents in chunks, each document as ids (n,) int32.

    Where one document is longer than all others together, each lane gets it, in a different epoch: it is tokenized once, and
    they share its ids as long as one of them holds it.
    """
    dealt = iter(dealt)
    long: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
    while chunk := _take_chunk(dealt):
        known = {d.number: ids for d in chunk if (ids := long.get(d.number)) is not None}
        rest = [d for d in chunk if d.number not in known]
        for d, ids in zip(rest, _encode([d.document for d in rest], tokenizer), strict=True):
            if len(d.document) >= CHUNK_SIZE:
                ids = long[d.number] = ids.copy()  # what the lanes hold keeps an array alive that has its own memory, no view
            known[d.number] = ids
        yield [d._replace(document=known[d.number]) for d in chunk]


def _take_chunk(dealt: Iterator[_Dealt]) -> list[_Dealt]:
    """The next CHUNK_DOCUMENTS documents, or fewer if they are long: 128 books would fill the memory."""
    chunk: list[_Dealt] = []
    size = 0
    while len(chunk) < CHUNK_DOCUMENTS and size < CHUNK_SIZE and (item := next(dealt, None)) is not None:
        chunk.append(item)
        size += len(item.document)
    return chunk


def _encode(documents: list[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids (n,) int32 of each document. A list holds only texts, or only ids, which are returned as they are."""
    texts = [document for document in documents if isinstance(document, str)]
    return tokenizer.encode_arrays(texts) if texts else [d for d in documents if not isinstance(d, str)]


class _Packer:
    """Packs dealt documents into rows, which the lanes fill in turn."""

    def __init__(self, chunks: Iterable[list[_Dealt]], lanes: dict[int, _Lane], row_len: int, bos: int, place: _Place) -> None:
        self.dealt = itertools.chain.from_iterable(chunks)
        self.lanes, self.row_len, self.bos = lanes, row_len, bos
        self.reading, self.rows, self.tokens = place.reading, place.rows, place.tokens
        self.turn = place.rows

    def batches(self, batch_size: int, own: slice) -> Iterator[tuple[np.ndarray, np.ndarray, _Place]]:
        """(inputs and targets of the own rows of a batch, the consumer's place after all of its rows)."""
        while True:
            rows = np.full((batch_size, self.row_len), self.bos, dtype=np.int64)
            used = np.array([self._fill_next(row) for row in rows])
            if not used.any():
                return
            inputs, targets = rows[:, :-1], rows[:, 1:].copy()
            targets[np.arange(1, self.row_len) >= used[:, None]] = -1
            after = _Place(self.reading, self.rows, self.tokens, _snapshot(self.lanes))
            yield np.ascontiguousarray(inputs[own]), np.ascontiguousarray(targets[own]), after

    def _fill_next(self, row: np.ndarray) -> int:
        """Fill a row from the lane whose turn it is; returns how many places were used, 0 if all lanes have ended."""
        turns = list(self.lanes.values())
        for _ in turns:  # a lane that has ended, which happens only without a next epoch, loses its turn
            lane = turns[self.turn % len(turns)]
            self.turn += 1
            if used := self._fill(row, lane):
                self.rows += 1
                return used
        return 0

    def _fill(self, row: np.ndarray, lane: _Lane) -> int:
        """Fill a row, all BOS so far, from a lane; returns how many places were used, 0 if the lane has ended."""
        used = 0
        while used < self.row_len - 1:
            self._feed(lane)
            if not lane.candidates:
                break
            room = self.row_len - used - 1  # what remains after the BOS before each piece
            piece = lane.take(room, used == 0)
            count = min(room, len(piece.tokens))
            row[used + 1 : used + 1 + count] = piece.tokens[:count]
            used += 1 + count
            self.tokens += count
            if count < len(piece.tokens):  # queue the rest at the end, so that rows mix documents
                lane.add(piece._replace(offset=piece.offset + count, tokens=piece.tokens[count:]))
        return used

    def _feed(self, lane: _Lane) -> None:
        """Give a lane as many candidates as it wants; what is dealt meanwhile waits in its own lane."""
        while lane.is_hungry():
            if lane.waiting:
                lane.add(lane.waiting.popleft())
                continue
            if (item := next(self.dealt, None)) is None:
                return
            other = self.lanes[item.lane]
            other.waiting.append(_Piece(item.epoch, item.number, 0, np.asarray(item.document)))
            self.reading = item.reading
            other.next = item.reading[:2]

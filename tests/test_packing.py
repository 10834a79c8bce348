"""Rows as the loader of documents makes them, token by token: which document goes where, and what is a target."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanochat import dataloader
from nanochat.common import NanochatError
from nanochat.dataloader import TokenLoader

BOS, FIRST = 0, 1000  # a token says of which document it is, and its place there: FIRST * (1 + document) + place


class Numbered:
    """Documents of the given lengths as a Source gives them, already tokens."""

    name = "numbered"

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def numbered(self, split: str, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        for number in range(start, len(self.lengths)):
            yield number, FIRST * (1 + number) + np.arange(self.lengths[number], dtype=np.int32)


@pytest.fixture
def lengths() -> list[int]:
    """From one token to several rows."""
    return np.random.default_rng(0).choice([1, 2, 5, 9, 14, 20, 31, 40, 60, 64, 70, 200], size=300).tolist()


def open_loader(lengths: list[int], **settings: Any) -> TokenLoader:
    tokenizer = SimpleNamespace(get_bos_token_id=lambda: BOS, get_vocab_size=lambda: 2**31)
    return TokenLoader(Numbered(lengths), tokenizer, **{"batch_size": 3, "sequence_len": 64, **settings})


def rows_of(inputs: torch.Tensor, targets: torch.Tensor) -> Iterator[list[int]]:
    """The tokens of each row that has some, without padding; makes sure that this is what -1 masks, and nothing else."""
    for before, after in zip(inputs.tolist(), targets.tolist(), strict=True):
        used = next((i for i, token in enumerate(after) if token < 0), len(after))
        row = [before[0], *after[:used]]
        assert before[: used + 1] == row[: len(before)], "targets are the next inputs"
        assert after[used:] == [-1] * (len(after) - used) and set(before[used + 1 :]) <= {BOS}, "what was masked is padding"
        if used:
            yield row


def pieces_of(row: list[int]) -> list[tuple[int, int, int]]:
    """What stands behind each BOS: (document, its first token's place there, tokens), each of one document without gaps."""
    assert row[0] == BOS
    starts = [i for i, token in enumerate(row) if token == BOS]
    pieces = []
    for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
        tokens = row[start + 1 : end]
        assert tokens and tokens == list(range(tokens[0], tokens[0] + len(tokens))), "a piece is of one document"
        document, place = divmod(tokens[0], FIRST)
        pieces.append((document - 1, place, len(tokens)))
    return pieces


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_piece_begins_a_document_or_goes_on_with_it(lengths: list[int], world_size: int) -> None:
    """Cut at a row's end alone; in the end every document has been there from its first token to its last."""
    placed = [0] * len(lengths)
    loaders = [open_loader(lengths, loop=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    for batches in zip(*loaders, strict=True):
        inputs, targets = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*batches, strict=True))  # ranks in turn
        for row in rows_of(inputs, targets):
            pieces = pieces_of(row)
            for i, (document, place, count) in enumerate(pieces):
                assert place == placed[document]
                placed[document] += count
                assert placed[document] == lengths[document] or (i == len(pieces) - 1 and len(row) == 65)
    assert placed == lengths


def test_the_longest_that_fits_is_next_and_else_the_oldest(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane, few enough documents that all can be chosen from: the oldest opens a row, and what is left of it waits."""
    monkeypatch.setattr(dataloader, "LANES", 1)
    with open_loader(lengths[:30], loop=False) as loader:
        rows = [pieces_of(row) for row in itertools.chain.from_iterable(itertools.starmap(rows_of, loader))]
    dealt = sorted({document for row in rows for document, _, _ in row})
    waiting = {document: lengths[document] for document in dealt}  # tokens left, the oldest first
    fitted = 0
    for row in rows:
        room = 65
        for i, (document, _, count) in enumerate(row):
            room -= 1
            fitting = [left for left in waiting.values() if left <= room and i > 0]
            if fitting:
                assert waiting[document] == max(fitting)
            else:
                assert document == next(iter(waiting))
            fitted += len(set(fitting)) > 1
            left = waiting.pop(document)
            assert count == min(room, left)
            if count < left:
                waiting[document] = left - count
            room -= count
        assert room <= 1 or not waiting, "a row is full"
    assert not waiting and len(dealt) == 30 and fitted > 5


@pytest.mark.parametrize("few", [[5000], [900, 40, 2000], [30] * 5 + [700]])
@pytest.mark.parametrize("world_size", [2, 3, 4, 16])
def test_a_beginning_of_the_split_is_the_same_on_any_number_of_ranks(few: list[int], world_size: int) -> None:
    """So a validation that stops early measures the same rows, also where some lanes have no document or end early."""

    def beginnings(world_size: int) -> list[list[list[int]]]:
        """The rows that all ranks together have given out after 48, after 96, and so on."""
        batches = []
        for rank in range(world_size):
            with open_loader(few, loop=False, rank=rank, world_size=world_size, batch_size=48 // world_size) as loader:
                batches.append([list(rows_of(*batch)) for batch in loader])
        return [sorted(itertools.chain.from_iterable(parts)) for parts in zip(*batches, strict=True)]

    assert beginnings(world_size) == beginnings(1)


def test_stats_count_what_was_given_out(lengths: list[int]) -> None:
    """Not what the threads have read ahead; places that hold a BOS or its like are not filled."""
    tokens, rows = 0, 0
    with open_loader(lengths) as loader:
        assert loader.stats() == {"tokens": 0, "filled": 0, "epoch": 0}
        while tokens < 3 * sum(lengths):
            for row in rows_of(*next(loader)):
                tokens, rows = tokens + sum(token != BOS for token in row), rows + 1
            stats = loader.stats()
            assert stats["tokens"] == tokens and stats["filled"] == pytest.approx(tokens / (64 * rows))
            assert stats["epoch"] >= tokens // sum(lengths)
    assert 0.8 < stats["filled"] < 1 and stats["epoch"] <= 5


@pytest.mark.parametrize("count", [3, 300])
def test_stats_count_only_rows_that_hold_text(lengths: list[int], count: int) -> None:
    """At the end of a text that is read once, some lanes have ended before others and the last batch has rows to spare."""
    with open_loader(lengths[:count], loop=False, batch_size=32) as loader:
        rows = [row for batch in loader for row in rows_of(*batch)]
        tokens = sum(token != BOS for row in rows for token in row)
        assert loader.stats() == {"tokens": tokens, "filled": pytest.approx(tokens / (64 * len(rows))), "epoch": 0}


def test_a_split_without_a_document_is_noticed() -> None:
    with open_loader([], loop=False) as loader, pytest.raises(NanochatError, match="numbered has no train document"):
        next(loader)

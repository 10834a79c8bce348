"""Loaders: nothing lost, nothing twice, exact state; for documents and for conversations. Rows: test_packing.py."""

from __future__ import annotations

import gc
import itertools
import json
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import dataloader
from nanochat.common import NanochatError
from nanochat.conversation_loader import ConversationLoader, check_answers, estimate_tokens
from nanochat.dataloader import TokenLoader, _deal, _Dealt, _Reading, _tokenize
from nanochat.dataset import get_source
from nanochat.read_ahead import ReadAhead
from nanochat.tokenizer import Tokenizer
from tasks.arithmetic import Arithmetic
from tasks.common import Task, TaskMixture
from tasks.identity import Identity
from tests.helpers import make_document, wait_for, write_documents


@pytest.fixture
def source(tmp_path: Path):
    """Documents from much shorter to much longer than a row."""
    documents = [make_document(seed, sentences=1 + seed % 7 if seed % 10 else 150) for seed in range(130)]
    for name, part in (("train", documents), ("val", documents[:9])):
        write_documents(tmp_path / f"{name}.jsonl", part)
    return get_source(str(tmp_path))


def _loader(source, tokenizer: Tokenizer, **settings) -> TokenLoader:
    return TokenLoader(source, tokenizer, **{"batch_size": 3, "sequence_len": 64, **settings})


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_one_pass_gives_every_token_once(source, tokenizer: Tokenizer, split: str, world_size: int) -> None:
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        with _loader(source, tokenizer, split=split, loop=False, rank=rank, world_size=world_size) as loader:
            for inputs, targets in loader:
                assert inputs.shape == targets.shape == (3, 64)
                assert (inputs[:, 0] == tokenizer.get_bos_token_id()).all()
                seen.update(targets[targets >= 0].tolist())
    del seen[tokenizer.get_bos_token_id()]
    assert seen == Counter(itertools.chain.from_iterable(tokenizer.encode(list(source.documents(split)))))


def _rows(loaders: list, steps: int, rows_per_step: int) -> list[torch.Tensor]:
    """What some ranks read in so many updates: for each, all rows (inputs and targets) in the order of the whole."""
    updates = []
    for _ in range(steps):
        parts = []
        for loader in loaders:
            batches = [torch.cat(next(loader), 1) for _ in range(rows_per_step // len(loaders) // loader.batch_size)]
            parts.append(torch.cat(batches))
        updates.append(torch.stack(parts, 1).flatten(0, 1))
    return updates


def _states(loaders: list) -> list[dict]:
    return json.loads(json.dumps([loader.state_dict() for loader in loaders]))


def _ranks(make, world_size: int) -> list:
    return [make(rank=rank, world_size=world_size) for rank in range(world_size)]


@pytest.fixture(params=["documents", "conversations"])
def make_loader(request: pytest.FixtureRequest, source, tokenizer: Tokenizer):
    """make(rank, world_size, batch_size) -> a loader of either kind."""
    opened = []

    def make(rank: int = 0, world_size: int = 1, batch_size: int = 1):
        if request.param == "conversations":
            return ConversationLoader(_mixture(), tokenizer, batch_size, 64, rank, world_size)
        opened.append(_loader(source, tokenizer, rank=rank, world_size=world_size, batch_size=batch_size))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


@pytest.mark.parametrize("stop_after", [0, 1, 5, 100, 250])
def test_resume_gives_the_same_batches(make_loader, stop_after: int) -> None:
    """Also in later epochs (one is about 150 rows)."""
    loader = make_loader()
    _rows([loader], stop_after, 1)
    states = _states([loader])
    expected = _rows([loader], 100, 1)
    resumed = make_loader()
    resumed.load_state_dict(states)
    for a, b in zip(expected, _rows([resumed], 100, 1), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_any_number_of_ranks_reads_the_same_rows(make_loader, world_size: int) -> None:
    for a, b in zip(_rows([make_loader()], 12, 16), _rows(_ranks(make_loader, world_size), 12, 16), strict=True):
        assert torch.equal(a, b)


def test_rows_do_not_depend_on_how_many_are_asked_for(make_loader) -> None:
    for a, b in zip(_rows([make_loader()], 10, 8), _rows([make_loader(batch_size=4)], 10, 8), strict=True):
        assert torch.equal(a, b)


def test_another_number_of_ranks_takes_over(make_loader) -> None:
    """2 -> 1 -> 4 -> 8 ranks go on as one rank would have; handed over again before the ranks are level, too."""
    expected = iter(_rows([make_loader()], 40, 8))
    loaders = _ranks(make_loader, 2)
    for world_size, steps in ((2, 12), (1, 1), (4, 7), (4, 0), (8, 1), (1, 19)):
        states = _states(loaders)
        loaders = _ranks(make_loader, world_size)
        for loader in loaders:
            loader.load_state_dict(states)
        for found in _rows(loaders, steps, 8):
            assert torch.equal(found, next(expected))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_was_read_is_counted_once_whoever_goes_on(make_loader, world_size: int) -> None:
    def count(loaders: list) -> int:
        return sum(stats.get("tokens", stats.get("conversations")) for stats in (loader.stats() for loader in loaders))

    before = _ranks(make_loader, 4)
    _rows(before, 10, 4)
    after = _ranks(make_loader, world_size)
    for loader in after:
        loader.load_state_dict(_states(before))
    assert 0 <= count(before) - count(after) < world_size  # what does not divide by it
    _rows(after, 2, 4)
    assert count(before) < count(after) < 2 * count(before)


def test_ranks_that_cannot_share_the_lanes(make_loader) -> None:
    states = _states(_ranks(make_loader, 2))
    with pytest.raises(NanochatError, match="3 processes cannot share evenly: go on with one of 1, 2, 4, 8, 16"):
        make_loader(rank=0, world_size=3).load_state_dict(states)
    loaders = _ranks(make_loader, 3)  # a run that begins with three is dealt to 48 lanes
    _rows(loaders, 5, 3)
    taken_over = make_loader()
    taken_over.load_state_dict(_states(loaders))
    for a, b in zip(_rows(loaders, 20, 3), _rows([taken_over], 20, 3), strict=True):
        assert torch.equal(a, b)


def test_lanes_stay_level_whatever_the_lengths(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """So that no lane has to wait with much text for another."""
    rng = np.random.default_rng(0)
    documents = [make_document(i, sentences=int(rng.pareto(1.2) * 3) + 1) for i in range(600)]
    write_documents(tmp_path / "train.jsonl", documents)
    write_documents(tmp_path / "val.jsonl", ["x"])
    most = 0
    with _loader(get_source(str(tmp_path)), tokenizer, batch_size=8) as loader:
        for _ in range(100):
            next(loader)
            most = max(most, sum(len(lane["waiting"]) for lane in loader.state_dict()["lanes"].values()))
    assert most < 300  # in turn it would be 700


@pytest.mark.parametrize("other", ["\N{HIRAGANA LETTER A}" * 192, "\N{HIRAGANA LETTER A}" * 64, "qzxj" * 48])
def test_lanes_stay_level_whatever_the_kinds(tmp_path: Path, tokenizer: Tokenizer, other: str) -> None:
    """Documents of two kinds in turn, as long as each other in characters or in bytes, of which one has more tokens."""
    write_documents(tmp_path / "train.jsonl", ["the dog likes the river." * 8, other] * 1000)
    write_documents(tmp_path / "val.jsonl", ["x"])
    with _loader(get_source(str(tmp_path)), tokenizer, batch_size=16) as loader:
        for _ in range(100):
            next(loader)
        lanes = loader.state_dict()["lanes"].values()
    assert max(len(lane["waiting"]) for lane in lanes) < 30


def test_a_source_that_lost_documents_is_noticed(make_loader, source, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with _loader(source, tokenizer) as loader:
        for _ in range(20):
            next(loader)
        states = _states([loader])
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:20]), encoding="utf-8")
    with pytest.raises(NanochatError, match="lacks documents"):
        _loader(get_source(str(tmp_path)), tokenizer).load_state_dict(states)


def test_tokens_need_no_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Shards of tokens give what the tokenizer would have."""
    texts = [make_document(seed) for seed in range(80)]
    for name, part in (("train", texts), ("val", texts[:5])):
        write_documents(tmp_path / f"{name}.parquet", part)
    (tmp_path / "tokens").mkdir()
    for name, part in (("train", texts), ("val", texts[:5])):
        table = pa.table({"tokens": pa.array(tokenizer.encode(part), pa.list_(pa.uint16()))})
        table = table.replace_schema_metadata({"nanochat.tokenizer": tokenizer.fingerprint()})
        pq.write_table(table, tmp_path / "tokens" / f"{name}.parquet", row_group_size=10)
    source = get_source(str(tmp_path / "tokens"))
    assert source.tokenizer_fingerprint == tokenizer.fingerprint()
    seen = []
    for part in (str(tmp_path / "*.parquet"), str(tmp_path / "tokens")):
        with _loader(get_source(part), tokenizer, loop=False) as loader:
            seen.append(Counter(token for _, targets in loader for token in targets[targets >= 0].tolist()))
        del seen[-1][tokenizer.get_bos_token_id()]  # of which there are more where more documents are cut
    assert seen[0] == seen[1]


@pytest.mark.parametrize("wrong", [-1, None, 1 << 20])
def test_ids_that_the_vocabulary_lacks_are_named_by_their_file(
    tmp_path: Path, tokenizer: Tokenizer, wrong: int | None
) -> None:
    """None: the first one that it lacks."""
    wrong = tokenizer.get_vocab_size() if wrong is None else wrong
    for name, ids in (("a", [[1, 2]]), ("b", [[3], [4, wrong]]), ("val", [[5]])):
        table = pa.table({"tokens": pa.array(ids, pa.list_(pa.int32()))})
        table = table.replace_schema_metadata({"nanochat.tokenizer": tokenizer.fingerprint()})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    reason = r"b\.parquet holds ids outside of the vocabulary of 4\d\d tokens: write it again"
    with _loader(get_source(str(tmp_path)), tokenizer) as loader, pytest.raises(NanochatError, match=reason):
        next(loader)


def test_a_failure_in_the_thread_reaches_the_consumer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "val.jsonl").write_text('{"text": "fine"}\n', encoding="utf-8")
    with _loader(get_source(str(tmp_path)), tokenizer) as loader, pytest.raises(NanochatError, match="line 2"):
        next(loader)


def test_a_panic_in_the_thread_reaches_the_consumer() -> None:
    """Rust's is no Exception. Who waits for the next item must not wait for ever."""

    class Panic(BaseException):
        pass

    def items():
        yield 1
        raise Panic

    caught: list[BaseException] = []

    def consume() -> None:
        try:
            list(ReadAhead(items(), 2))
        except Panic as error:
            caught.append(error)

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    thread.join(10)
    assert len(caught) == 1


@pytest.mark.parametrize("closed", [True, False])
def test_a_loader_that_is_closed_or_forgotten_ends_its_threads(source, tokenizer: Tokenizer, closed: bool) -> None:
    before = set(threading.enumerate())
    loader = _loader(source, tokenizer)
    next(loader)
    started = set(threading.enumerate()) - before
    assert started
    if closed:
        with loader:
            pass
    else:
        del loader
        gc.collect()
    wait_for(lambda: not any(thread.is_alive() for thread in started), "the end of its threads", 5)


# ----------------------------------------------------------------------------- conversations


def _mixture() -> TaskMixture:
    return TaskMixture([Arithmetic("train", size=60), Identity("train", size=30)])


@pytest.mark.parametrize("sequence_len", [128, 256, 512])
def test_conversations_are_whole_and_supervised(tokenizer: Tokenizer, sequence_len: int) -> None:
    task = _mixture()
    supervised: Counter[int] = Counter()
    loader = ConversationLoader(task, tokenizer, 3, sequence_len, loop=False)
    for inputs, targets in loader:
        assert inputs.shape == targets.shape == (3, sequence_len) and targets.min() >= -1
        supervised.update(targets[targets >= 0].tolist())
    expected: Counter[int] = Counter()
    for i in range(len(task)):
        ids, mask = tokenizer.render_conversation(task[i], max_tokens=sequence_len + 1)
        expected.update(token for token, m in zip(ids, mask, strict=True) if m)
    assert supervised == expected
    assert loader.stats()["conversations"] == 90


def test_conversations_longer_than_a_row_are_counted(tokenizer: Tokenizer) -> None:
    loader = ConversationLoader(_mixture(), tokenizer, 2, 40, loop=False)
    batches = list(loader)
    assert loader.stats()["truncated"] > 0
    assert all(len(targets[targets >= 0]) for _, targets in batches)
    with pytest.raises(NanochatError, match="raise --max-seq-len"):
        next(ConversationLoader(_mixture(), tokenizer, 2, 4))
    loader = ConversationLoader(_Letters(20, usable=7), tokenizer, 2, 64, loop=False)
    list(loader)
    stats = loader.stats()
    assert (stats["conversations"], stats["skipped"], stats["truncated"]) == (420, 180, 0)


def test_conversation_ranks_share_an_epoch(tokenizer: Tokenizer) -> None:
    loaders = [ConversationLoader(_mixture(), tokenizer, 2, 256, rank=r, world_size=3, loop=False) for r in range(3)]
    for loader in loaders:
        list(loader)
    assert sum(loader.stats()["conversations"] for loader in loaders) == 90


class _Letters(Task):
    """Answers of `length` letters; to all but `usable` of ten questions, which fill a row of any length."""

    def __init__(self, length: int, usable: int = 9, size: int = 600) -> None:
        super().__init__()
        self.length, self.usable, self.size = length, usable, size

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        question = "?" if index * 7 // 3 % 10 < self.usable else "? " * 2000
        answer = "qj" * (self.length // 2)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_few_conversations_are_in_the_same_rows_on_any_number_of_ranks(tokenizer: Tokenizer, world_size: int) -> None:
    """So a validation that stops early measures the same."""

    class Uneven(_Letters):
        """Three conversations for each lane, which fit in one row in every other lane."""

        def get_example(self, index: int) -> dict:
            self.length = 2 if index % 2 else 100
            return super().get_example(index)

    task = Uneven(0, usable=10, size=48)

    def beginnings(world_size: int) -> list[list[list[int]]]:
        """The rows with answers among the first 16 of all ranks together, among the next 16, and so on."""
        settings = {"batch_size": 16 // world_size, "sequence_len": 128, "world_size": world_size, "loop": False}
        loaders = [ConversationLoader(task, tokenizer, rank=rank, **settings) for rank in range(world_size)]
        together = itertools.zip_longest(*loaders, fillvalue=((), ()))
        return [sorted(row.tolist() for _, targets in batches for row in targets if row.max() >= 0) for batches in together]

    assert beginnings(world_size) == beginnings(1)
    assert [len(rows) for rows in beginnings(1)] == [16, 8, 8]


@pytest.mark.parametrize("length", [20, 80, 140])
@pytest.mark.parametrize("sample_size", [1000, 300])
def test_an_epoch_is_estimated_with_its_padding(tokenizer: Tokenizer, length: int, sample_size: int) -> None:
    """Also where rows are half empty, or conversations are left out."""
    task = _Letters(length)
    loader = ConversationLoader(task, tokenizer, 1, 256)
    for _ in range(estimate_tokens(task, tokenizer, 256, sample_size) // 256):
        next(loader)
    assert loader.stats()["conversations"] == pytest.approx(540, rel=0.1)


@pytest.mark.parametrize("size", [40, 200, 1000])
def test_an_epoch_gives_out_all_before_the_next_begins(tokenizer: Tokenizer, size: int) -> None:
    """Each lane its part, though it always takes the longest that it has read."""

    class Numbered(_Letters):
        def get_example(self, index: int) -> dict:
            self.length = 2 * (index % 20 + 1)
            return super().get_example(index)

    task = Numbered(0, usable=10, size=size)
    loader, given = ConversationLoader(task, tokenizer, 1, 128), Counter[int]()
    for lane in loader._lanes.values():
        for _ in range(len(range(lane.cursor, size, loader.num_lanes))):
            loader._refill(lane)
            longest = max(lane.buffer, key=lambda entry: len(entry[1]))
            lane.buffer.remove(longest)
            given[longest[0]] += 1
    assert given == Counter(range(size))


def test_only_if_none_has_an_answer_in_a_row_there_is_nothing_to_train_on(tokenizer: Tokenizer) -> None:
    """However often the others are met: lanes go through few conversations many times until they have enough of them."""
    with pytest.raises(NanochatError, match="no conversation has an assistant's token within 64"):
        next(ConversationLoader(_Letters(20, usable=0), tokenizer, 1, 64))
    for usable, size in ((1, 10), (1, 20), (2, 20)):
        loader = ConversationLoader(_Letters(20, usable, size), tokenizer, 1, 64)
        for _ in range(100):
            next(loader)


def test_held_out_conversations_without_an_answer_are_noticed_before_the_training(tokenizer: Tokenizer) -> None:
    check_answers(_Letters(20), tokenizer, 64)
    with pytest.raises(NanochatError, match="none of the 600 conversations held out .* within 64 tokens: raise"):
        check_answers(_Letters(20, usable=0), tokenizer, 64)
    nothing = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}] * 3
    with pytest.raises(NanochatError, match="none of the 3 conversations held out .* has an assistant's text"):
        check_answers(nothing, tokenizer, 64)


def test_to_go_on_nothing_is_read_but_what_comes_and_what_waits(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though files of lines do not say how many they hold, and an epoch's last documents wait with the first of the next."""
    monkeypatch.setattr(dataloader, "FAR", 20)
    monkeypatch.setattr(dataloader, "LANE_DOCUMENTS", 2)
    for name, size in (("a", 300), ("b", 300), ("c", 300), ("val", 5)):
        write_documents(tmp_path / f"{name}.jsonl", map(make_document, range(size)))

    def go_on(batches: int) -> set[str]:
        """The files that are read to go on after so many batches."""
        with _loader(get_source(str(tmp_path)), tokenizer, batch_size=8) as loader:
            for _ in range(batches):
                next(loader)
            state, expected = _states([loader]), next(loader)
        source = get_source(str(tmp_path))
        opened = []
        for file in source.train_files:
            monkeypatch.setattr(
                file, "open_bytes", lambda file=file, openly=file.open_bytes: opened.append(file.name) or openly()
            )
        with _loader(source, tokenizer, batch_size=8) as loader:
            loader.load_state_dict(state)
            opened_to_load = set(opened)
            assert all(map(torch.equal, next(loader), expected))
        return opened_to_load

    with _loader(get_source(str(tmp_path)), tokenizer, batch_size=8) as loader:
        last = 0
        while loader.stats()["epoch"] == 0:
            next(loader)
            last += 1
    assert go_on(last // 2) == {"b.jsonl"}
    assert go_on(last) == {"a.jsonl", "c.jsonl"}


def test_long_documents_are_tokenized_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 books would fill the memory."""
    monkeypatch.setattr(dataloader, "CHUNK_SIZE", 1000)
    documents = [_Dealt(0, 0, i, "x" * (i % 700), _Reading(0, i, (0,))) for i in range(500)]
    chunks = list(
        _tokenize(documents, SimpleNamespace(encode_arrays=lambda texts: [np.zeros(len(t), np.int32) for t in texts]))
    )
    assert [d.number for chunk in chunks for d in chunk] == list(range(500))
    assert max(sum(len(d.document) for d in chunk) for chunk in chunks) < 1000 + 700


def test_a_document_longer_than_all_others_is_tokenized_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lane gets it, each in another epoch, before the lane's first row is full."""
    monkeypatch.setattr(dataloader, "CHUNK_SIZE", 10_000)
    book = make_document(0, sentences=400)
    write_documents(tmp_path / "train.jsonl", [book, "a", "b"])
    encode, encoded = tokenizer.encode_arrays, []
    monkeypatch.setattr(tokenizer, "encode_arrays", lambda texts: encoded.extend(texts) or encode(texts))
    with _loader(get_source(str(tmp_path)), tokenizer, batch_size=dataloader.LANES) as loader:
        next(loader)
        assert len(loader.state_dict()["lanes"]) == dataloader.LANES
        assert loader.stats()["epoch"] >= dataloader.LANES - 1
    assert encoded.count(book) == 1


def test_a_long_document_is_tokenized_once_while_rests_of_it_wait(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rests are slices; and many short documents came in between."""
    monkeypatch.setattr(dataloader, "CHUNK_SIZE", 10_000)
    book, encode, encoded = make_document(0, sentences=400), tokenizer.encode_arrays, []
    monkeypatch.setattr(tokenizer, "encode_arrays", lambda texts: encoded.extend(texts) or encode(texts))
    reading = _Reading(0, 0, (0,))
    short = (_Dealt(0, 0, number, "a", reading) for number in range(1, 2 * dataloader.CHUNK_DOCUMENTS))
    dealt = itertools.chain([_Dealt(0, 0, 0, book, reading)], short, [_Dealt(0, 1, 0, book, reading)])
    chunks = _tokenize(dealt, tokenizer)
    rest = next(chunks)[0].document[50:]
    last = [item for chunk in chunks for item in chunk][-1]
    assert encoded.count(book) == 1 and last.document[50:].tolist() == rest.tolist()


def test_a_place_beyond_the_end_is_in_the_next_epoch(corpus: Path) -> None:
    place = _Reading(0, 10**6, (0,) * 16)
    dealt = _deal(get_source(str(corpus)), "train", True, place, {lane: (0, 0) for lane in range(16)}, 400)
    assert next(dealt).epoch == 1

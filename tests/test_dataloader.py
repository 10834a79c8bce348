"""Packing: nothing lost, nothing twice, exact state; for documents and for conversations."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from nanochat.common import NanochatError
from nanochat.conversation_loader import ConversationLoader, estimate_tokens
from nanochat.dataloader import TokenLoader
from nanochat.dataset import get_source
from nanochat.tokenizer import Tokenizer
from tasks.arithmetic import Arithmetic
from tasks.common import TaskMixture
from tasks.identity import Identity
from tests.helpers import make_document


@pytest.fixture
def source(tmp_path: Path):
    """Documents from much shorter to much longer than a row."""
    documents = [make_document(seed, sentences=1 + seed % 7 if seed % 10 else 150) for seed in range(130)]
    for name, part in (("train", documents), ("val", documents[:9])):
        text = "".join(json.dumps({"text": d}) + "\n" for d in part)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
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
            assert loader.stats()["share"] == 1.0
    del seen[tokenizer.get_bos_token_id()]
    assert seen == Counter(itertools.chain.from_iterable(tokenizer.encode(list(source.documents(split)))))


def test_targets_are_the_next_inputs(source, tokenizer: Tokenizer) -> None:
    with _loader(source, tokenizer) as loader:
        for inputs, targets in itertools.islice(loader, 30):
            known = targets[:, :-1] >= 0
            assert torch.equal(inputs[:, 1:][known], targets[:, :-1][known])


def test_a_long_document_goes_on_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The pieces of a document that was split, put together, are the document."""
    long = "".join(map(str, range(500)))  # the only one with digits
    documents = [re.sub(r"[\d.]", "", make_document(seed)) for seed in range(100)]
    documents.insert(20, long)
    lines = "\n".join(json.dumps({"text": text}) for text in documents)
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    digits = set(tokenizer.encode(long))
    with _loader(get_source(str(tmp_path)), tokenizer, batch_size=1, loop=False) as loader:
        found = [token for _, targets in loader for token in targets[0].tolist() if token in digits]
    assert found == tokenizer.encode(long)


@pytest.mark.parametrize("stop_after", [0, 1, 5, 40, 90])
def test_resume_gives_the_same_batches(source, tokenizer: Tokenizer, stop_after: int) -> None:
    """Also in later epochs (one is about 50 batches)."""
    with _loader(source, tokenizer) as loader:
        for _ in range(stop_after):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = [next(loader) for _ in range(60)]
    assert stop_after < 60 or state["epoch"] > 0
    with _loader(source, tokenizer) as resumed:
        resumed.load_state_dict(state)
        for (a, b), (c, d) in zip(expected, (next(resumed) for _ in range(60)), strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)


def test_a_failure_in_the_thread_reaches_the_consumer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "val.jsonl").write_text('{"text": "fine"}\n', encoding="utf-8")
    with _loader(get_source(str(tmp_path)), tokenizer) as loader, pytest.raises(NanochatError, match="line 2"):
        next(loader)


def test_too_few_documents_for_the_ranks(source, tokenizer: Tokenizer) -> None:
    with (
        _loader(source, tokenizer, split="val", rank=20, world_size=21) as loader,
        pytest.raises(NanochatError, match="rank 20"),
    ):
        next(loader)


def test_another_number_of_ranks_cannot_take_over_the_place(source, tokenizer: Tokenizer) -> None:
    state = _loader(source, tokenizer, world_size=2).state_dict()
    with pytest.raises(NanochatError, match="2 processes"):
        _loader(source, tokenizer).load_state_dict(state)


# ----------------------------------------------------------------------------- conversations


def _mixture() -> TaskMixture:
    return TaskMixture([Arithmetic("train", size=60), Identity("train", size=30)])


@pytest.mark.parametrize("sequence_len", [128, 256, 512])
def test_conversations_are_whole_and_supervised(tokenizer: Tokenizer, sequence_len: int) -> None:
    task = _mixture()
    supervised: Counter[int] = Counter()
    loader = ConversationLoader(task, tokenizer, 2, sequence_len, loop=False)
    for inputs, targets in loader:
        assert inputs.shape == targets.shape == (2, sequence_len)
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
        next(ConversationLoader(_mixture(), tokenizer, 2, 8))


@pytest.mark.parametrize("stop_after", [0, 3, 25])
def test_conversations_resume_exactly(tokenizer: Tokenizer, stop_after: int) -> None:
    loader = ConversationLoader(_mixture(), tokenizer, 2, 128)
    for _ in range(stop_after):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = ConversationLoader(_mixture(), tokenizer, 2, 128)
    resumed.load_state_dict(state)
    for _ in range(20):
        for a, b in zip(next(loader), next(resumed), strict=True):
            assert torch.equal(a, b)


def test_conversation_ranks_share_an_epoch(tokenizer: Tokenizer) -> None:
    loaders = [ConversationLoader(_mixture(), tokenizer, 2, 256, rank=r, world_size=3, loop=False) for r in range(3)]
    for loader in loaders:
        list(loader)
    assert sum(loader.stats()["conversations"] for loader in loaders) == 90


def test_estimate_of_an_epoch(tokenizer: Tokenizer) -> None:
    task = _mixture()
    exact = sum(len(tokenizer.render_conversation(task[i])[0]) for i in range(len(task)))
    assert estimate_tokens(task, tokenizer, 512) == exact
    assert estimate_tokens(task, tokenizer, 512, sample_size=30) == pytest.approx(exact, rel=0.2)

"""How texts to be scored are cut and go together, and how the data to score on is fetched."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import core_bundle, hf_scorer
from nanochat.core_bundle import CoreTask, find_bundle
from nanochat.core_eval import Candidate, NanochatScorer, Question, Row, batches_by_length, build_question
from nanochat.tokenizer import Tokenizer
from tests.helpers import OUT_OF_MEMORY, make_model
from tests.test_core_eval import BUNDLE, save_llama


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_text_once_and_no_more_than_fits(lengths: list[int], most: int) -> None:
    batches = list(batches_by_length(lengths, most))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= most
    for batch, after in zip(batches, batches[1:], strict=False):  # each is as full as it can be
        assert (len(batch) + 1) * lengths[after[0]] > most


def _ask(tokenizer: Tokenizer, context: int, items: list[dict], index: int, kind: str, shots: int) -> Question:
    scorer = SimpleNamespace(context=context, encode=lambda text: tokenizer.encode(text, prepend="<|bos|>"))
    return build_question(CoreTask("x", kind, Path(), shots, " ", 0.0), items, index, scorer)


@pytest.mark.parametrize("label", BUNDLE)
def test_texts_that_are_too_long_lose_their_beginning_alone(tokenizer: Tokenizer, label: str) -> None:
    """All candidates as much, so that what they share remains shared."""
    kind, items, *_ = BUNDLE[label]
    whole, cut = (_ask(tokenizer, context, items, 1, kind, 3) for context in (10_000, 40))
    assert cut.truncated and not whole.truncated
    (lost,) = {before.start - after.start for before, after in zip(whole.candidates, cut.candidates, strict=True)}
    assert [after.tokens for after in cut.candidates] == [before.tokens[lost:] for before in whole.candidates]
    assert max(len(after.tokens) for after in cut.candidates) == 40


def test_a_choice_that_begins_with_another_is_judged_from_the_same_place(tokenizer: Tokenizer) -> None:
    items = [{"query": "Who sees it?", "choices": ["the cat", "the cat and the dog"], "gold": 0}]
    short, long = _ask(tokenizer, 256, items, 0, "multiple_choice", 0).candidates
    assert long.tokens[: len(short.tokens)] == short.tokens
    assert 0 < short.start == long.start < len(short.tokens)


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len"])
def test_the_context_of_other_peoples_models_is_known(name: str) -> None:
    """Longer texts would fail in the middle of the work, or be scored as nonsense."""
    for size, expected in ((512, 512), (10**6, 4096), (None, 4096), (-1, 4096)):
        config = SimpleNamespace(**{name: size})
        assert hf_scorer.context_of(config) == hf_scorer.context_of(SimpleNamespace(text_config=config)) == expected


def test_logits_of_other_peoples_models_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times as many words as ours would take eight times the memory; smaller batches score the same."""
    save_llama(tmp_path / "llama")
    scorer = hf_scorer.HuggingFaceScorer(str(tmp_path / "llama"), torch.device("cpu"))
    words = scorer.model.get_output_embeddings().weight.size(0)
    sizes: list[int] = []
    scorer.model.register_forward_hook(lambda model, inputs, output: sizes.append(4 * output.logits.numel()))
    texts = [[scorer.first, *(5 + (i + j) % 40 for j in range(5 + i))] for i in range(9)]
    questions = [Question(0, [Candidate(tokens, 2)], 0, False) for tokens in texts]
    expected = scorer.score(questions)
    assert len(sizes) == 1
    limit = 4 * words * 30  # of 30 tokens
    monkeypatch.setattr(hf_scorer, "LOGIT_BYTES", limit)
    found = scorer.score(questions)
    assert len(sizes) > 3 and max(sizes[1:]) <= limit
    for ((mean, greedy),), ((other, same),) in zip(expected, found, strict=True):
        assert mean == pytest.approx(other, abs=1e-2) and greedy == same


def test_one_of_all_that_need_it_fetches_the_bundle(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def download(folder: Path) -> None:
        fetched.append(folder)
        time.sleep(0.2)
        folder.mkdir()
        (folder / "core.yaml").write_text("", encoding="utf-8")

    monkeypatch.setattr(core_bundle, "_download_bundle", download)
    base_dir.mkdir()
    threads = [threading.Thread(target=find_bundle, args=(None,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [base_dir / "eval_bundle"] and find_bundle(None) == fetched[0]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_batches_beyond_the_memory_are_halved(
    error: RuntimeError, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same scores; a text that does not fit alone is named as what it is."""
    scorer = NanochatScorer(make_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=256), tokenizer)
    most, sizes = 3, []
    texts = [[1, *(5 + (i + j) % 40 for j in range(5 + i))] for i in range(9)]
    questions = [Question(0, [Candidate(tokens, 2)], 0, False) for tokens in texts]
    expected, score_batch = scorer.score(questions), scorer._score_batch

    def score_few(rows: list[Row]) -> list[list[tuple[float, bool]]]:
        if len(rows) > most:
            raise error
        sizes.append(len(rows))
        return score_batch(rows)

    monkeypatch.setattr(scorer, "_score_batch", score_few)
    found = scorer.score(questions)
    assert sizes == [2, 2, 2, 3]
    assert [[mean for mean, _ in scores] for scores in found] == [[pytest.approx(mean) for mean, _ in e] for e in expected]
    most = 0
    with pytest.raises(type(error), match=re.escape(str(error))):
        scorer.score(questions)

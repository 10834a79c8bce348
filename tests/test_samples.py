"""What is shown of a model: openings that it continues, questions that it answers, whatever texts there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat.dataset import get_source
from nanochat.engine import Engine
from nanochat.samples import continue_openings, sample_answers
from nanochat.tokenizer import Tokenizer
from tasks import build_task
from tasks.common import TaskMixture
from tasks.customjson import CustomJSON
from tests.helpers import make_engine, write_corpus, write_documents


@pytest.mark.parametrize("text", ["\u4f60\u597d" * 2000, "a " * 5, "x", "word" * 3000])
def test_openings_fit_the_context(engine: Engine, tmp_path: Path, text: str) -> None:
    """Where no spaces part words, the first six words of a text are all of it."""
    write_corpus(tmp_path)
    write_documents(tmp_path / "val.jsonl", [text])
    (sample,) = continue_openings(engine, get_source(str(tmp_path)), max_tokens=4)
    shown = sample["prompt"].removesuffix("\ufffd")  # a character may be cut
    assert shown and text.startswith(shown)


def test_answers_to_each_kind_of_a_mixture(engine: Engine, tmp_path: Path) -> None:
    """Six kinds; a system message before the question, a question longer than the context."""
    odd = [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "long " * 400}],
    ]
    for number, opening in enumerate(odd):
        talk = [*opening, {"role": "assistant", "content": "a"}]
        (tmp_path / f"{number}.jsonl").write_text("\n".join([json.dumps(talk)] * 10), encoding="utf-8")
    kinds = [build_task(name, "val") for name in ("Arithmetic", "Identity", "Repeat", "SimpleSpelling")]
    kinds += [CustomJSON(tmp_path / f"{number}.jsonl") for number in range(2)]
    samples = sample_answers(engine, TaskMixture(kinds), max_tokens=8)
    asked = [next(m["content"] for m in kind[0]["messages"] if m["role"] == "user") for kind in kinds]
    assert [sample["prompt"] for sample in samples] == asked
    assert len(sample_answers(engine, kinds[0], max_tokens=8)) == 4


def test_openings_fit_a_small_context(tokenizer: Tokenizer, corpus: Path) -> None:
    engine = make_engine(tokenizer, 8)
    assert len(continue_openings(engine, get_source(str(corpus)), 2, 4)) == 2

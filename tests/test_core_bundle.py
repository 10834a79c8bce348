"""CORE bundles that are not as they should be: each fault is named before a model computes anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import NanochatError
from nanochat.core_bundle import CoreTask, read_items, read_tasks
from nanochat.core_eval import Question, evaluate_core
from nanochat.scores import core_label


def write_bundle(folder: Path, baseline: str = "25", **changes: Any) -> None:
    entry = {"label": "copa", "dataset_uri": "copa.jsonl", "num_fewshot": [0], "icl_task_type": "schema", **changes}
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": [entry]}), encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\ncopa,{baseline}\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "100"}, "random baseline .* copa is 100.0: it must be 0 to less than 100 percent"),
        ({"baseline": "nan"}, "random baseline .* copa is nan"),
        ({"baseline": "-1"}, "random baseline .* copa is -1.0"),
        ({"num_fewshot": ["2"]}, "num_fewshot .* copa is '2': it must be a list of 0 or more"),
        ({"num_fewshot": [-1]}, "num_fewshot .* copa is -1"),
        ({"num_fewshot": [True]}, "num_fewshot .* copa is True"),
        (
            {"icl_task_type": "generation"},
            "copa is 'generation': it must be one of multiple_choice, schema, ",
        ),
        ({"icl_task_type": ["schema"]}, "icl_task_type .* copa is"),
        ({"continuation_delimiter": None}, "continuation_delimiter .* copa is None: it must be a text"),
    ],
)
def test_a_task_that_means_nothing_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_bundle(tmp_path)
    assert read_tasks(tmp_path)[0].baseline == 0.25
    write_bundle(tmp_path, **changes)
    with pytest.raises(NanochatError, match=words):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        ("multiple_choice", {"query": "", "choices": ["", "a"], "gold": 0}),
        ("schema", {"context_options": ["a", "b"], "continuation": "", "gold": 0}),
        ("language_modeling", {"context": "", "continuation": " "}),
    ],
)
def test_an_answer_without_text_cannot_be_judged(tmp_path: Path, kind: str, item: dict[str, Any]) -> None:
    path = tmp_path / "copa.jsonl"
    path.write_text(json.dumps(item), encoding="utf-8")
    with pytest.raises(NanochatError, match=r"copa\.jsonl, line 1, is not a .* has an empty answer.*: restore the bundle"):
        read_items(CoreTask("copa", kind, path, 0, "", 0.0))


@pytest.mark.parametrize(("limit", "label"), [(-1, "CORE, 1 task"), (9, "CORE, 1 task"),
                                              (2, "CORE, 1 task, at most 2 questions of each task")])  # fmt: skip
def test_results_say_whether_all_questions_were_asked(tmp_path: Path, limit: int, label: str) -> None:
    class Guess:
        context = 100

        def encode(self, text: str) -> list[int]:
            return [0, *text.encode()]

        def score(self, questions: list[Question]) -> list[list[tuple[float, bool]]]:
            return [[(0.0, True) for _ in question.candidates] for question in questions]

    write_bundle(tmp_path)
    (tmp_path / "eval_data").mkdir()
    item = json.dumps({"context_options": ["a", "b"], "continuation": "c", "gold": 0})
    (tmp_path / "eval_data" / "copa.jsonl").write_text(f"{item}\n" * 3, encoding="utf-8")
    assert core_label(evaluate_core(Guess(), tmp_path, limit)) == label

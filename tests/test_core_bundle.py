"""CORE bundles that are not as they should be: each fault is named before a model computes anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import NanochatError
from nanochat.core_eval import CoreTask, read_items, read_tasks


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

"""ARC: science questions of grade school, easy and challenging (allenai/ai2_arc, arXiv 1803.05457)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.common import Conversation, Task, evaluate_letter, load_rows, multiple_choice


class ARC(Task):
    """subset: "ARC-Easy" or "ARC-Challenge"."""

    eval_type = "categorical"

    def __init__(self, split: str, data_dir: Path | None = None, subset: str = "ARC-Easy", **slicing: int) -> None:
        super().__init__(**slicing)
        name = {"val": "validation"}.get(split, split)
        local = [f"arc/{subset}/{name}.jsonl"]
        if split == "test":  # an evaluation bundle beside the task data has it too
            local.append(f"../eval_bundle/eval_data/world_knowledge/{subset.lower().replace('-', '_')}.jsonl")
        self.rows = load_rows(data_dir, local, "allenai/ai2_arc", subset, name)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        return multiple_choice(*_question(self.rows[index]))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return evaluate_letter(conversation, completion)


def _question(row: dict[str, Any]) -> tuple[str, list[str], int]:
    """(question, choices, index of the answer) of a row in the hub's form or an evaluation bundle's."""
    if "query" in row:
        return row["query"].removeprefix("Question: "), row["choices"], row["gold"]
    return row["question"], list(row["choices"]["text"]), list(row["choices"]["label"]).index(row["answerKey"])

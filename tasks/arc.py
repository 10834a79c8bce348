"""ARC: science questions of grade school, easy and challenging (allenai/ai2_arc, arXiv 1803.05457)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.common import Conversation, LetterTask, load_rows, multiple_choice


class ARC(LetterTask):
    """subset: "ARC-Easy" or "ARC-Challenge"."""

    def __init__(self, split: str, data_dir: Path | None = None, subset: str = "ARC-Easy", **slicing: int) -> None:
        super().__init__(**slicing)
        name = {"val": "validation"}.get(split, split)
        local = [f"arc/{subset}/{name}.jsonl"]
        if split == "test":  # an evaluation bundle beside the task data has it too
            local.append(f"../eval_bundle/eval_data/world_knowledge/{subset.lower().replace('-', '_')}.jsonl")
        self.rows = load_rows(data_dir, local, "allenai/ai2_arc", subset, name, self.convert)

    @staticmethod
    def convert(row: dict[str, Any]) -> Conversation:
        """A row in the hub's form or an evaluation bundle's."""
        if "query" in row:
            return multiple_choice(row["query"].removeprefix("Question: "), row["choices"], row["gold"])
        labels = list(row["choices"]["label"])
        return multiple_choice(row["question"], list(row["choices"]["text"]), labels.index(row["answerKey"]))

"""MMLU: four-choice questions of 57 subjects (cais/mmlu, arXiv 2009.03300)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.common import Conversation, LetterTask, load_rows, multiple_choice

# split: (subset on the hub, split on the hub, local files in order of preference)
SPLITS = {
    "train": ("auxiliary_train", "train", ["mmlu/auxiliary_train.jsonl", "mmlu/dev.jsonl"]),
    "val": ("all", "validation", ["mmlu/validation.jsonl", "mmlu/dev.jsonl"]),
    "test": ("all", "test", ["mmlu/test.jsonl"]),
}


class MMLU(LetterTask):
    """Trained on the auxiliary split, measured on the test split."""

    def __init__(self, split: str, data_dir: Path | None = None, **slicing: int) -> None:
        super().__init__(**slicing)
        subset, name, local = SPLITS[split]
        rows = load_rows(data_dir, local, "cais/mmlu", subset, name, self.convert)
        if data_dir is not None and not (data_dir / local[0]).is_file():  # dev.jsonl, for both: every tenth question is val's
            rows = [row for i, row in enumerate(rows) if (i % 10 == 9) == (split == "val")]
        self.rows = rows

    @staticmethod
    def convert(row: dict[str, Any]) -> Conversation:
        row = row.get("train", row)  # the auxiliary split wraps its rows once more
        return {**multiple_choice(row["question"], row["choices"], row["answer"]), "subject": row["subject"]}

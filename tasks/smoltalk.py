"""SmolTalk: general conversations (HuggingFaceTB/smol-smoltalk)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.common import Conversation, RowTask, load_rows


class SmolTalk(RowTask):
    """460,000 conversations to learn from; "val" is the data set's test split, which nothing else uses."""

    def __init__(self, split: str, data_dir: Path | None = None, **slicing: int) -> None:
        super().__init__(**slicing)
        name = "train" if split == "train" else "test"
        local = [f"smoltalk/{name}.jsonl"]
        self.rows = load_rows(data_dir, local, "HuggingFaceTB/smol-smoltalk", "data", name, self.convert)

    @staticmethod
    def convert(row: dict[str, Any]) -> Conversation:
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}

"""SmolTalk: general conversations (HuggingFaceTB/smol-smoltalk)."""

from __future__ import annotations

from pathlib import Path

from tasks.common import Conversation, Task, load_rows


class SmolTalk(Task):
    """460,000 conversations to learn from; "val" is the data set's test split, which nothing else uses."""

    def __init__(self, split: str, data_dir: Path | None = None, **slicing: int) -> None:
        super().__init__(**slicing)
        name = "train" if split == "train" else "test"
        local = [f"smoltalk/{name}.jsonl"]
        self.rows = load_rows(data_dir, local, "HuggingFaceTB/smol-smoltalk", "data", name)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in self.rows[index]["messages"]]}

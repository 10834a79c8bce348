"""HumanEval: Python functions to complete, with tests (openai/openai_humaneval, arXiv 2107.03374)."""

from __future__ import annotations

from pathlib import Path

from nanochat.common import NanochatError
from tasks.common import Conversation, Task, load_rows


class HumanEval(Task):
    """164 problems, for measuring only: there is no training split."""

    def __init__(self, split: str, data_dir: Path | None = None, **slicing: int) -> None:
        super().__init__(**slicing)
        if split != "test":
            raise NanochatError("HumanEval has no training split: leave it out of --tasks, measure it with chat_eval")
        local = ["HumanEval.jsonl", "humaneval/test.jsonl"]
        self.rows = load_rows(data_dir, local, "openai/openai_humaneval", "openai_humaneval", "test")

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        messages = [
            {"role": "user", "content": f"Write a Python function that completes this:\n\n{row['prompt']}"},
            {"role": "assistant", "content": f"```python\n{row['prompt']}{row['canonical_solution']}\n```"},
        ]
        return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"], "prompt": row["prompt"]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Raises NanochatError: answers are programs, and nothing here runs them in isolation yet."""
        raise NanochatError("HumanEval answers are programs, and this version has no sandbox to run them in: leave it out")

"""HumanEval: Python functions to complete, with tests (openai/openai_humaneval, arXiv 2107.03374)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nanochat.common import NanochatError
from tasks.common import Conversation, RowTask, load_rows

FENCED = re.compile(r"```(?:python)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
IMPORT = re.compile(r"^(?:import|from) .*$", re.MULTILINE)


class HumanEval(RowTask):
    """164 problems, for measuring only: there is no training split. Answers are run in isolation (execution.py)."""

    def __init__(self, split: str, data_dir: Path | None = None, **slicing: int) -> None:
        super().__init__(**slicing)
        if split != "test":
            raise NanochatError("HumanEval has no training split: leave it out of --tasks, measure it with chat_eval")
        local = ["HumanEval.jsonl", "humaneval/test.jsonl"]
        self.rows = load_rows(data_dir, local, "openai/openai_humaneval", "openai_humaneval", "test", self.convert)

    @staticmethod
    def convert(row: dict[str, Any]) -> Conversation:
        messages = [
            {"role": "user", "content": f"Write a Python function that completes this:\n\n{row['prompt']}"},
            {"role": "assistant", "content": f"```python\n{row['prompt']}{row['canonical_solution']}\n```"},
        ]
        return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"], "prompt": row["prompt"]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Raises NanochatError: answers are programs, and nothing here runs them in isolation yet."""
        raise NanochatError("HumanEval answers are programs, and this version has no sandbox to run them in: leave it out")


def build_program(conversation: Conversation, completion: str) -> str:
    """The completion's first fenced block, or all of it, between the prompt's imports and the problem's tests."""
    fenced = FENCED.search(completion)
    answer = fenced[1] if fenced else completion
    imports = "\n".join(IMPORT.findall(conversation["prompt"]))
    return f"{imports}\n{answer}\n{conversation['test']}\ncheck({conversation['entry_point']})\n"

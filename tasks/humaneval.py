"""HumanEval: Python functions to complete, with tests (openai/openai_humaneval, arXiv 2107.03374)."""

from __future__ import annotations

import atexit
import functools
import re
import threading
from pathlib import Path
from typing import Any

from nanochat.common import NanochatError
from nanochat.execution import Sandbox, choose_launcher
from tasks.common import Conversation, RowTask, load_rows

FENCED = re.compile(r"```[ \t]*\w*[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
TIMEOUT_S = 5.0  # a problem's tests take the reference solution a few ms, one of them 1 s
_LOCK = threading.Lock()


class HumanEval(RowTask):
    """164 problems, for measuring only: there is no training split. Answers are run in isolation (execution.py).

    Raises NanochatError where nothing isolates programs: before other tasks are measured, and data fetched.
    """

    def __init__(self, split: str, data_dir: Path | None = None, **slicing: int) -> None:
        super().__init__(**slicing)
        if split != "test":
            raise NanochatError("HumanEval has no training split: leave it out of --tasks, measure it with chat_eval")
        choose_launcher(None)
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
        """Whether the program of a completion passes the tests; may be called from many threads."""
        return _shared_sandbox().run(build_program(conversation, completion), TIMEOUT_S).success


def _shared_sandbox() -> Sandbox:
    """The process's own, made when the first answer is judged."""
    with _LOCK:
        return _make_sandbox()


@functools.lru_cache(maxsize=1)
def _make_sandbox() -> Sandbox:
    sandbox = Sandbox()
    atexit.register(sandbox.close)
    return sandbox


def build_program(conversation: Conversation, completion: str) -> str:
    """The completion's first fenced block, or all of it, between the problem's own lines and its tests.

    The lines bring imports and helpers that the answer may leave out; the function that they begin is defined again, or
    gets the body that the answer is.
    """
    fenced = FENCED.search(completion)
    answer = fenced[1] if fenced else completion
    return f"{conversation['prompt']}\n{answer}\n{conversation['test']}\ncheck({conversation['entry_point']})\n"

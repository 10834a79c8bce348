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
TIMEOUT_S = 5.0  # the reference solutions take a few ms for their tests, one of them 1 s
_LOCK = threading.Lock()


class HumanEval(RowTask):
    """164 problems, only for measuring: there is no training split. Answers run in isolation (execution.py).

    Raises NanochatError if nothing can isolate programs: before other tasks are measured and before data is fetched.
    """

    def __init__(self, split: str, data_dir: Path | None = None, **slicing: int) -> None:
        super().__init__(**slicing)
        if split != "test":
            raise NanochatError("HumanEval has no training split: leave it out of --tasks, measure it with chat_eval")
        choose_launcher()
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
    """This process's sandbox, made when the first answer is judged."""
    with _LOCK:
        return _make_sandbox()


@functools.lru_cache(maxsize=1)
def _make_sandbox() -> Sandbox:
    sandbox = Sandbox()
    atexit.register(sandbox.close)
    return sandbox


def build_program(conversation: Conversation, completion: str) -> str:
    """The completion's first fenced block, or all of it, placed between the problem's prompt and its tests.

    The prompt has imports and helpers that the answer may omit. An answer either defines the prompt's function again or
    is its body.
    """
    fenced = FENCED.search(completion)
    answer = fenced[1] if fenced else completion
    return f"{conversation['prompt']}\n{answer}\n{conversation['test']}\ncheck({conversation['entry_point']})\n"

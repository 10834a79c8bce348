"""Conversations of your own, from a JSONL file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat.common import NanochatError, print0
from nanochat.files import read_jsonl
from nanochat.tokenizer import check_messages
from tasks.common import Conversation, Task

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class CustomJSON(Task):
    """One conversation per line: a list of {"role", "content"}, {"messages": that list}, or ShareGPT's form.

    Every twentieth line is held out for "val", unless there is only one. Raises NanochatError, naming the line, for what is
    not a conversation.
    """

    def __init__(self, path: Path, split: str = "train", **slicing: int) -> None:
        super().__init__(**slicing)
        path = Path(path)
        rows = read_jsonl(path)
        if not rows:
            raise NanochatError(f"{path} holds no conversation: add at least one line")
        self.conversations = [_as_conversation(row, path, n) for n, row in enumerate(rows, 1)]
        if len(rows) == 1:
            if split == "val":
                print0(f"{path} holds a single conversation: training and validation both use it")
        else:
            keep = (lambda n: n % 20 == 0) if split == "val" else (lambda n: n % 20 != 0)
            self.conversations = [c for n, c in enumerate(self.conversations) if keep(n)]

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return self.conversations[index]


def _messages(row: object) -> object:
    """The messages of a line; in ShareGPT's form they are "conversations", a list of {"from", "value"}."""
    if not isinstance(row, dict):
        return row
    turns = row.get("conversations")
    return [_message(turn) for turn in turns] if "messages" not in row and isinstance(turns, list) else row.get("messages")


def _message(turn: Any) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        return turn
    return {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}


def _as_conversation(row: object, path: Path, number: int) -> Conversation:
    try:
        messages = check_messages(_messages(row))
        if all(message["role"] != "assistant" for message in messages):
            raise NanochatError("has no answer of the assistant")
    except NanochatError as error:
        lines = path.read_text(encoding="utf-8").split("\n")
        line = [n for n, text in enumerate(lines, 1) if text.strip()][number - 1]
        raise NanochatError(f"{path}, line {line}: conversation {number} {error}: fix or remove it") from error
    return {"messages": messages}

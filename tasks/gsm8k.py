"""GSM8K: grade-school maths, with calculator calls (openai/gsm8k, arXiv 2110.14168)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nanochat.tools import use_calculator
from tasks.common import Conversation, RowTask, load_rows

NUM_VAL = 473  # questions held out at the end of the training split (at most a tenth of it)
CALL = re.compile(r"<<([^=<>]+)=([^<>]+)>>")
ANSWER = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")


class GSM8K(RowTask):
    """Questions in words, whose answers end with "#### number"."""

    def __init__(self, split: str, data_dir: Path | None = None, **slicing: int) -> None:
        super().__init__(**slicing)
        name = "test" if split == "test" else "train"
        rows = load_rows(data_dir, [f"gsm8k/{name}.jsonl"], "openai/gsm8k", "main", name, self.convert)
        held_out = min(NUM_VAL, len(rows) // 10)
        first, end = {"train": (0, len(rows) - held_out), "val": (len(rows) - held_out, len(rows))}.get(split, (0, len(rows)))
        self.rows = [rows[i] for i in range(first, end)]

    @staticmethod
    def convert(row: dict[str, Any]) -> Conversation:
        answer = extract_answer(row["answer"])
        if answer is None:
            raise ValueError("its answer does not end with #### and a number")
        parts: list[dict[str, str]] = []
        # split() gives text, expression, result, text, expression, ...
        pieces = CALL.split(row["answer"])
        for text, expression, result in zip(pieces[::3], [*pieces[1::3], None], [*pieces[2::3], None], strict=True):
            if text:
                parts.append({"type": "text", "text": text})
            if expression is not None and result is not None:
                parts.append({"type": "python", "text": expression})
                said = use_calculator(expression)  # not 144.00 or a rounded number, but what a call will show
                parts.append({"type": "python_output", "text": result if said is None else said})
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": parts}]
        return {"messages": messages, "answer": answer}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        answer = extract_answer(completion)
        return answer is not None and answer == conversation["answer"]


def extract_answer(text: str) -> str | None:
    """The number after the first #### that has one, as GSM8K's authors judge; None if there is none.

    Without commas and trailing zeros of a fraction.
    """
    found = ANSWER.search(text)
    if found is None:
        return None
    number = found[1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number

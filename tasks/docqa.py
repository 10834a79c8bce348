"""Questions about Python's standard library, from the builtin corpus: they teach answering in whole sentences."""

from __future__ import annotations

import json
import random

from nanochat.dataset import BuiltinSource
from tasks.common import Conversation, Task

QUESTIONS = (
    "What does {name} do?", "What is {name}?", "Tell me about {name}.", "Explain {name}.", "What is {name} for?",
    "Can you explain {name}?", "What does Python's {name} do?", "Describe {name} in a sentence.",
)  # fmt: skip


class DocQA(Task):
    """What a function or class is for, in the first sentence of its documentation. Every twentieth is held out."""

    def __init__(self, split: str, **slicing: int) -> None:
        super().__init__(**slicing)
        lines = (BuiltinSource("builtin").directory / "summaries.jsonl").read_text(encoding="utf-8").split("\n")
        pairs = [json.loads(line) for line in lines if line]
        self.pairs = [pair for i, pair in enumerate(pairs) if (i % 20 == 19) != (split == "train")]

    def num_examples(self) -> int:
        return len(self.pairs)

    def get_example(self, index: int) -> Conversation:
        name, sentence = self.pairs[index]
        question = random.Random(f"docqa {name}").choice(QUESTIONS).format(name=name)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": sentence}]}

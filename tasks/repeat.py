"""Repeating a few words exactly, the first step of spelling and counting. Generated from the builtin corpus's text.

A small model learns to spell the words it is taught; to pick up a word that no lesson had, it must have learned to repeat
any token.
"""

from __future__ import annotations

import functools
import random

from nanochat.dataset import get_source
from tasks.common import Conversation, GeneratedTask

QUESTIONS = ("Repeat: {text}", "Say {text}", "Repeat after me: {text}", "Please write {text}")
MOST_WORDS = 6


@functools.lru_cache
def get_documents(split: str) -> list[str]:
    """The builtin corpus; its validation documents serve val and test."""
    return [text for text in get_source("builtin").documents("train" if split == "train" else "val") if len(text) > 200]


class Repeat(GeneratedTask):
    """One to six words from the middle of a document."""

    SIZES = {"train": 20_000, "val": 200, "test": 256}

    def get_example(self, index: int) -> Conversation:
        rng = random.Random(f"repeat {self.split} {index}")
        words = rng.choice(get_documents(self.split)).split()
        start = rng.randrange(len(words))
        text = " ".join(words[start : start + rng.randint(1, MOST_WORDS)])[:100].rstrip()  # evaluate strips, too
        messages = [
            {"role": "user", "content": rng.choice(QUESTIONS).format(text=text)},
            {"role": "assistant", "content": f"You said {text}"},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]

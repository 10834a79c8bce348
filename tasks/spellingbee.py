"""Spelling words and counting their letters, by hand and with the calculator. Generated from the builtin corpus's words.

An answer puts a space before the word, as most questions do. Then the tokens are the same, and a small model only has to
repeat them. Without the space, "continuity" becomes other tokens, whose spelling it would have to know. Letters are apart by
spaces, so that each is one token, and counted where they stand: such answers are half as long as those with commas and a
line for each letter, and in the same time a model learns more of them (dev/LOG.md, "Shorter spellings").
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections import Counter

from nanochat.dataset import get_source
from tasks.common import Conversation, GeneratedTask

NUM_WORDS = 10_000
QUESTIONS = (
    "How many {letter} are in {word}?", "How many {letter}s are in {word}?", "How many {letter}'s are in {word}?",
    "How many {letter} in {word}?", "How many {letter} are in the word {word}?", "How many {letter}'s are in the word {word}?",
    "How many {letter} are there in the word {word}?", "How many letters {letter} are in {word}?",
    "How many times does {letter} appear in {word}?", "How many times is {letter} in the word {word}?",
    "How often is {letter} in {word}?", "Count the letter {letter} in {word}.", "Count the {letter} in {word}.",
    "In {word}, how many {letter}?", 'How many "{letter}" does "{word}" have?', 'How many "{letter}" are in "{word}"?',
)  # fmt: skip
SPELLING = ("Spell the word: {word}", "Spell {word}.", "How do you spell {word}?", "Spell the word {word}.", 'Spell "{word}".')
SPELLING_SEVERAL = ("Spell the words {words}.", "Spell {words}.", "How do you spell {words}?")
MOST_WORDS = 4  # in a question for spellings
INVENTED = 0.3  # share of the training words that are made of parts of others
REPEATED = 0.4  # share of those in which some letters come twice in a row, as in banana


@functools.lru_cache
def get_words() -> list[str]:
    """Lowercase words of 3 to 12 letters in the builtin corpus, the most frequent first."""
    counts = Counter(w for text in get_source("builtin").documents("train") for w in re.findall(r"\b[a-z]{3,12}\b", text))
    frequent = [(-count, word) for word, count in counts.items() if count >= 3]
    return [word for _, word in sorted(frequent)[:NUM_WORDS]]


@functools.lru_cache
def _known() -> frozenset[str]:
    return frozenset(get_words())


def _word(rng: random.Random, split: str) -> str:
    """A word of the split: every twentieth word is in val, and as many are in test."""
    words = get_words()
    while True:
        index = rng.randrange(len(words))
        if {9: "val", 19: "test"}.get(index % 20, "train") == split:
            return words[index]


def _lesson_word(rng: random.Random, split: str) -> str:
    """A word to ask about: a real one, except for some in the training split."""
    return _invent(rng) if split == "train" and rng.random() < INVENTED else _word(rng, split)


def _invent(rng: random.Random) -> str:
    """The beginning of one word and the end of another, 3 to 12 letters: combinations of tokens that no real word has."""
    while True:
        first, last = _word(rng, "train"), _word(rng, "train")
        first = first[: rng.randint(1, len(first))]
        if rng.random() < REPEATED:
            first += first[-rng.randint(1, 3) :]
        word = first + last[rng.randrange(len(last)) :]
        if 3 <= len(word) <= 12 and word not in _known():
            return word


def _spell(word: str, counted: str = "") -> str:
    """The word letter by letter; behind each letter that is counted, its number: "The word noon: n(1) o o n(2)"."""
    numbers = itertools.count(1)
    return f"The word {word}: " + " ".join(f"{c}({next(numbers)})" if c == counted else c for c in word)


class SpellingBee(GeneratedTask):
    """How often a letter occurs in a word: the word is spelled out and counted, and the calculator checks the count."""

    SIZES = {"train": 20_000, "val": 200, "test": 256}

    def get_example(self, index: int) -> Conversation:
        rng = random.Random(f"spellingbee {self.split} {index}")
        word = _lesson_word(rng, self.split)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        count = word.count(letter)
        parts = [
            {"type": "text", "text": f"{_spell(word, letter)}\n"},
            {"type": "python", "text": f"' {word}'.count('{letter}')"},
            {"type": "python_output", "text": str(count)},
            {"type": "text", "text": f"\n#### {count}"},
        ]
        shown = letter.upper() if rng.random() < 0.1 else letter
        question = rng.choice(QUESTIONS).format(letter=shown, word=word)
        if rng.random() < 0.2:
            question = question[0].lower() + question[1:].rstrip("?.")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]
        return {"messages": messages, "answer": str(count)}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        found = re.findall(r"####\s*(\d+)", completion)
        return bool(found) and found[-1] == conversation["answer"]


class SimpleSpelling(GeneratedTask):
    """Spelling a word, letter by letter; several words in most of the lessons."""

    SIZES = {"train": 20_000, "val": 200, "test": 256}

    def get_example(self, index: int) -> Conversation:
        rng = random.Random(f"simplespelling {self.split} {index}")
        words = [_lesson_word(rng, self.split) for _ in range(rng.randint(1, MOST_WORDS) if self.split == "train" else 1)]
        *first, last = words
        if first:
            question = rng.choice(SPELLING_SEVERAL).format(words=f"{', '.join(first)} and {last}")
        else:
            question = rng.choice(SPELLING).format(word=last)
        answer = "\n".join(map(_spell, words))
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]

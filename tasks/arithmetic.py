"""Arithmetic in words, answered through the calculator: what a small model can be good at. Made, not read."""

from __future__ import annotations

import hashlib
import random
import re

from nanochat.tools import use_calculator
from tasks.common import Conversation, GeneratedTask

TEST_SHARE = 0.2  # of all pairs of operands, by hash: none of them is ever trained on
QUESTIONS = {
    "+": ("What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "How much is {a} + {b}?",
          "Compute {a} + {b}.", "What is the sum of {a} and {b}?", "Can you add {a} and {b}?", "{a} plus {b}?",
          "Please calculate {a} + {b}.", "{a}+{b}", "I have {a} apples and get {b} more. How many do I have?"),
    "-": ("What is {a} - {b}?", "What is {a} minus {b}?", "Subtract {b} from {a}.", "{a} - {b} = ?", "{a} minus {b}?",
          "Compute {a} - {b}.", "How much is {a} - {b}?", "Please calculate {a} - {b}.", "{a}-{b}"),
    "*": ("What is {a} * {b}?", "What is {a} times {b}?", "Multiply {a} by {b}.", "{a} * {b} = ?", "{a} times {b}?",
          "Compute {a} * {b}.", "What is the product of {a} and {b}?", "How much is {a} x {b}?", "{a}*{b}",
          "Can you multiply {a} and {b}?", "Please calculate {a} * {b}.", "What is {a} x {b}?"),
}  # fmt: skip


class Arithmetic(GeneratedTask):
    """Additions, subtractions and multiplications of small numbers; "test" and "val" share no operands with "train"."""

    SIZES = {"train": 20_000, "val": 200, "test": 1_000}

    def get_example(self, index: int) -> Conversation:
        rng = random.Random(f"arithmetic {self.split} {index}")
        while True:
            op = rng.choice("++**-")
            if self.split == "train":
                a, b = (rng.randrange(*rng.choice(((0, 100), (10, 100), (10, 100), (100, 1000)))) for _ in "ab")
            else:
                a, b = rng.randrange(10, 100), rng.randrange(10, 100)
                op = rng.choice("+*")
            if is_held_out(a, op, b) != (self.split == "train"):
                break
        expression = f"{a}{op}{b}"
        result = use_calculator(expression)
        parts = [
            {"type": "python", "text": expression},
            {"type": "python_output", "text": result},
            {"type": "text", "text": f"The answer is {result}."},
        ]
        question = rng.choice(QUESTIONS[op]).format(a=a, b=b)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]
        return {"messages": messages, "answer": result}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the last number that the completion says is the answer."""
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion)
        return bool(numbers) and numbers[-1].replace(",", "") == conversation["answer"]


def is_held_out(a: int, op: str, b: int) -> bool:
    """Whether these operands are for testing; the order of a sum or product does not matter."""
    first, second = sorted((a, b)) if op in "+*" else (a, b)
    digest = hashlib.sha256(f"{first}{op}{second}".encode()).digest()
    return digest[0] < TEST_SHARE * 256

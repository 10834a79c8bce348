"""Generated arithmetic in words, answered with the calculator: something that a small model can be good at."""

from __future__ import annotations

import random
import re

from nanochat.tools import use_calculator
from tasks.common import Conversation, GeneratedTask, split_by_hash

HELD_OUT = {"val": 0.1, "test": 0.1}  # shares of all pairs of operands, by hash; these are never trained on
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
    """Additions, subtractions and multiplications of small numbers; no operands are in two splits."""

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
            if split_of(a, op, b) == self.split:
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
        """Whether the last number that the completion says, after whatever the calculator did, is the answer."""
        said = completion.rpartition("<|output_end|>")[2]
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", said)
        return bool(numbers) and numbers[-1].replace(",", "") == conversation["answer"]


def split_of(a: int, op: str, b: int) -> str:
    """The split that these operands belong to; the order of a sum or product does not matter."""
    first, second = sorted((a, b)) if op in "+*" else (a, b)
    return split_by_hash(f"{first}{op}{second}", **HELD_OUT)

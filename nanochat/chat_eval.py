"""How well a chat model does a task. Used by scripts/chat_eval.

Generative tasks are answered by the batched engine and judged by the task; categorical ones by the likeliest letter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.engine import Engine
from tasks.common import Conversation, Task


@dataclass(frozen=True)
class TaskResult:
    """Accuracy over n problems with its 95% interval, and the first few answers."""

    accuracy: float
    num_problems: int
    low: float
    high: float
    examples: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "n": self.num_problems, "low": self.low, "high": self.high}


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share of n trials; sound for small n and shares near 0 or 1."""
    if n == 0:
        return 0.0, 1.0
    center = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (center - spread) / (1 + z * z / n)), min(1.0, (center + spread) / (1 + z * z / n))


def evaluate_task(
    engine: Engine,
    task: Task,
    max_problems: int | None = None,
    batch_size: int = 16,
    num_samples: int = 1,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = 50,
    report: Callable[[int], None] = lambda done: None,
) -> TaskResult:
    """Measure a task's first max_problems. With several samples a problem counts if any of them is right (pass@n).

    report is told how many problems are done, after each batch.
    """
    count = len(task) if max_problems is None or max_problems < 0 else min(max_problems, len(task))
    limit = engine.model.config.sequence_len
    scores: list[float] = []
    examples: list[dict[str, Any]] = []
    # Problems of like length together: less padding, and a batch ends together.
    problems = [task[i] for i in range(count)]
    prompts = [engine.tokenizer.render_for_completion(problem) for problem in problems]
    order = sorted(range(count), key=lambda i: len(prompts[i]))
    for start in range(0, count, batch_size):
        chosen = order[start : start + batch_size]
        # Too long a prompt loses its oldest tokens, but for the first: the question's end matters most.
        batch = [_shorten(prompts[i], limit - min(max_tokens, limit // 4)) for i in chosen]
        if task.eval_type == "categorical":
            answers = [[letter] for letter in choose_letters(engine, batch, [problems[i] for i in chosen])]
        else:
            answers = _generate(engine, batch, num_samples, max_tokens, temperature, top_k, seed=chosen[0])
        for i, texts in zip(chosen, answers, strict=True):
            scores.append(max(float(task.evaluate(problems[i], text)) for text in texts))
            if len(examples) < 8:
                question = problems[i]["messages"][-2]["content"]
                examples.append({"question": question, "answer": texts[0], "correct": scores[-1] > 0})
        report(len(scores))
    accuracy = sum(scores) / max(1, len(scores))
    return TaskResult(accuracy, len(scores), *wilson_interval(accuracy, len(scores)), examples)


def _shorten(prompt: list[int], most: int) -> list[int]:
    return prompt if len(prompt) <= most else [prompt[0], *prompt[len(prompt) - most + 1 :]]


def _generate(
    engine: Engine,
    prompts: list[list[int]],
    num_samples: int,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> list[list[str]]:
    """num_samples answers to each prompt."""
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    rows = engine.complete(repeated, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)
    texts = [engine.tokenizer.decode(row.tokens) for row in rows]
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


@torch.no_grad()
def choose_letters(engine: Engine, prompts: list[list[int]], problems: list[Conversation]) -> list[str]:
    """For each prompt the likeliest of the problem's letters as the first token of the answer."""
    model = engine.model
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=model.get_device())
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=ids.device)
    logits = model.logits(model.features(ids)[torch.arange(len(prompts), device=ids.device), last])
    chosen = []
    for row, problem in zip(logits, problems, strict=True):
        letters = problem["letters"]
        tokens = [engine.tokenizer.encode(letter)[0] for letter in letters]
        chosen.append(letters[int(row[tokens].argmax())])
    return chosen

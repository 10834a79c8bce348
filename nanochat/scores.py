"""Statistics of right answers: intervals, centring on guessing, several tries. Used by the evaluations and by everything
that shows their results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share of n trials; sound for small n and shares near 0 or 1."""
    z = 1.96
    if n == 0:
        return 0.0, 1.0
    center = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (center - spread) / (1 + z * z / n)), min(1.0, (center + spread) / (1 + z * z / n))


def pass_at_k(scores: Sequence[float], k: int) -> float:
    """The expected best score of k samples, drawn without replacement: unbiased for any k <= len(scores).

    For scores of 0 and 1 it is the chance that a right one is among them (arXiv 2107.03374, equation 1).
    """
    # Of all draws of k, sample i of the sorted ones is the best in as many as choose the others from the i below it.
    best = sum(score * math.comb(i, k - 1) for i, score in enumerate(sorted(scores)))
    return best / math.comb(len(scores), k)


def centered(accuracy: float, baseline: float) -> float:
    """Accuracy rescaled to 0 for guessing and 1 for all right."""
    return (accuracy - baseline) / (1 - baseline)


def centered_mean(tasks: Iterable[Mapping[str, Any]]) -> tuple[float, float, float]:
    """(mean, low, high) of the centred accuracies of tasks, each with "accuracy", "low", "high" and "baseline".

    The interval combines those of the tasks as independent errors.
    """
    tasks = list(tasks)
    mean = sum(centered(task["accuracy"], task["baseline"]) for task in tasks) / len(tasks)
    half_widths = ((task["high"] - task["low"]) / 2 / (1 - task["baseline"]) for task in tasks)
    error = math.sqrt(sum(half * half for half in half_widths)) / len(tasks)
    return mean, mean - error, mean + error


def core_label(core: Mapping[str, Any]) -> str:
    """ "CORE" if all questions of all tasks were asked, else what was: "CORE, 3 tasks, at most 2 questions of each task"."""
    limit = core.get("max_per_task", -1)
    count = len(core["tasks"])
    tasks = "" if core["name"] == "core_metric" else ", 1 task" if count == 1 else f", {count} tasks"
    return f"CORE{tasks}, at most {limit:,} questions of each task" if limit > 0 else f"CORE{tasks}"


def core_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows of (task, accuracy, 95% interval, centred accuracy, questions) from CORE's results."""
    return [
        [label, f"{task['accuracy']:.1%}", describe_interval(task), f"{task['centered']:.4f}", f"{task['n']:,}"]
        for label, task in results["tasks"].items()
    ]


def describe_interval(task: Mapping[str, Any]) -> str:
    """ "12.5% to 17.0%", of a task's results."""
    return f"{task['low']:.1%} to {task['high']:.1%}"


def describe_mean(mean: Mapping[str, Any]) -> tuple[str, str]:
    """("0.1234", "0.1000 to 0.1468"): the value and the 95% interval of CORE or ChatCORE."""
    return f"{mean['value']:.4f}", f"{mean['low']:.4f} to {mean['high']:.4f}"


def describe_pass_at(pass_at: Mapping[Any, float]) -> str:
    """ "pass@1 12.5%, pass@8 40.0%"; empty for a single sample."""
    return ", ".join(f"pass@{k} {value:.1%}" for k, value in pass_at.items()) if len(pass_at) > 1 else ""

"""Measures a chat model on tasks. Used by scripts/chat_eval and, during training, by chat_rl.

For generative tasks the batched engine answers and the task judges; for categorical ones the likeliest letter counts.
ChatCORE is the mean of the centred accuracies of six tasks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanochat.common import NanochatError, first_line, get_dist_info, print0
from nanochat.cpu import usable_cores
from nanochat.engine import Engine
from nanochat.files import append_json_lines, read_json_lines
from nanochat.ranks import all_or_none, compare_ranks, gather_objects, on_rank0
from nanochat.sampling import SamplingParams
from nanochat.scores import centered_mean, pass_at_k, wilson_interval
from nanochat.sequence import Sequence
from nanochat.tokenizer import as_text
from nanochat.trimming import padded, prompt_room, trim_prompt

if TYPE_CHECKING:
    from tasks.common import Conversation, Task

CHATCORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
CHUNK_BATCHES = 8  # batches of answers between saves and progress reports: enough to keep the engine's rows full
NUM_EXAMPLES = 8  # answers kept for the report


@dataclass(frozen=True)
class Answering:
    """How problems are answered; tokens and temperature only matter for generative tasks."""

    num_samples: int = 1
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 50
    context_share: float = 0.25  # see prompt_room

    def label(self, task: Task, name: str) -> str:
        """The key of a task's result, and the name of its file: those of other settings are kept beside it."""
        return name if task.eval_type == "categorical" else name + self.described()

    def described(self) -> str:
        """What follows a name to tell results apart: the settings that matter and are not the usual ones."""
        text, usual = "", Answering()
        if self.temperature > 0:
            text += f", {self.num_samples} drawn at {self.temperature:g}"
            if self.top_k != usual.top_k:
                text += f" from the {self.top_k} likeliest" if self.top_k > 0 else " from all tokens"
        if self.max_tokens != usual.max_tokens:
            text += f", at most {self.max_tokens} tokens"
        return text


@dataclass(frozen=True)
class TaskResult:
    """Accuracy (the mean over problems and samples) over n problems, with its 95% interval.

    pass_at: the expected score of the best of k samples, for k = 1, 2, 4 ... and all; truncated: prompts that were
    too long for the context and lost their beginning; unfinished: answers that reached the limit of tokens or the end of the
    context and were judged as far as they went; examples: the first few questions, each with an answer.
    """

    accuracy: float
    n: int
    low: float
    high: float
    baseline: float
    pass_at: dict[int, float]
    truncated: int
    unfinished: int
    examples: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Everything except the examples, as JSON."""
        content = asdict(self)
        del content["examples"]
        return {**content, "pass_at": {str(k): value for k, value in self.pass_at.items()}}


def evaluate_task(
    engine: Engine,
    task: Task,
    max_problems: int = -1,
    batch_size: int = 32,
    answering: Answering = Answering(),
    path: Path | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> TaskResult:
    """Measure a task's first max_problems (-1: all), over all ranks.

    path: a file with one JSON object per problem. Outcomes found there are reused if the problem is the same (only their
    answers are judged again), so a stopped evaluation continues; a line says so. report(n) is called with the number of
    problems done. A problem's seeds depend only on its own number, not on what is answered beside it.
    """
    _, rank, _, world_size = get_dist_info()
    count = len(task) if max_problems < 0 else min(max_problems, len(task))
    problems = [task[i] for i in range(count)]
    asked = _digest([problem["messages"] for problem in problems])
    compare_ranks({f"the hash of the problems of {type(task).__name__}": asked})
    prompts = [engine.tokenizer.render_for_completion(problem) for problem in problems]
    rows = on_rank0(lambda: _read_outcomes(path, problems))
    if rows:
        print0(f"{len(rows)} of {count} answers are an earlier run's: remove {path} to answer them again")
        _judge(task, problems, list(rows.values()))  # with this version's judge
    # Group problems by length: less padding, and a batch ends together.
    waiting = sorted((i for i in range(count) if i not in rows), key=lambda i: len(prompts[i]))
    report(len(rows))
    samples = 1 if task.eval_type == "categorical" else answering.num_samples
    chunk = world_size * max(1, batch_size * CHUNK_BATCHES // samples)
    for start in range(0, len(waiting), chunk):
        mine = waiting[start : start + chunk][rank::world_size]
        answer_mine = partial(_answer, engine, task, problems, prompts, mine, batch_size, answering)
        new = list(itertools.chain.from_iterable(gather_objects(all_or_none(answer_mine))))
        save = partial(append_json_lines, path, new) if path is not None else lambda: None
        try:
            _judge(task, problems, new)
        except Exception:  # on all ranks; answers take long, so they are kept for a better judge
            on_rank0(save)
            raise
        on_rank0(save)
        rows.update((row["index"], row) for row in new)
        report(len(rows))
    return _summarize(task, problems, [rows[i] for i in range(count)])


def _read_outcomes(path: Path | None, problems: list[Conversation]) -> dict[int, dict[str, Any]]:
    """Outcomes in a file that belong to these problems, by number; everything else in it is ignored."""
    rows = {}
    for row in read_json_lines(path) if path is not None else ():
        match row:
            case {
                "index": int(i),
                "problem": str(problem),
                "answers": [_, *_] as answers,
                "truncated": bool(),
                "unfinished": int(),
            }:
                is_ours = 0 <= i < len(problems) and problem == _digest(problems[i])
                if is_ours and all(isinstance(answer, str) for answer in answers):
                    rows[i] = row
    return rows


def _answer(
    engine: Engine,
    task: Task,
    problems: list[Conversation],
    prompts: list[list[int]],
    chosen: list[int],
    batch_size: int,
    answering: Answering,
) -> list[dict[str, Any]]:
    """The outcomes of the chosen problems, not judged yet.

    Each {"index", "problem" (its hash), "answers", "truncated" (was the prompt?), "unfinished" (how many answers)}.
    """
    limit = engine.model.config.sequence_len
    most = limit if task.eval_type == "categorical" else prompt_room(limit, answering.max_tokens, answering.context_share)
    shortened = [trim_prompt(prompts[i], most) for i in chosen]
    unfinished = [0] * len(chosen)
    if task.eval_type == "categorical":
        answers = []
        for at in range(0, len(chosen), batch_size):
            batch = [problems[i] for i in chosen[at : at + batch_size]]
            answers += [[letter] for letter in choose_letters(engine, shortened[at : at + batch_size], batch)]
    else:
        samples = _generate(engine, shortened, chosen, answering)
        answers = [[engine.tokenizer.decode(row.tokens) for row in rows] for rows in samples]
        unfinished = [sum(row.finish_reason in ("length", "context") for row in rows) for rows in samples]
    return [
        {"index": i, "problem": _digest(problems[i]), "answers": texts, "truncated": len(prompts[i]) > most, "unfinished": cut}
        for i, texts, cut in zip(chosen, answers, unfinished, strict=True)
    ]


def _judge(task: Task, problems: list[Conversation], rows: list[dict[str, Any]]) -> None:
    """Give outcomes their "scores", 0 to 1 for each answer. All ranks share the work, and all cores: judging may run
    programs. On an error no outcome changes."""
    _, rank, _, world_size = get_dist_info()

    def judge_mine() -> list[list[float]]:
        answered = [(problems[row["index"]], row["answers"]) for row in rows[rank::world_size]]
        pairs = [(problem, text) for problem, texts in answered for text in texts]
        with ThreadPoolExecutor(usable_cores()) as pool:
            judged = list(pool.map(lambda pair: verdict(task.evaluate, *pair), pairs))
        if wrong := [score for score in judged if not 0 <= score <= 1]:
            raise NanochatError(f"{type(task).__name__}.evaluate gave {wrong[0]:g}: a score must be from 0 to 1")
        scores = iter(judged)
        return [[next(scores) for _ in texts] for _, texts in answered]

    for r, judged in enumerate(gather_objects(all_or_none(judge_mine))):
        for row, scores in zip(rows[r::world_size], judged, strict=True):
            row["scores"] = scores


def verdict(judge: Callable[[Conversation, str], float], problem: Conversation, answer: str) -> float:
    """What a task's `evaluate` or `reward` gives. Raises NanochatError if it fails or gives no finite number: the task may
    be a user's own."""
    try:
        value = float(judge(problem, answer))
    except NanochatError:
        raise
    except Exception as error:
        name, what = judge.__qualname__, f"{type(error).__name__}: {first_line(error)}"
        raise NanochatError(f"{name} failed on an answer ({what}): mend it; --debug shows where") from error
    if not math.isfinite(value):
        raise NanochatError(f"{judge.__qualname__} gave {value} for an answer: mend it to give a finite number")
    return value


def _digest(problem: object) -> str:
    return hashlib.sha256(json.dumps(problem, sort_keys=True, default=repr).encode("utf-8")).hexdigest()[:12]


def _generate(engine: Engine, prompts: list[list[int]], numbers: list[int], answering: Answering) -> list[list[Sequence]]:
    """num_samples answers to each prompt; each problem has its own seeds."""
    n = answering.num_samples
    params = SamplingParams(answering.temperature, answering.top_k, max_tokens=answering.max_tokens)
    rows = [
        Sequence(prompt, replace(params, seed=n * i + k)) for prompt, i in zip(prompts, numbers, strict=True) for k in range(n)
    ]
    engine.run(rows)
    return [rows[i : i + n] for i in range(0, len(rows), n)]


@torch.no_grad()
def choose_letters(engine: Engine, prompts: list[list[int]], problems: list[Conversation]) -> list[str]:
    """For each prompt, the letter of the problem that is the likeliest first token of the answer."""
    model = engine.model
    ids = padded(prompts, 0, model.get_device())
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=ids.device)
    logits = model.logits(model.features(ids)[torch.arange(len(prompts), device=ids.device), last])
    chosen = []
    for row, problem in zip(logits, problems, strict=True):
        letters = problem["letters"]
        tokens = [engine.tokenizer.encode(letter)[0] for letter in letters]
        chosen.append(letters[int(row[tokens].argmax())])
    return chosen


def _summarize(task: Task, problems: list[Conversation], rows: list[dict[str, Any]]) -> TaskResult:
    n = len(rows)
    accuracy = sum(sum(row["scores"]) / len(row["scores"]) for row in rows) / max(1, n)
    tries = len(rows[0]["scores"]) if rows else 1
    ks = sorted({1 << j for j in range(tries.bit_length())} | {tries})
    pass_at = {k: sum(pass_at_k(row["scores"], k) for row in rows) / max(1, n) for k in ks}
    examples = [
        {"question": as_text(problems[row["index"]]["messages"][-2]["content"]), "answer": row["answers"][0],
         "correct": row["scores"][0] > 0}
        for row in rows[:NUM_EXAMPLES]
    ]  # fmt: skip
    truncated, unfinished = (sum(row[name] for row in rows) for name in ("truncated", "unfinished"))
    return TaskResult(accuracy, n, *wilson_interval(accuracy, n), task.baseline, pass_at, truncated, unfinished, examples)


def chatcore(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """{"name", "value", "low", "high", "tasks"} over the ChatCORE tasks among the results; None if fewer than two.

    The name is "chatcore_metric" over all six tasks and "chatcore_partial" over fewer.
    """
    measured = [results[name] for name in CHATCORE_TASKS if name in results]
    if len(measured) < 2:
        return None
    mean, low, high = centered_mean(measured)
    name = "chatcore_metric" if len(measured) == len(CHATCORE_TASKS) else "chatcore_partial"
    return {"name": name, "value": mean, "low": low, "high": high, "tasks": len(measured)}

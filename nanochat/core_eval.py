"""The CORE metric: 22 tasks of few-shot questions, centred so that guessing scores 0. Used by scripts/base_eval and
base_train, hf_scorer.py and lm_eval_adapter.py.

Tasks, prompts and centring: DCLM, arXiv 2406.11794, section 3.5, on the evaluation bundle's data. Questions and examples are
drawn as in the public nanochat, so the prompts are those of its published numbers. A question has one or more candidate
texts; the one that the model finds likeliest is its answer. The shared beginning of candidates is computed once, and
questions of similar length are computed together.

To evaluate another kind of model, write a class with the three members of `Scorer`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from nanochat.block_attention import attend_masked
from nanochat.common import NanochatError, get_dist_info, print0
from nanochat.compilation import try_to_compile
from nanochat.core_bundle import CoreTask, read_items, read_tasks
from nanochat.devices import is_out_of_memory
from nanochat.files import atomic_write
from nanochat.flash_attention import AttentionPlan
from nanochat.gpt import GPT, Block
from nanochat.ranks import all_or_none, compare_ranks, gather_objects, on_rank0
from nanochat.scores import centered, centered_mean, wilson_interval
from nanochat.tokenizer import Tokenizer
from nanochat.trimming import padded

S = TypeVar("S")
T = TypeVar("T")
NUM_TASKS = 22
BATCH_TOKENS = {"cpu": 8_192, "cuda": 131_072}  # tokens in a batch, over all candidates
SUMMED = ("correct", "truncated")  # the fields of a question's outcome that are summed up
LOGIT_ROWS = 2048  # positions whose logits are in memory at a time


@dataclass(frozen=True)
class Candidate:
    """A text; only tokens[start:] are judged."""

    tokens: list[int]
    start: int


@dataclass(frozen=True)
class Question:
    index: int  # among the items that its examples were drawn from
    candidates: list[Candidate]
    gold: int
    truncated: bool

    @property
    def num_shared(self) -> int:
        """The number of tokens at the beginning that all candidates share."""
        return _common_length([candidate.tokens for candidate in self.candidates])


class Scorer(Protocol):
    """What a model must provide to be evaluated."""

    context: int  # tokens of the longest text

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with whatever the model expects at its beginning (BOS)."""
        ...

    def score(self, questions: list[Question]) -> list[list[tuple[float, bool]]]:
        """For each candidate: the mean log-probability of its judged tokens, and whether each was the likeliest."""
        ...


# ----------------------------------------------------------------------------- prompts


def render(task: CoreTask, item: dict[str, Any], shots: list[dict[str, Any]]) -> tuple[list[str], str | None]:
    """(each candidate's whole text; for language_modeling, the text before the answer)."""
    solved = "".join(f"{_solution(task, shot)}\n\n" for shot in shots)
    if task.kind == "multiple_choice":
        return [f"{solved}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]], None
    if task.kind == "schema":
        return [f"{solved}{c}{task.delimiter}{item['continuation']}" for c in item["context_options"]], None
    before = f"{solved}{item['context'].strip()}{task.delimiter}"
    return [before + item["continuation"]], before.strip()  # a space at the end belongs to the answer's first token


def _solution(task: CoreTask, shot: dict[str, Any]) -> str:
    if task.kind == "multiple_choice":
        return f"{shot['query']}{task.delimiter}{shot['choices'][shot['gold']]}"
    if task.kind == "schema":
        return f"{shot['context_options'][shot['gold']]}{task.delimiter}{shot['continuation']}"
    return f"{shot['context'].strip()}{task.delimiter}{shot['continuation']}"


def build_question(task: CoreTask, items: list[dict[str, Any]], index: int, scorer: Scorer) -> Question:
    """The question for one item, with few-shot examples from other items; texts that are too long lose their beginning."""
    item, rng = items[index], random.Random(1234 + index)
    others = [i for i in range(len(items)) if i != index]
    shots = [items[i] for i in rng.sample(others, min(task.num_fewshot, len(others)))]
    texts, before = render(task, item, shots)
    tokens = [scorer.encode(text) for text in texts]
    if task.kind == "multiple_choice":  # one choice may begin with another: judge both from the same place
        starts = [min(_common_length(tokens), *(len(text) - 1 for text in tokens))] * len(tokens)
    elif task.kind == "schema":
        shared = _common_length([list(reversed(t)) for t in tokens])
        starts = [len(t) - shared for t in tokens]
    else:
        starts = [_common_length([tokens[0], scorer.encode(before or "")])]
    starts = [min(max(start, 1), len(text) - 1) for text, start in zip(tokens, starts, strict=True)]  # within the text
    cut = max(0, max(map(len, tokens)) - scorer.context)  # the same for all: the beginning stays shared
    cut = min([cut, *(start - 1 for start in starts)])
    candidates = [Candidate(text[cut : cut + scorer.context], start - cut) for text, start in zip(tokens, starts, strict=True)]
    return Question(index, candidates, item.get("gold", 0), truncated=cut > 0)


def _common_length(texts: list[list[int]]) -> int:
    shortest = min(map(len, texts))
    return next((i for i in range(shortest) if len({text[i] for text in texts}) > 1), shortest)


# ----------------------------------------------------------------------------- our models


@dataclass
class Row:
    """Texts computed together: their shared beginning once, then the rest of each, which does not see the others."""

    tokens: list[int]
    previous: list[int]  # the token before each in its own text; the first token before itself
    positions: list[int]  # of each token in its own text
    owners: list[int]  # 0: shared by all; i: belongs to the row's i-th text
    judged: list[tuple[list[int], list[int]]]  # for each text: the places that predict, and the tokens to predict

    @classmethod
    def of(cls, candidates: list[Candidate], shared: int) -> Row:
        row = cls([], [], list(range(shared)), [0] * shared, [])
        row.tokens, row.previous = candidates[0].tokens[:shared], _before(candidates[0].tokens)[:shared]
        for owner, candidate in enumerate(candidates, 1):
            offset = len(row.tokens) - shared  # from a place in the text to one in the row, after the shared part
            end = len(candidate.tokens)
            before = range(candidate.start - 1, end - 1)
            places = [at if at < shared else at + offset for at in before]
            row.judged.append((places, candidate.tokens[candidate.start :]))
            row.tokens += candidate.tokens[shared:]
            row.previous += _before(candidate.tokens)[shared:]
            row.positions += range(shared, end)
            row.owners += [owner] * (end - shared)
        return row


class NanochatScorer:
    """Scores with a GPT: rows of similar length together within a token budget, shared beginnings once."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_tokens: int | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.context = model.config.sequence_len
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(model.get_device().type, BATCH_TOKENS["cpu"])
        self._run_block: Callable[..., torch.Tensor] = Block.forward

    def compile(self) -> str | None:
        """Compile for any number and length of rows, worthwhile from a few thousand questions; returns why if it fails."""
        reason = try_to_compile(self.model.get_device())
        if reason is None:
            self._run_block = torch.compile(Block.forward, dynamic=True)
            with torch.inference_mode():  # now, with arbitrary sizes that the compiler will not specialize on
                self._score_batch([Row.of([Candidate([0] * length, 1)], 0) for length in (37, 23, 11)])
        return reason

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, prepend="<|bos|>")

    @torch.inference_mode()
    def score(self, questions: list[Question]) -> list[list[tuple[float, bool]]]:
        rows = [self._rows(question) for question in questions]
        flat = [row for part in rows for row in part]
        found = iter(score_by_length(self._score_batch, flat, [len(row.tokens) for row in flat], self.batch_tokens))
        return [[score for _ in part for score in next(found)] for part in rows]

    def _rows(self, question: Question) -> list[Row]:
        """One row for all candidates, or one for each if attention over the long row would cost more."""
        together = Row.of(question.candidates, question.num_shared)
        if len(together.tokens) ** 2 <= sum(len(c.tokens) ** 2 for c in question.candidates):
            return [together]
        return [Row.of([candidate], 0) for candidate in question.candidates]

    def _score_batch(self, rows: list[Row]) -> list[list[tuple[float, bool]]]:
        """The scores of each row's texts."""
        model, device = self.model, self.model.get_device()
        if len(rows) == 1:  # compiled code treats a single row as a special case
            return self._score_batch(rows * 2)[:1]
        idx = padded([row.tokens for row in rows], 0, device)
        previous = padded([row.previous for row in rows], 0, device)
        positions = padded([row.positions for row in rows], 0, device)
        owners = padded([row.owners for row in rows], -1, device).to(torch.int32)  # padding sees only padding
        small = positions.to(torch.int32)  # makes the masks faster
        distance = small[:, :, None] - small[:, None, :]
        visible = (owners[:, None, :] == 0) | (owners[:, :, None] == owners[:, None, :])
        visible &= distance >= 0
        nothing, hidden = torch.tensor([0.0, float("-inf")], dtype=model.get_compute_dtype(), device=device)
        masks = {
            window: torch.where(visible & (distance <= window), nothing, hidden)[:, None]
            for window in set(model.config.windows())
        }
        plans = [AttentionPlan(attend_masked, 0, masks[window]) for window in model.config.windows()]
        T = idx.size(1)
        judged = [(i, places, targets) for i, row in enumerate(rows) for places, targets in row.judged]
        wanted = torch.tensor([i * T + place for i, places, _ in judged for place in places], device=device)
        ids = torch.tensor([token for *_, targets in judged for token in targets], device=device)
        features = model.trunk(idx, model.rotary(positions, T), plans, self._run_block, wanted, previous)
        logprobs, likeliest = [], []
        for part, expected in zip(features.split(LOGIT_ROWS), ids.split(LOGIT_ROWS), strict=True):
            logits = model.logits(part)
            logprobs.append(logits.log_softmax(-1).gather(1, expected[:, None])[:, 0])
            likeliest.append(logits.argmax(-1) == expected)
        sizes = [len(places) for _, places, _ in judged]
        means = [part.mean().item() for part in torch.cat(logprobs).split(sizes)]
        greedy = [bool(part.all()) for part in torch.cat(likeliest).split(sizes)]
        found = iter(zip(means, greedy, strict=True))
        return [[next(found) for _ in row.judged] for row in rows]


def score_by_length(score: Callable[[list[S]], list[T]], texts: list[S], lengths: list[int], most_tokens: int) -> list[T]:
    """score(texts), computed with texts of similar length together; see `batches_by_length` and `in_halves`."""
    found: dict[int, T] = {}
    for batch in batches_by_length(lengths, most_tokens):
        found |= zip(batch, in_halves(score, [texts[i] for i in batch]), strict=True)
    return [found[i] for i in range(len(texts))]


def in_halves(score: Callable[[list[S]], list[T]], texts: list[S]) -> list[T]:
    """score(texts); if memory runs out, score each half separately."""
    try:
        return score(texts)
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(texts) == 1:
            raise
    half = len(texts) // 2  # not in the handler: the traceback keeps the failed attempt's memory alive
    return in_halves(score, texts[:half]) + in_halves(score, texts[half:])


def batches_by_length(lengths: list[int], most_tokens: int) -> Iterator[list[int]]:
    """Groups of indices of texts of similar length: at most most_tokens with padding, or a single text."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > most_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _before(tokens: list[int]) -> list[int]:
    return [*tokens[:1], *tokens[:-1]]


# ----------------------------------------------------------------------------- the metric


def evaluate_core(
    scorer: Scorer,
    bundle: Path,
    max_per_task: int = -1,
    folder: Path | None = None,
    report: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> dict[str, Any]:
    """Evaluate every task that has data, over all ranks: {"tasks": {label: ...}, "missing": [...], "max_per_task": -1 if no
    task has more questions} and of their mean "name", "value", "low", "high".

    The mean of centred accuracies is named "core_metric" over all 22 tasks and "core_partial" over fewer. folder: for each
    question's outcome, for this model only; tasks found there with the same questions are not computed again, and a line
    says so. report(label, done, total) is called as a task proceeds.
    """
    tasks = read_tasks(bundle)
    compare_ranks({f"the size in bytes of {task.label}": task.path.stat().st_size for task in tasks if task.path.exists()})
    results: dict[str, Any] = {"tasks": {}, "missing": []}
    num_kept = 0
    for task in tasks:
        if not task.path.exists():
            results["missing"].append(task.label)
            continue
        path = folder / _rows_name(task, max_per_task) if folder is not None else None
        rows = on_rank0(partial(_finished_rows, path))
        if rows is None:
            rows = _evaluate_task(scorer, task, max_per_task, report)
            if path is not None:
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                on_rank0(partial(atomic_write, path, lines))
        else:
            num_kept += 1
        n, correct = len(rows), sum(row["correct"] for row in rows)
        low, high = wilson_interval(correct / n, n)
        results["tasks"][task.label] = {
            "accuracy": correct / n,
            "centered": centered(correct / n, task.baseline),
            "baseline": task.baseline,
            "n": n,
            "low": low,
            "high": high,
            "truncated": sum(row["truncated"] for row in rows),
        }
    if num_kept:
        print0(f"{num_kept} of {len(results['tasks'])} tasks are an earlier run's: remove {folder} to measure them again")
    if not results["tasks"]:
        raise NanochatError(f"{bundle} has data for none of its {len(tasks)} tasks: give another with --eval-bundle")
    name = "core_metric" if len(results["tasks"]) == NUM_TASKS else "core_partial"
    mean, low, high = centered_mean(results["tasks"].values())
    limit = max_per_task if any(task["n"] == max_per_task for task in results["tasks"].values()) else -1
    return {**results, "max_per_task": limit, "name": name, "value": mean, "low": low, "high": high}


def _evaluate_task(
    scorer: Scorer, task: CoreTask, max_per_task: int, report: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """One row for each question, in order, from all ranks."""
    items = read_items(task)
    lines = list(range(len(items)))
    random.Random(1337).shuffle(lines)
    count = min(max_per_task, len(lines)) if max_per_task > 0 else len(lines)
    items = [items[i] for i in lines[: max(count, task.num_fewshot + 1)]]  # the examples are of the questions asked
    _, rank, _, world_size = get_dist_info()
    mine = range(rank, count, world_size)

    def judge_mine() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for at in range(0, len(mine), 256):  # make prompts in portions, to bound memory
            questions = [build_question(task, items, index, scorer) for index in mine[at : at + 256]]
            for question, scores in zip(questions, scorer.score(questions), strict=True):
                rows.append({"index": lines[question.index], **_judge(task, question, scores)})
            report(task.label, min(count, len(rows) * world_size), count)  # the other ranks are about as far
        return rows

    rows = itertools.chain.from_iterable(gather_objects(all_or_none(judge_mine)))
    return sorted(rows, key=lambda row: row["index"])


def _judge(task: CoreTask, question: Question, scores: list[tuple[float, bool]]) -> dict[str, Any]:
    row = {"truncated": question.truncated, "logprobs": [round(mean, 6) for mean, _ in scores]}
    if task.kind == "language_modeling":
        return {**row, "correct": scores[0][1]}
    chosen = max(range(len(scores)), key=lambda i: scores[i][0])
    return {**row, "chosen": chosen, "gold": question.gold, "correct": chosen == question.gold}


def _rows_name(task: CoreTask, max_per_task: int) -> str:
    """The file name for a task's outcomes; it changes with the questions and the way they are asked."""
    how = (task.kind, task.num_fewshot, task.delimiter)
    asked = hashlib.sha256(repr(how).encode("utf-8"))
    asked.update(task.path.read_bytes())
    return f"{task.label}{f'_{max_per_task}' if max_per_task > 0 else ''}_{asked.hexdigest()[:12]}.jsonl"


def _finished_rows(path: Path | None) -> list[dict[str, Any]] | None:
    """The outcomes that an earlier run wrote; None if there are none or the file is not as expected."""
    if path is None or not path.exists():
        return None
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError):
        return None
    is_whole = all(isinstance(row, dict) and {type(row.get(name)) for name in SUMMED} == {bool} for row in rows)
    return rows if rows and is_whole else None

"""A stage's eval.json: the results of its newest checkpoint. Written by base_eval and chat_eval, read by reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from nanochat.checkpoint_manager import hash_of_weights
from nanochat.common import NanochatError, complain
from nanochat.files import atomic_write, read_json, replace
from nanochat.runs import list_steps

EVAL_FILE = "eval.json"


def merge_eval(stage_dir: Path, step: int, results: dict[str, Any]) -> dict[str, Any]:
    """Add results to the stage's eval.json, and return all of it.

    Results of an earlier step or of other weights are dropped; of two results for a task, the one over more problems stays.

    Results of a step before the one in eval.json go into a separate file, which no report reads.
    """
    stamp = {"step": step, **_weights(stage_dir, step)}
    path = stage_dir / EVAL_FILE
    stage_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(stage_dir / f".{EVAL_FILE}.lock"):  # two commands may measure at once
        _set_damaged_aside(path)
        if read_eval(stage_dir).get("step", step) > step:
            path = stage_dir / f"eval_step_{step:06d}.json"
            _set_damaged_aside(path)
        old = read_json(path)
        merged: dict[str, Any] = {**old, **stamp} if _agrees(old, stamp) else stamp
        for key, value in results.items():
            before = merged.get(key)
            if key == "core":  # a mean over tasks
                merged[key] = value if before is None or _questions(before) <= _questions(value) else before
            elif isinstance(value, dict) and isinstance(before, dict):
                merged[key] = {**before, **{name: new for name, new in value.items() if not _is_fuller(before.get(name), new)}}
            else:
                merged[key] = value
        atomic_write(path, json.dumps(merged, indent=2))
    return merged


def _is_fuller(result: Any, other: Any) -> bool:
    """Whether a task's result is over more problems than another, or there are more examples of its answers."""
    if isinstance(result, list) and isinstance(other, list):
        return len(result) > len(other)
    return isinstance(result, dict) and isinstance(other, dict) and result.get("n", 0) > other.get("n", 0)


def _questions(core: dict[str, Any]) -> int:
    return sum(task.get("n", 0) for task in core["tasks"].values())


def _set_damaged_aside(path: Path) -> None:
    """Rename an unreadable eval.json, so that new results (minutes of work) can be stored."""
    try:
        is_whole = type(read_json(path).get("step", 0)) is int
    except NanochatError:
        is_whole = False
    if not is_whole:
        aside = path.with_name(f"{path.name}.damaged")
        replace(path, aside)
        complain(f"{path} is damaged: it is now {aside.name}, and the new results start a new file")


def read_eval(stage_dir: Path) -> dict[str, Any]:
    """The stage's eval.json; {} if its weights have since been replaced by others."""
    results = read_json(stage_dir / EVAL_FILE)
    if not results or not (steps := list_steps(stage_dir)):
        return results
    step = results.get("step")
    current = step in steps and _agrees(results, _weights(stage_dir, step))
    return results if current else {}


def _agrees(results: dict[str, Any], stamp: dict[str, Any]) -> bool:
    """Whether results belong to this step and these weights, as far as they say."""
    return all(results.get(name, value) == value for name, value in stamp.items())


def _weights(stage_dir: Path, step: int) -> dict[str, str]:
    try:
        return {"weights": hash_of_weights(stage_dir, step)} if step in list_steps(stage_dir) else {}
    except NanochatError:  # a damaged manifest is a reason not to load those weights, not to hide results
        return {}

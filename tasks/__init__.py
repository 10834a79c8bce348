"""The tasks by name. To add one: a file with a Task, and a line in TASKS."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

from nanochat.common import NanochatError
from tasks.common import Task, TaskMixture

# name: (module, class, further arguments). Each class is called with split and these, and with data_dir if it takes that:
# the folder of --task-data. Splits are "train", "val" (held out of the training data) and "test" (for the final measurement).
TASKS: dict[str, tuple[str, str, dict[str, object]]] = {
    "ARC-Easy": ("arc", "ARC", {"subset": "ARC-Easy"}),
    "ARC-Challenge": ("arc", "ARC", {"subset": "ARC-Challenge"}),
    "Arithmetic": ("arithmetic", "Arithmetic", {}),
    "DocQA": ("docqa", "DocQA", {}),
    "GSM8K": ("gsm8k", "GSM8K", {}),
    "HumanEval": ("humaneval", "HumanEval", {}),
    "Identity": ("identity", "Identity", {}),
    "MMLU": ("mmlu", "MMLU", {}),
    "Repeat": ("repeat", "Repeat", {}),
    "SimpleSpelling": ("spellingbee", "SimpleSpelling", {}),
    "SmolTalk": ("smoltalk", "SmolTalk", {}),
    "SpellingBee": ("spellingbee", "SpellingBee", {}),
}


def task_name(name: str) -> str:
    """The name as spelled in TASKS, whatever its case; a path to a .jsonl file unchanged. Raises NanochatError."""
    if name.endswith(".jsonl"):
        return name
    known = {task.lower(): task for task in TASKS}
    if name.lower() in known:
        return known[name.lower()]
    if os.path.isfile(os.path.expanduser(name)):
        raise NanochatError(f"{name} must be a .jsonl file with one conversation per line")
    nearest = difflib.get_close_matches(name.lower(), known, 1)
    hint = f"did you mean {known[nearest[0]]}?" if nearest else f"choose from {', '.join(TASKS)}, or a path to a .jsonl file"
    raise NanochatError(f"unknown task {name!r}: {hint}")


def build_task(name: str, split: str, data_dir: Path | None = None, stop: int | None = None) -> Task:
    """The first `stop` conversations of the task of that name, or of a path to a .jsonl file. Raises NanochatError."""
    name, slicing = task_name(name), {} if stop is None else {"stop": stop}
    if name not in TASKS:
        from tasks.customjson import CustomJSON

        return CustomJSON(Path(os.path.expanduser(name)), split, **slicing)  # shells do not expand ~ after a comma
    make, arguments = task_class(name), {"split": split, **TASKS[name][2], **slicing}
    parameters = inspect.signature(make)
    if "data_dir" in parameters.parameters:
        arguments["data_dir"] = data_dir
    try:
        parameters.bind(**arguments)
    except TypeError as error:
        raise NanochatError(f"task {name} takes other arguments than TASKS gives it ({error}): see tasks/common.py") from error
    task: Task = make(**arguments)
    return task


def task_class(name: str) -> Any:
    """The class of a task in TASKS."""
    module, class_name, _ = TASKS[name]
    return getattr(importlib.import_module(f"tasks.{module}"), class_name)


def judged_tasks() -> list[str]:
    """The names of the tasks whose answers can be judged; the others only teach."""
    return [name for name in TASKS if task_class(name).evaluate is not Task.evaluate]


def build_judged_task(name: str, split: str, data_dir: Path | None = None) -> Task:
    """The task of that name. Raises NanochatError if it has no answers to judge, before its data is fetched."""
    known = task_name(name)
    if known not in TASKS or task_class(known).evaluate is Task.evaluate:
        raise NanochatError(f"{name} only teaches: it has no answers to judge; choose another task")
    return build_task(known, split, data_dir)


# A path may contain * and :, as in C:\..., but no comma.
ENTRY = re.compile(r"(.*\.jsonl|[^*:]*)(?:\*(\d{0,3}))?(?::(\d{0,18}))?")


def with_absolute_paths(spec: str) -> str:
    """A mixture as it is recorded, whose paths lead to the same files wherever a later command is given."""
    entries = [entry.strip() for entry in spec.split(",")]
    for i, entry in enumerate(entries):
        if (parsed := ENTRY.fullmatch(entry)) and (name := parsed[1]).endswith(".jsonl"):
            path = os.path.join(os.getcwd(), os.path.expanduser(name))
            if "," not in path:  # which would end the entry: then it is found only from here
                entries[i] = path + entry[len(name) :]
    return ",".join(entries)


def build_mixture(spec: str, split: str, data_dir: Path | None = None) -> TaskMixture:
    """Tasks interleaved: "NAME[*TIMES][:MOST],..." takes at most the first MOST conversations of NAME, TIMES times."""
    tasks: list[Task] = []
    for entry in filter(None, (part.strip() for part in spec.split(","))):
        parsed = ENTRY.fullmatch(entry)
        if parsed is None:
            forms = "NAME, NAME*TIMES or NAME*TIMES:MOST, with TIMES below 1000"
            raise NanochatError(f"{entry[:100]!r} is not an entry of a mixture: write {forms}")
        name, times, most = parsed.groups()
        if 0 in (int(times or 1), int(most or 1)):
            raise NanochatError(f"{entry[:100]!r} takes nothing of {name[:100]}: leave it out, or write a number above 0")
        stop = (int(most) if split == "train" else max(1, int(most) // 20)) if most else None
        task = build_task(name, split, data_dir, stop)
        tasks += [task] * (int(times or 1) if split == "train" else 1)
    if not tasks:
        raise NanochatError("--tasks names no task: give at least one")
    if not any(map(len, tasks)):
        raise NanochatError(f"--tasks {spec[:100]} has no conversation for the split {split}: give more, or other tasks")
    return TaskMixture(tasks)

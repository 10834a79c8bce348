"""The evaluation bundle of the CORE metric: fetches it, and reads its tasks and their questions. Used by core_eval.py,
scripts/base_eval and base_train.
"""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from nanochat.common import NanochatError, get_base_dir
from nanochat.files import read_jsonl, replace

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# As several public projects have recorded it; with other questions, scores could not be compared with published ones.
BUNDLE_SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
FIELDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "gold": int, "choices": list},
    "schema": {"continuation": str, "gold": int, "context_options": list},
    "language_modeling": {"context": str, "continuation": str},
}


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle. baseline: the accuracy of guessing, 0 to 1. Raises NanochatError for meaningless values."""

    label: str
    kind: str  # multiple_choice, schema or language_modeling
    path: Path
    num_fewshot: int
    delimiter: str  # between question and answer
    baseline: float

    def __post_init__(self) -> None:
        for name, value, fine, allowed in (
            ("icl_task_type", self.kind, self.kind in list(FIELDS), f"one of {', '.join(FIELDS)}"),
            ("num_fewshot", self.num_fewshot, type(self.num_fewshot) is int and self.num_fewshot >= 0, "a list of 0 or more"),
            ("continuation_delimiter", self.delimiter, isinstance(self.delimiter, str), "a text"),
            ("random baseline", 100 * self.baseline, 0 <= self.baseline < 1, "0 to less than 100 percent"),
        ):
            if not fine:
                raise NanochatError(f"the {name} of the bundle's task {self.label} is {value!r}: it must be {allowed}")


def find_bundle(path: Path | None) -> Path:
    """The bundle's folder: as given, else <base>/eval_bundle, downloaded if missing."""
    if path is not None:
        if not (path / "core.yaml").exists():
            raise NanochatError(f"{path} is not an evaluation bundle: it has no core.yaml")
        return path
    folder = get_base_dir() / "eval_bundle"
    if not (folder / "core.yaml").exists():
        with FileLock(folder.with_suffix(".lock")):  # only one rank fetches it
            if not (folder / "core.yaml").exists():
                _download_bundle(folder)
    return folder


def _download_bundle(folder: Path) -> None:
    """Fetch and unpack the bundle; it becomes visible as a whole or not at all."""
    print(f"downloading the evaluation bundle from {BUNDLE_URL}")
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        try:
            with urllib.request.urlopen(BUNDLE_URL, timeout=60) as response:
                content = response.read()
        except (OSError, HTTPException) as error:  # no network, or only a part came through
            raise NanochatError(
                f"the evaluation bundle cannot be downloaded ({error}): give a folder with --eval-bundle"
            ) from error
        if (found := hashlib.sha256(content).hexdigest()) != BUNDLE_SHA256:
            raise NanochatError(
                f"{BUNDLE_URL} is damaged or has changed (its sha256 is {found[:12]}…, not {BUNDLE_SHA256[:12]}…): try "
                "again, or give a folder with --eval-bundle"
            )
        zipfile.ZipFile(io.BytesIO(content)).extractall(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        replace(next(Path(temporary).rglob("core.yaml")).parent, folder)


def read_tasks(bundle: Path) -> list[CoreTask]:
    """The tasks that core.yaml lists, with the baselines of eval_meta_data.csv."""
    try:
        entries = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        return [
            CoreTask(
                entry["label"], entry["icl_task_type"], bundle / "eval_data" / entry["dataset_uri"],
                entry["num_fewshot"][0], entry.get("continuation_delimiter", " "), baselines[entry["label"]],
            )
            for entry in entries
        ]  # fmt: skip
    except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        raise NanochatError(f"{bundle} is not a readable evaluation bundle ({type(error).__name__}: {error})") from error


def read_items(task: CoreTask) -> list[dict[str, Any]]:
    """The questions in a task's file. Raises NanochatError with file and line if a line is not a question of its kind."""
    items = read_jsonl(
        task.path, lambda item: _check_item(item, FIELDS[task.kind]), f"{task.kind} question", "restore the bundle"
    )
    if not items:
        raise NanochatError(f"{task.path} is empty: restore the bundle, or give another with --eval-bundle")
    return items


def _check_item(item: dict[str, Any], wanted: dict[str, type]) -> None:
    """Raise ValueError if a question lacks one of these fields, or has a value of another type in it."""
    for name, kind in wanted.items():
        if name not in item:
            raise ValueError(f"it has no {name!r}")
        if type(item[name]) is not kind:
            raise ValueError(f"its {name!r} is {str(item[name])[:40]!r}")
        if kind is list:
            if not all(isinstance(text, str) for text in item[name]):
                raise ValueError(f"not all of its {name!r} are texts")
            if not 0 <= item["gold"] < len(item[name]):
                raise ValueError(f"gold {item['gold']} is not one of the {len(item[name])} choices")
        answers = item[name] if kind is list else [item[name]]
        if name in ("choices", "continuation") and not all(text.strip() for text in answers):
            raise ValueError(f"its {name!r} has an empty answer")

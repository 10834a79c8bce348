"""Where runs, their stages and checkpoints are stored. Used by everything that reads or writes a run."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from nanochat.common import NanochatError, get_base_dir, some_of

STAGE_TITLES = {"base": "Pretraining", "sft": "Supervised fine-tuning", "rl": "Reinforcement learning"}
STAGES = tuple(STAGE_TITLES)
SETTINGS_FILE = "settings.json"  # of a stage
MANIFEST_FILE = "manifest.json"  # of a checkpoint, which is complete once it has this file


def get_runs_dir() -> Path:
    return get_base_dir() / "runs"


def is_tag(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None


def get_run_dir(tag: str) -> Path:
    """The directory of a run. Raises NanochatError for a tag that is not a plain name."""
    if not is_tag(tag):
        raise NanochatError(f"model tag {tag!r} is not a plain name: use letters, digits, '.', '_' and '-'")
    return get_runs_dir() / tag


def suggest_runs(name: str) -> str:
    """What to say after a name that no run has: the nearest names, or some of all."""
    known = sorted({settings.parent.parent.name for settings in get_runs_dir().glob(f"*/*/{SETTINGS_FILE}")})
    if nearest := difflib.get_close_matches(name, known, 3, 0.4):
        return f"did you mean {', '.join(nearest)}?"
    if not known:
        return "there is none yet: make one with python -m scripts.base_train"
    return f"there are {some_of(known, 10)}"


def find_run_dir(run: str) -> Path:
    """The directory of a run, given its tag or path. Raises NanochatError if there is none."""
    path = Path(os.path.expanduser(run))
    path = path.parent if path.name in STAGES else path
    for directory in (get_runs_dir() / run, path):
        if begun_stages(directory):
            return directory
    raise NanochatError(f"no run {run!r} in {get_runs_dir()}, nor a directory of one; {suggest_runs(path.name)}")


def begun_stages(run_dir: Path) -> list[str]:
    return [stage for stage in STAGES if (run_dir / stage / SETTINGS_FILE).exists()]


def check_stage(name: str) -> str:
    """The name of a stage, as it is. Raises NanochatError if there is no such stage."""
    if name not in STAGES:
        raise NanochatError(f"unknown source {name!r}: choose one of {', '.join(STAGES)}")
    return name


def get_stage_dir(tag: str, stage: str) -> Path:
    return get_run_dir(tag) / check_stage(stage)


def heirs(tag: str) -> list[str]:
    """The stages of a run after its base that have checkpoints, which need the run's tokenizer."""
    return [stage for stage in STAGES[1:] if list_steps(get_stage_dir(tag, stage))]


def step_dir(stage_dir: Path, step: int) -> Path:
    return stage_dir / f"step_{step:06d}"


def list_steps(stage_dir: Path) -> list[int]:
    """The complete checkpoints of a stage, oldest first."""
    found = [re.fullmatch(r"step_(\d+)", path.parent.name) for path in stage_dir.glob(f"step_*/{MANIFEST_FILE}")]
    return sorted(int(match[1]) for match in found if match)

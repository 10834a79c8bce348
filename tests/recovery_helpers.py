"""What the tests of recovery share: lives of training commands, runs to compare with, and what a stage holds.

Most lives are forked (nursery.py), so that one costs half a second. The fixtures are known to all tests: conftest.py names
this file as a plugin.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.files import read_json_lines
from nanochat.metrics import read_metrics
from nanochat.runs import list_steps, step_dir
from tests.conftest import TINY_TRAINING
from tests.nursery import ROOT, Life, Nursery

LAST, LONG, KEEP = 12, 60, 2  # steps of a run, of a long one, and checkpoints kept
BASE_FLAGS = [*TINY_TRAINING, f"--num-iterations={LAST}", "--save-every=2", "--eval-every=3", f"--keep-last={KEEP}",
              "--model-tag=tiny", "--resume=auto"]  # fmt: skip
FILES = ("model.safetensors", "optim.safetensors", "meta.json", "manifest.json")
STATE = {"a": torch.arange(6.0).view(2, 3)}

# ----------------------------------------------------------------------------- lives


def begin(nursery: Nursery, base_dir: Path, flags: list[str], script: str = "scripts.base_train") -> Life:
    """A run of a training command, with that base directory."""
    return nursery.start("-m", script, *flags, NANOCHAT_BASE_DIR=str(base_dir))


def train(nursery: Nursery, base_dir: Path, flags: list[str], script: str = "scripts.base_train", code: int = 0) -> str:
    """A whole one; returns what it printed."""
    return nursery.run("-m", script, *flags, code=code, NANOCHAT_BASE_DIR=str(base_dir))


# ----------------------------------------------------------------------------- runs to compare with


@pytest.fixture(scope="session")
def base_flags(corpus: Path) -> list[str]:
    return [*BASE_FLAGS, f"--data={corpus}"]


@pytest.fixture(scope="session")
def whole(nursery: Nursery, base_flags: list[str], tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage of a base training that nothing disturbed, with all its checkpoints. Not to be changed."""
    directory = tmp_path_factory.mktemp("whole")
    tokenizer.save(directory / "tokenizers" / "default")
    train(nursery, directory, [*base_flags, "--keep-last=-1"])
    return directory / "runs" / "tiny" / "base"


@pytest.fixture(scope="session")
def whole_long(nursery: Nursery, base_flags: list[str], tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of LONG steps, for what must come about while a command runs; the usual checkpoints are kept."""
    directory = tmp_path_factory.mktemp("long")
    tokenizer.save(directory / "tokenizers" / "default")
    train(nursery, directory, [*base_flags, f"--num-iterations={LONG}"])
    return directory / "runs" / "tiny" / "base"


def interrupted_copy(whole: Path, base_dir: Path, newest: int = 8) -> Path:
    """The stage as it was when `newest` had been saved."""
    stage_dir = stage_dir_of(base_dir)
    shutil.copytree(whole, stage_dir, dirs_exist_ok=True)
    for step in range(newest + 2, LAST + 1, 2):
        shutil.rmtree(step_dir(stage_dir, step))
    lines = (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    known = [line for line in lines if json.loads(line)["step"] <= newest]
    (stage_dir / "metrics.jsonl").write_text("".join(known), encoding="utf-8")
    shutil.copy(whole.parent / "tokenizer.json", stage_dir.parent)
    return stage_dir


# ----------------------------------------------------------------------------- what a stage holds


def stage_dir_of(base_dir: Path, stage: str = "base") -> Path:
    return base_dir / "runs" / "tiny" / stage


def content_of(stage_dir: Path, step: int) -> tuple[Any, ...]:
    """All of a checkpoint that decides how the run goes on."""
    directory = step_dir(stage_dir, step)
    trainer = json.loads((directory / "meta.json").read_text(encoding="utf-8"))["trainer"]
    return *((directory / name).read_bytes() for name in FILES[:2]), {**trainer, "time_s": None}


def logged_steps(stage_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of all lives; what was done again after a resume is there once if it came to the same."""
    return list(dict.fromkeys(_series(read_json_lines(stage_dir / "metrics.jsonl"), name)))


def _series(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def assert_ended_alike(stage_dir: Path, whole: Path) -> None:
    last = list_steps(whole)[-1]
    assert list_steps(stage_dir)[-1] == last
    assert content_of(stage_dir, last) == content_of(whole, last)
    assert [step for step, _ in logged_steps(whole, "train/loss")] == list(range(1, last + 1))
    for name in ("train/loss", "val/bpb", "val/pass@1"):
        once = _series(read_metrics(stage_dir / "metrics.jsonl"), name)
        assert logged_steps(stage_dir, name) == logged_steps(whole, name) == once
    assert not [*stage_dir.glob(".step_*"), *stage_dir.parent.rglob(".*.tmp")]
    best, name = (max, "val/pass@1") if stage_dir.name == "rl" else (min, "val/bpb")
    scores = {step: value for step, value in logged_steps(whole, name) if step in list_steps(whole)}
    assert best(scores, key=scores.__getitem__) in list_steps(stage_dir)


def count_rows(stage_dir: Path) -> int:
    path = stage_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ----------------------------------------------------------------------------- training


def start_command(base_dir: Path, flags: list[str]) -> subprocess.Popen[str]:
    """The real thing: python -m scripts.base_train."""
    command, pipe = [sys.executable, "-m", "scripts.base_train", *flags], subprocess.PIPE
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def train_here(flags: list[str], at_step: dict[int, Callable[[], object]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train in this process; what belongs to a step happens when it is evaluated, which is after each."""
    from scripts import base_train  # only who trains waits for it

    measure, calls = base_train.evaluate_bpb, iter(range(1, 1000))

    def evaluate(*arguments: Any) -> float:
        at_step.get(next(calls), lambda: None)()
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(base_train, "evaluate_bpb", evaluate)
        assert base_train.main([*flags, "--eval-every=1"]) == 0
    return stage_dir_of(Path(os.environ["NANOCHAT_BASE_DIR"]))

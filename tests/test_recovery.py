"""Training survives kill -9 at any moment, and full disks.

NANOCHAT_KILLS=200 kills that often; the default is less. Damage is in test_recovery_damage.py; signals, clocks and rivals
are in test_recovery_signals.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import newest_valid_step
from nanochat.metrics import MetricsLog
from nanochat.runs import list_steps, step_dir
from scripts import base_train
from tests.helpers import load_all
from tests.nursery import Life, Nursery
from tests.recovery_helpers import (
    KEEP,
    LAST,
    LONG,
    assert_ended_alike,
    begin,
    content_of,
    count_rows,
    interrupted_copy,
    logged_steps,
    stage_dir_of,
    start_command,
    train,
    train_here,
)
from tests.test_rl import FLAGS as RL_FLAGS

pytestmark = pytest.mark.usefixtures("tokenizer_in_place")
KILLS = int(os.environ.get("NANOCHAT_KILLS", 20))
SFT_FLAGS = ["--tasks=Arithmetic:60,Identity:40", "--num-iterations=8", "--no-compile", "--device-type=cpu", "--eval-every=3",
             "--eval-tokens=512", "--save-every=2", f"--keep-last={KEEP}", "--model-tag=tiny", "--resume=auto"]  # fmt: skip
RL_RUN = [*RL_FLAGS, "--num-iterations=6", "--save-every=2", "--eval-every=3", f"--keep-last={KEEP}", "--resume=auto"]

# ----------------------------------------------------------------------------- kill -9


class Witness:
    """Looks at a stage after each death: what is listed is what the undisturbed run had, and nothing was lost."""

    def __init__(self, stage_dir: Path, whole: Path) -> None:
        self.stage_dir, self.whole = stage_dir, whole
        self.steps: list[int] = []
        self.torn = 0  # deaths while a checkpoint was being written

    def look(self) -> None:
        steps = list_steps(self.stage_dir)
        for step in steps:
            load_all(self.stage_dir, step)
            assert content_of(self.stage_dir, step) == content_of(self.whole, step)
        assert newest_valid_step(self.stage_dir) == (max(steps, default=None), [])
        assert max(steps, default=0) >= max(self.steps, default=0)
        assert len(steps) >= min(KEEP, len(self.steps))
        self.steps = steps
        self.torn += any(self.stage_dir.glob(".step_*.tmp"))


def _kill_at_random(life: Life, stage_dir: Path, rng: random.Random, life_s: float) -> None:
    """Half of them at any moment of a life, half while a checkpoint is written."""
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, life_s))
    else:
        before, writes = set(stage_dir.glob(".step_*.tmp")), rng.randrange(1, 4)  # how many of them this life begins
        seen: set[Path] = set()

        def is_writing() -> bool:
            seen.update(set(stage_dir.glob(".step_*.tmp")) - before)
            return len(seen) >= writes

        life.wait(is_writing, pause_s=0.0005)
        time.sleep(rng.choice((0, rng.uniform(0, 0.02))))  # at once: a fast disk has it written in no time
    life.send(signal.SIGKILL)


def _survive(nursery: Nursery, base_dir: Path, script: str, flags: list[str], whole: Path, kills: int, seed: int) -> None:
    """Runs that are killed until they end, as many as it takes."""
    rng, stage_dir = random.Random(seed), stage_dir_of(base_dir, whole.name)
    killed = runs = torn = 0
    started = time.monotonic()
    train(nursery, base_dir, flags, script)
    life_s = time.monotonic() - started
    assert "is complete" in train(nursery, base_dir, flags, script)
    while killed < kills:
        shutil.rmtree(stage_dir)
        stage_dir.mkdir()
        witness, code = Witness(stage_dir, whole), None
        while code != 0:
            life = begin(nursery, base_dir, flags, script)
            if killed < kills:
                _kill_at_random(life, stage_dir, rng, life_s)
            code = life.wait()
            assert code in (0, -signal.SIGKILL), life.said()
            if code:
                killed += 1
                witness.look()
        runs, torn = runs + 1, torn + witness.torn
        assert_ended_alike(stage_dir, whole)
    print(f"{script}: {killed} kills in {runs} runs, {torn} while writing, {time.monotonic() - started:.0f} s")
    assert kills < 20 or torn, "no kill came while a checkpoint was being written"


@pytest.mark.slow
def test_a_base_training_survives_kills(nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path) -> None:
    """Killed at any moment, again and again, it ends with the bits, the losses and the best checkpoint of a whole run; at
    no moment is a checkpoint listed that is not whole, or an older one the newest.
    """
    _survive(nursery, base_dir, "scripts.base_train", base_flags, whole, KILLS, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "stage", "flags"), [("scripts.chat_sft", "sft", SFT_FLAGS), ("tests.reinforce", "rl", RL_RUN)]
)
def test_fine_tuning_and_rl_survive_kills(
    nursery: Nursery, tiny_run: Path, base_dir: Path, tmp_path: Path, script: str, stage: str, flags: list[str]
) -> None:
    """The same for conversations and for rewards."""
    shutil.rmtree(tiny_run / stage, ignore_errors=True)
    shutil.copytree(base_dir, tmp_path / "whole")
    train(nursery, tmp_path / "whole", [*flags, "--keep-last=-1"], script)
    _survive(nursery, base_dir, script, flags, stage_dir_of(tmp_path / "whole", stage), max(4, KILLS // 5), seed=2)


def test_nothing_is_left_of_a_checkpoint_whose_removal_was_killed(
    nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path
) -> None:
    """It loses its name first; the rest goes with the next life."""
    stage_dir = interrupted_copy(whole, base_dir)
    step_dir(stage_dir, 2).rename(stage_dir / ".step_000002.tmp")
    train(nursery, base_dir, base_flags)
    assert not list(stage_dir.glob("*step_000002*"))


# ----------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path, tokenizer) -> Iterator[Path]:
    """A disk with room for four checkpoints, as a base directory with a tokenizer."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: that takes Linux and root")
    try:
        tokenizer.save(path / "tokenizers" / "default")
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def _fill(disk: Path, leave: int = 0) -> Path:
    """A file that takes all the room there is but for `leave` bytes; removing it frees the disk."""
    filler = disk / "filler"
    with open(filler, "ab", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.seek(0, os.SEEK_END) - leave))
    return filler


def test_training_goes_on_while_the_disk_is_full(
    small_disk: Path, base_flags: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """With a warning and without a row lost; what was saved before stays, nothing half-written does, the end is the same."""
    flags = [*base_flags, "--num-iterations=40"]
    undisturbed = train_here(flags, {}, monkeypatch)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(small_disk))
    stage_dir = stage_dir_of(small_disk)

    def look() -> None:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        assert newest_valid_step(stage_dir) == (2, [])
        assert not [*stage_dir.glob(".step_*")]
        assert count_rows(stage_dir) < 60  # of 72: there was no room for more

    def free() -> None:
        look()
        (small_disk / "filler").unlink()

    train_here(flags, {3: lambda: _fill(small_disk), 10: look, 37: free}, monkeypatch)
    output, errors = capfd.readouterr()
    assert "warning: a checkpoint could not be written; training goes on. the disk is full" in output
    assert errors.count("metrics cannot be written now") >= 1
    assert_ended_alike(stage_dir, undisturbed)
    rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [step for step in range(1, 41) for _ in ("trained", "evaluated")]


@pytest.mark.slow
def test_the_last_save_must_succeed(nursery: Nursery, small_disk: Path, base_flags: list[str], whole_long: Path) -> None:
    """A disk that fills up and stays full: one sentence, exit code 1, and with some space the same command goes on."""
    flags, stage_dir = [*base_flags, f"--num-iterations={LONG}"], stage_dir_of(small_disk)
    process = start_command(small_disk, flags)
    while process.poll() is None and not list_steps(stage_dir):
        time.sleep(0.001)
    filler = _fill(small_disk)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert re.search(r"^error: the disk is full \(.*\): free some space.*$", errors, re.MULTILINE)
    assert "Traceback" not in errors and "training goes on" in output
    newest, skipped = newest_valid_step(stage_dir)
    assert newest < LONG and not skipped and not [*stage_dir.glob(".step_*")]
    filler.unlink()
    assert f"going on from step {newest}" in train(nursery, small_disk, flags)
    assert_ended_alike(stage_dir, whole_long)


@pytest.mark.parametrize("leave", [0, 8192, 2**19])
def test_a_disk_that_is_full_from_the_start(
    nursery: Nursery, small_disk: Path, base_flags: list[str], whole: Path, leave: int
) -> None:
    """However little is left, it is one sentence, and the same command goes on once there is space."""
    filler = _fill(small_disk, leave)
    said = train(nursery, small_disk, base_flags, code=1)
    assert len(re.findall(r"^error: the disk is full", said, re.MULTILINE)) == 1 and "Traceback" not in said
    assert not [*stage_dir_of(small_disk).glob("*step_*")]
    filler.unlink()
    train(nursery, small_disk, base_flags)
    assert_ended_alike(stage_dir_of(small_disk), whole)


def test_a_row_that_had_no_room_is_there_when_its_step_is_saved(
    base_flags: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on from a checkpoint finds the rows of all the steps before it."""
    write, refused = MetricsLog._write, []

    class Full:
        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def write_but_once(log: MetricsLog, line: str) -> None:
        file = log._file
        if '"step": 8, ' in line and not refused:
            refused.append(line)
            log._file = Full()
        write(log, line)
        log._file = file

    monkeypatch.setattr(MetricsLog, "_write", write_but_once)
    with pytest.raises(KeyboardInterrupt):
        train_here(base_flags, {7: lambda: signal.raise_signal(signal.SIGTERM)}, monkeypatch)
    assert refused and list_steps(stage_dir_of(base_dir))[-1] == 8
    train_here(base_flags, {}, monkeypatch)
    assert [step for step, _ in logged_steps(stage_dir_of(base_dir), "train/loss")] == list(range(1, LAST + 1))


@pytest.mark.parametrize(("first", "best"), [(3.0, 6), (1.5, 2)])
def test_the_best_checkpoint_is_one_that_there_is(
    first: float, best: int, base_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was measured best but could not be written does not take the place of the best that was."""
    save_tensors, values = checkpoint_manager.save_tensors, iter((first, 1.0, 2.0, 2.5, 2.6, 2.7))

    def fail_once(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step_000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_tensors(tensors, path)

    monkeypatch.setattr(checkpoint_manager, "save_tensors", fail_once)
    monkeypatch.setattr(base_train, "evaluate_bpb", lambda *arguments: next(values))
    assert base_train.main([*base_flags, "--eval-every=2"]) == 0
    stage_dir = stage_dir_of(Path(os.environ["NANOCHAT_BASE_DIR"]))
    assert list_steps(stage_dir) == [best, 10, 12]

"""Training survives signals, clocks that jump, and rivals that want the same stage."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nanochat.checkpoint_manager import find_run, newest_valid_step, save_checkpoint
from nanochat.metrics import MetricsLog
from nanochat.runs import step_dir
from scripts import base_train
from tests.nursery import Life, Nursery
from tests.recovery_helpers import (
    LAST,
    LONG,
    STATE,
    assert_ended_alike,
    begin,
    content_of,
    count_rows,
    logged_steps,
    stage_dir_of,
    start_command,
    train,
)

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # which Windows lacks
pytestmark = pytest.mark.usefixtures("tokenizer_in_place")

# ----------------------------------------------------------------------------- signals


def _stop(life: Life, stage_dir: Path, rng: random.Random, numbers: list[signal.Signals], longest_s: float) -> None:
    """Signals, one at once after the other, some time after the first update of this life."""
    before = count_rows(stage_dir)
    life.wait(lambda: count_rows(stage_dir) > before + 1)
    time.sleep(rng.uniform(0, longest_s))
    for number in numbers:
        life.send(number)


@pytest.mark.slow
def test_signals_at_random_moments(nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path) -> None:
    """SIGTERM or SIGINT, or both as torchrun and a terminal send them: saved at once, exit 130, and the end is the same."""
    rng, stage_dir, stopped = random.Random(8), stage_dir_of(base_dir), 0
    while stopped < 5:
        shutil.rmtree(stage_dir, ignore_errors=True)
        code = None
        while code != 0:
            life = begin(nursery, base_dir, base_flags)
            numbers = rng.choices([signal.SIGTERM, signal.SIGINT], k=rng.randrange(1, 3))
            _stop(life, stage_dir, rng, numbers, 0.2)
            code = life.wait()
            if f"step {LAST}: val/bpb" in life.said():
                code = 0  # the signal met a process that had done all and was about to leave
            assert code in (0, 130), life.said()
            if code == 130:
                stopped += 1
                step = int(re.search(r"stopped after step (\d+); saved", life.said())[1])
                assert newest_valid_step(stage_dir) == (step, [])
                assert content_of(stage_dir, step)[:2] == content_of(whole, step)[:2] if step % 2 == 0 else step < LAST
        assert content_of(stage_dir, LAST)[:2] == content_of(whole, LAST)[:2]
        assert logged_steps(stage_dir, "train/loss") == logged_steps(whole, "train/loss")


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM], [HANGUP]])
def test_a_stopped_command_goes_on(
    nursery: Nursery, base_flags: list[str], whole_long: Path, base_dir: Path, numbers: list[signal.Signals]
) -> None:
    """The same of a real command, by a process as a user would start it."""
    flags, stage_dir = [*base_flags, f"--num-iterations={LONG}"], stage_dir_of(base_dir)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it, and pass that on
    process = start_command(base_dir, flags)
    signal.signal(signal.SIGHUP, before)
    while process.poll() is None and not count_rows(stage_dir):
        time.sleep(0.001)
    time.sleep(random.Random(str(numbers)).uniform(0, 0.5))
    for number in numbers:
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "\nstopping once this step is saved; again: at once\ninterrupted\n")
    step = int(re.search(r"stopped after step (\d+); saved", output)[1])
    assert newest_valid_step(stage_dir) == (step, [])
    train(nursery, base_dir, flags)
    assert content_of(stage_dir, LONG)[:2] == content_of(whole_long, LONG)[:2]
    assert logged_steps(stage_dir, "train/loss") == logged_steps(whole_long, "train/loss")


# ----------------------------------------------------------------------------- clocks


def test_a_clock_that_jumps_misleads_nobody(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest run is the one that was saved last, and the newest step the one with the highest number."""
    rng, clock, steps = random.Random(6), time.time, dict.fromkeys("abc", 0)
    for _ in range(60):
        jump = rng.choice([-3e9, -86400 * 3, -1, 0, 1, 86400 * 365 * rng.randrange(1, 50)])
        monkeypatch.setattr(time, "time", lambda jump=jump: clock() + jump)
        tag = rng.choice(list(steps))
        steps[tag] += 1
        save_checkpoint(base_dir / "runs" / tag / "base", steps[tag], STATE, None, {})
        assert find_run("base") == tag
        assert newest_valid_step(base_dir / "runs" / tag / "base") == (steps[tag], [])


def test_a_run_resumed_in_the_past_is_the_newest(
    base_flags: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of the future, an older one that is resumed with a clock set back, and a new one by the right clock."""
    clock = time.time
    flags = [flag for flag in base_flags if not flag.startswith("--model-tag")] + ["--num-iterations=4"]

    def train(tag: str, days: float) -> None:
        monkeypatch.setattr(time, "time", lambda: clock() + 86400 * days)
        assert base_train.main([*flags, f"--model-tag={tag}"]) == 0
        assert find_run("base") == tag

    train("resumed", 0)
    train("future", 3650)
    shutil.rmtree(step_dir(base_dir / "runs" / "resumed" / "base", 4))
    train("resumed", -30)
    train("new", 0)


# ----------------------------------------------------------------------------- rivals

RIVAL = r"^error: .* is being trained by another process: .*$"


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_second_process_is_turned_away(nursery: Nursery, base_flags: list[str], base_dir: Path, resume: str) -> None:
    """With one sentence; the first one's files stay as they are, and it goes on."""
    flags, stage_dir = [*base_flags, "--num-iterations=100000"], stage_dir_of(base_dir)
    if resume == "none":
        flags += ["--save-every=0"]  # with checkpoints there another sentence would come first
    first = begin(nursery, base_dir, flags)
    try:
        assert first.wait(lambda: count_rows(stage_dir) > 5) is None, first.said()
        paths = [stage_dir / "settings.json", stage_dir.parent / "tokenizer.json"]
        before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]
        rows = (stage_dir / "metrics.jsonl").read_bytes()
        said = train(nursery, base_dir, [*flags, f"--resume={resume}", "--matrix-lr=0.5"], code=1)
        assert len(re.findall(RIVAL, said, re.MULTILINE)) == 1 and "Traceback" not in said
        assert before == [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]
        now = count_rows(stage_dir)
        assert (stage_dir / "metrics.jsonl").read_bytes().startswith(rows)
        assert first.wait(lambda: count_rows(stage_dir) > now) is None, first.said()
    finally:
        first.send(signal.SIGTERM)
        assert first.wait() == 130, first.said()


def test_rivals_that_start_together(nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path) -> None:
    """One of them trains and ends as it would have alone."""
    for _ in range(2):
        lives = [begin(nursery, base_dir, base_flags) for _ in range(3)]
        codes = sorted(life.wait() for life in lives)
        assert codes[0] == 0 and set(codes) <= {0, 1}, [life.said() for life in lives]
        assert all(life.poll() == 0 or re.search(RIVAL, life.said(), re.MULTILINE) for life in lives)
        assert_ended_alike(stage_dir_of(base_dir), whole)
        assert count_rows(stage_dir_of(base_dir)) == LAST + LAST // 3
        shutil.rmtree(stage_dir_of(base_dir))


def test_a_stage_is_taken_before_training_begins(
    nursery: Nursery, base_flags: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes while the first one still builds its model and its data is turned away as well."""
    said = []

    def meet_a_rival(*arguments: Any) -> MetricsLog:
        log = MetricsLog(*arguments)
        rival = begin(nursery, base_dir, [*base_flags, "--matrix-lr=0.5"])
        rival.wait()
        said.append(rival.said())
        return log

    monkeypatch.setattr("nanochat.stage.MetricsLog", meet_a_rival)
    assert base_train.main(base_flags) == 0
    assert re.search(RIVAL, said[0], re.MULTILINE)
    settings = json.loads((stage_dir_of(base_dir) / "settings.json").read_text(encoding="utf-8"))
    assert settings["matrix_lr"] == 0.0126 and len(logged_steps(stage_dir_of(base_dir), "train/loss")) == LAST

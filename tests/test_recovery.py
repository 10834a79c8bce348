"""Training survives anything: kills, torn files, full disks, signals, clocks that jump, rivals, data that goes away.

Most lives are forked from a process that has imported everything (`Nursery`), so that one costs half a second and ends as
the command does. NANOCHAT_KILLS=200 kills that often; the default is less.
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
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import checkpoint_manager, dataloader
from nanochat.checkpoint_manager import find_run, list_steps, load_checkpoint, newest_valid_step, save_checkpoint, step_dir
from nanochat.common import NanochatError
from nanochat.metrics import MetricsLog
from nanochat.report import read_metrics
from scripts import base_train
from tests.conftest import TINY_TRAINING
from tests.helpers import make_document
from tests.test_rl import FLAGS as RL_FLAGS

KILLS = int(os.environ.get("NANOCHAT_KILLS", 20))
ROOT = Path(__file__).parent.parent
LAST, LONG, KEEP = 12, 60, 2  # steps of a run, of a long one, and checkpoints kept
BASE_FLAGS = [*TINY_TRAINING, f"--num-iterations={LAST}", "--save-every=2", "--eval-every=3", f"--keep-last={KEEP}",
              "--model-tag=tiny", "--resume=auto"]  # fmt: skip
SFT_FLAGS = ["--tasks=Arithmetic:60,Identity:40", "--num-iterations=8", "--no-compile", "--device-type=cpu", "--eval-every=3",
             "--eval-tokens=512", "--save-every=2", f"--keep-last={KEEP}", "--model-tag=tiny", "--resume=auto"]  # fmt: skip
RL_RUN = [*RL_FLAGS, "--num-iterations=6", "--save-every=2", "--eval-every=3", f"--keep-last={KEEP}", "--resume=auto"]
FILES = ("model.safetensors", "optim.safetensors", "meta.json", "manifest.json")
STATE = {"a": torch.arange(6.0).view(2, 3)}

# ----------------------------------------------------------------------------- lives

NURSERY = """
import gc, importlib, json, os, sys, traceback
import torch
from nanochat.common import get_compute_dtype, run_command
from nanochat.compilation import measure_matmul_rate
from tasks.arithmetic import Arithmetic

scripts = {name: importlib.import_module(f"scripts.{name}") for name in ("base_train", "chat_sft", "chat_rl")}
measure_matmul_rate(torch.device("cpu"), get_compute_dtype("cpu"))  # half a second, remembered by all that are forked
Arithmetic.reward = lambda self, conversation, text: float(len(text) % 3)  # so that there is something to learn
gc.collect()
gc.freeze()

def live(base_dir, log, script, flags):
    os.environ["NANOCHAT_BASE_DIR"] = base_dir
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [script, *flags]
    try:
        code = run_command(scripts[script].main)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:
    what, *rest = json.loads(line)
    if what == "start":
        answer = os.fork() or live(*rest)
    else:
        pid, status = os.waitpid(rest[0], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    print(json.dumps(answer), flush=True)
"""


class Nursery:
    """A process from which lives of the training scripts are forked, each with one thread."""

    def __init__(self, directory: Path) -> None:
        command, pipe = [sys.executable, "-c", NURSERY], subprocess.PIPE
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        self._directory, self._born = directory, 0

    def ask(self, *request: Any) -> Any:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, base_dir: Path, flags: list[str], script: str = "base_train") -> Life:
        self._born += 1
        log = self._directory / f"{self._born}.log"
        log.touch()
        return Life(self, self.ask("start", str(base_dir), str(log), script, flags), log)

    def run(self, base_dir: Path, flags: list[str], script: str = "base_train", code: int = 0) -> str:
        """A whole life; returns what it said."""
        life = self.start(base_dir, flags, script)
        assert life.wait() == code, life.said()
        return life.said()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


class Life:
    """One run of a command."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self._nursery, self._pid, self._log = nursery, pid, log
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, minus the signal's number for one that was killed; None while it lives."""
        if self._code is None:
            self._code = self._nursery.ask("poll", self._pid)
        return self._code

    def wait(self, until: Callable[[], bool] = lambda: False, timeout_s: float = 60.0, pause_s: float = 0.004) -> int | None:
        """Until it has ended or something else is so; returns the exit code, or None while it lives."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and not until():
            assert time.monotonic() < deadline, self.said()
            time.sleep(pause_s)
        return self._code

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:  # it is not waited for before the next poll: the number is still its own
            os.kill(self._pid, number)

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    if not hasattr(os, "fork"):
        pytest.skip("lives are forked, which this system cannot")
    nursery = Nursery(tmp_path_factory.mktemp("lives"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def base_flags(corpus: Path) -> list[str]:
    return [*BASE_FLAGS, f"--data={corpus}"]


@pytest.fixture(scope="module")
def whole(nursery: Nursery, base_flags: list[str], tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage of a base training that nothing disturbed, with all its checkpoints. Not to be changed."""
    directory = tmp_path_factory.mktemp("whole")
    tokenizer.save(directory / "tokenizers" / "default")
    nursery.run(directory, [*base_flags, "--keep-last=-1"])
    return directory / "runs" / "tiny" / "base"


@pytest.fixture(scope="module")
def whole_long(nursery: Nursery, base_flags: list[str], tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of LONG steps, for what must come about while a command runs; the usual checkpoints are kept."""
    directory = tmp_path_factory.mktemp("long")
    tokenizer.save(directory / "tokenizers" / "default")
    nursery.run(directory, [*base_flags, f"--num-iterations={LONG}"])
    return directory / "runs" / "tiny" / "base"


@pytest.fixture(autouse=True)
def _tokenizer_in_place(tokenizer, base_dir: Path) -> None:
    tokenizer.save(base_dir / "tokenizers" / "default")


def _stage_dir(base_dir: Path, stage: str = "base") -> Path:
    return base_dir / "runs" / "tiny" / stage


def _content(stage_dir: Path, step: int) -> tuple[Any, ...]:
    """All of a checkpoint that decides how the run goes on."""
    directory = step_dir(stage_dir, step)
    trainer = json.loads((directory / "meta.json").read_text(encoding="utf-8"))["trainer"]
    return *((directory / name).read_bytes() for name in FILES[:2]), {**trainer, "time_s": None}


def _logged(stage_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value); a value that was measured again after a resume is there once if it is the same."""
    return list(dict.fromkeys((row["step"], row[name]) for row in read_metrics(stage_dir / "metrics.jsonl") if name in row))


def _assert_ended_alike(stage_dir: Path, whole: Path) -> None:
    last = list_steps(whole)[-1]
    assert list_steps(stage_dir)[-1] == last
    assert _content(stage_dir, last) == _content(whole, last)
    assert [step for step, _ in _logged(whole, "train/loss")] == list(range(1, last + 1))
    for name in ("train/loss", "val/bpb", "val/pass@1"):
        assert _logged(stage_dir, name) == _logged(whole, name)
    assert not [*stage_dir.glob(".step_*")]
    best = json.loads((stage_dir / "best.json").read_text(encoding="utf-8"))
    assert best == json.loads((whole / "best.json").read_text(encoding="utf-8"))
    assert best["step"] in list_steps(stage_dir)


def _rows(stage_dir: Path) -> int:
    path = stage_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _start_command(base_dir: Path, flags: list[str]) -> subprocess.Popen[str]:
    """The real thing: python -m scripts.base_train."""
    command, pipe = [sys.executable, "-m", "scripts.base_train", *flags], subprocess.PIPE
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


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
            load_checkpoint(self.stage_dir, step, load_optimizer=True)
            assert _content(self.stage_dir, step) == _content(self.whole, step)
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
        time.sleep(rng.uniform(0, 0.02))
    life.send(signal.SIGKILL)


def _survive(nursery: Nursery, base_dir: Path, script: str, flags: list[str], whole: Path, kills: int, seed: int) -> None:
    """Runs that are killed until they end, as many as it takes."""
    rng, stage_dir = random.Random(seed), _stage_dir(base_dir, whole.name)
    killed = runs = torn = 0
    started = time.monotonic()
    nursery.run(base_dir, flags, script)
    life_s = time.monotonic() - started
    assert "is complete" in nursery.run(base_dir, flags, script)
    while killed < kills:
        shutil.rmtree(stage_dir)
        stage_dir.mkdir()
        witness, code = Witness(stage_dir, whole), None
        while code != 0:
            life = nursery.start(base_dir, flags, script)
            if killed < kills:
                _kill_at_random(life, stage_dir, rng, life_s)
            code = life.wait()
            assert code in (0, -signal.SIGKILL), life.said()
            if code:
                killed += 1
                witness.look()
        runs, torn = runs + 1, torn + witness.torn
        _assert_ended_alike(stage_dir, whole)
    print(f"{script}: {killed} kills in {runs} runs, {torn} while writing, {time.monotonic() - started:.0f} s")
    assert kills < 20 or torn >= kills // 10


@pytest.mark.slow
def test_a_base_training_survives_kills(nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path) -> None:
    """Killed at any moment, again and again, it ends with the bits, the losses and the best checkpoint of a whole run; at
    no moment is a checkpoint listed that is not whole, or an older one the newest.
    """
    _survive(nursery, base_dir, "base_train", base_flags, whole, KILLS, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "stage", "flags"), [("chat_sft", "sft", SFT_FLAGS), ("chat_rl", "rl", RL_RUN)])
def test_fine_tuning_and_rl_survive_kills(
    nursery: Nursery, tiny_run: Path, base_dir: Path, tmp_path: Path, script: str, stage: str, flags: list[str]
) -> None:
    """The same for conversations and for rewards."""
    shutil.rmtree(tiny_run / stage, ignore_errors=True)
    shutil.copytree(base_dir, tmp_path / "whole")
    nursery.run(tmp_path / "whole", [*flags, "--keep-last=-1"], script)
    _survive(nursery, base_dir, script, flags, _stage_dir(tmp_path / "whole", stage), max(4, KILLS // 5), seed=2)


def test_nothing_is_left_of_a_checkpoint_whose_removal_was_killed(
    nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path
) -> None:
    """It loses its name first; the rest goes with the next life."""
    stage_dir = _interrupted_copy(whole, base_dir)
    step_dir(stage_dir, 2).rename(stage_dir / ".step_000002.tmp")
    nursery.run(base_dir, base_flags)
    assert not list(stage_dir.glob("*step_000002*"))


# ----------------------------------------------------------------------------- torn writes


def _interrupted_copy(whole: Path, base_dir: Path, newest: int = 8) -> Path:
    """The stage as it was when `newest` had been saved."""
    stage_dir = _stage_dir(base_dir)
    shutil.copytree(whole, stage_dir, dirs_exist_ok=True)
    for step in range(newest + 2, LAST + 1, 2):
        shutil.rmtree(step_dir(stage_dir, step))
    lines = (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    known = [line for line in lines if json.loads(line)["step"] <= newest]
    (stage_dir / "metrics.jsonl").write_text("".join(known), encoding="utf-8")
    shutil.copy(whole.parent / "tokenizer.json", stage_dir.parent)
    return stage_dir


def _damages(content: bytes, rng: random.Random) -> dict[str, bytes | None]:
    """What may be found in the place of a file; None: nothing."""
    place = rng.randrange(len(content))
    return {
        "empty": b"", "one byte": content[:1], "half": content[: len(content) // 2], "all but one byte": content[:-1],
        f"flipped at {place}": _flip(content, place, rng), "removed": None,
    }  # fmt: skip


def _flip(content: bytes, place: int, rng: random.Random) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoints_are_passed_over_and_replaced(
    nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path, name: str
) -> None:
    """Whatever happened to a file of the newest steps, the run goes on from the one before, says so, and ends alike."""
    damages = list(_damages((step_dir(whole, 8) / name).read_bytes(), random.Random(name)).items())
    for chosen in (damages[:3], damages[3:]):
        stage_dir = _interrupted_copy(whole, base_dir)
        listed = []
        for step, (_, damaged) in zip((4, 6, 8), chosen, strict=True):
            path = step_dir(stage_dir, step) / name
            path.write_bytes(damaged) if damaged is not None else path.unlink()
            if name != "manifest.json" or damaged is not None:  # without a manifest it is no checkpoint
                listed.append(str(step_dir(stage_dir, step)))
        said = nursery.run(base_dir, [*base_flags, "--keep-last=-1"])
        assert "going on from step 2 " in said, chosen
        assert re.findall(r"^passed over: (.*/step_\d+)", said, re.MULTILINE) == listed[::-1], chosen
        assert list_steps(stage_dir) == list_steps(whole)
        assert all(_content(stage_dir, step) == _content(whole, step) for step in list_steps(whole))
        assert newest_valid_step(stage_dir) == (LAST, [])
        _assert_ended_alike(stage_dir, whole)
        shutil.rmtree(stage_dir)


def test_when_all_are_damaged_it_starts_anew(nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path) -> None:
    """Every damaged step is named, and the run ends alike."""
    stage_dir = _interrupted_copy(whole, base_dir)
    for step in list_steps(stage_dir):
        path = step_dir(stage_dir, step) / "optim.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    assert nursery.run(base_dir, base_flags).count("passed over: ") == 4
    _assert_ended_alike(stage_dir, whole)


def test_a_flip_anywhere_is_found(whole: Path, base_dir: Path) -> None:
    """Of tensors and meta every bit counts."""
    stage_dir, rng = _interrupted_copy(whole, base_dir), random.Random(3)
    for name in FILES[:3]:
        path = step_dir(stage_dir, 8) / name
        content = path.read_bytes()
        for place in (0, 8, len(content) - 1, *(rng.randrange(len(content)) for _ in range(100))):
            path.write_bytes(_flip(content, place, rng))
            assert newest_valid_step(stage_dir)[0] == 6, (name, place)
        path.write_bytes(content)
        assert newest_valid_step(stage_dir) == (8, [])


def _flips(content: bytes, rng: random.Random) -> Iterator[bytes]:
    """Each byte changed in two ways; an "e" makes other numbers of digits."""
    for place, old in enumerate(content):
        for new in {old ^ 1 << rng.randrange(8), rng.choice((ord("e"), rng.randrange(256)))} - {old}:
            yield content[:place] + bytes([new]) + content[place + 1 :]


def test_a_flip_in_the_manifest_is_found_or_harmless(base_dir: Path) -> None:
    """Either the step is passed over, or it is read as it was written."""
    stage_dir = _stage_dir(base_dir)
    for step in (1, 2):
        save_checkpoint(stage_dir, step, STATE, STATE, {"note": step})
    path = step_dir(stage_dir, 2) / "manifest.json"
    found = 0
    for content in _flips(path.read_bytes(), random.Random(4)):
        path.write_bytes(content)
        step, skipped = newest_valid_step(stage_dir)
        assert (step, len(skipped)) in ((1, 1), (2, 0)), content
        found += step == 1
        if step == 2:
            model, optimizer, meta = load_checkpoint(stage_dir, 2, load_optimizer=True)
            assert torch.equal(model["a"], STATE["a"]) and torch.equal(optimizer["a"], STATE["a"]) and meta["note"] == 2
    assert found > 500


def test_a_damaged_manifest_never_makes_its_run_the_newest(base_dir: Path) -> None:
    """Nor does it keep the newest one from being found."""
    save_checkpoint(_stage_dir(base_dir), 1, STATE, None, {})
    save_checkpoint(base_dir / "runs" / "newer" / "base", 1, STATE, None, {})
    path = step_dir(_stage_dir(base_dir), 1) / "manifest.json"
    for content in _flips(path.read_bytes(), random.Random(5)):
        path.write_bytes(content)
        assert find_run("base") == "newer", content


def test_training_goes_on_beside_a_manifest_without_its_date(
    nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path
) -> None:
    """What is damaged in one step, or in another run, never stops a save."""
    stage_dir = _interrupted_copy(whole, base_dir)
    path = step_dir(stage_dir, 8) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"created"', b'"creaked"'))
    nursery.run(base_dir, base_flags)
    _assert_ended_alike(stage_dir, whole)


def test_strays_and_leftovers_are_harmless(nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path) -> None:
    """Files that do not belong there change nothing; what a kill left is removed, and what it had set aside put back. A row
    that was cut short spoils none after it.
    """
    stage_dir = _interrupted_copy(whole, base_dir)
    with open(stage_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"timestamp": 1, "step": 9, "tra')
    (step_dir(stage_dir, 8) / "stray").write_text("x")
    (stage_dir / "step_000099").mkdir()
    (stage_dir / "step_x").mkdir()
    half = stage_dir / ".step_000006.tmp"
    half.mkdir()
    shutil.copy(step_dir(stage_dir, 6) / "model.safetensors", half)
    shutil.copytree(step_dir(stage_dir, 6), stage_dir / ".step_000006.old")  # replaced already, and not yet removed
    (stage_dir / ".step_000006.old" / "manifest.json").unlink()
    os.rename(step_dir(stage_dir, 8), stage_dir / ".step_000008.old")  # set aside, and not yet replaced
    said = nursery.run(base_dir, base_flags)
    assert "going on from step 8" in said and "passed over" not in said
    _assert_ended_alike(stage_dir, whole)


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


def _train_here(flags: list[str], at_step: dict[int, Callable[[], object]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train in this process; what belongs to a step happens when it is evaluated, which is after each."""
    measure, calls = base_train.evaluate_bpb, iter(range(1, 1000))

    def evaluate(*arguments: Any) -> float:
        at_step.get(next(calls), lambda: None)()
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(base_train, "evaluate_bpb", evaluate)
        assert base_train.main([*flags, "--eval-every=1"]) == 0
    return _stage_dir(Path(os.environ["NANOCHAT_BASE_DIR"]))


def test_training_goes_on_while_the_disk_is_full(
    small_disk: Path, base_flags: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """With a warning and without a row lost; what was saved before stays, nothing half-written does, the end is the same."""
    flags = [*base_flags, "--num-iterations=40"]
    undisturbed = _train_here(flags, {}, monkeypatch)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(small_disk))
    stage_dir = _stage_dir(small_disk)

    def look() -> None:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        assert newest_valid_step(stage_dir) == (2, [])
        assert not [*stage_dir.glob(".step_*")]
        assert _rows(stage_dir) < 60  # of 72: there was no room for more

    def free() -> None:
        look()
        (small_disk / "filler").unlink()

    _train_here(flags, {3: lambda: _fill(small_disk), 10: look, 37: free}, monkeypatch)
    output, errors = capfd.readouterr()
    assert "warning: a checkpoint could not be written; training goes on. the disk is full" in output
    assert errors.count("metrics cannot be written now") >= 1
    _assert_ended_alike(stage_dir, undisturbed)
    rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [step for step in range(1, 41) for _ in ("trained", "evaluated")]


@pytest.mark.slow
def test_the_last_save_must_succeed(nursery: Nursery, small_disk: Path, base_flags: list[str], whole_long: Path) -> None:
    """A disk that fills up and stays full: one sentence, exit code 1, and with some space the same command goes on."""
    flags, stage_dir = [*base_flags, f"--num-iterations={LONG}"], _stage_dir(small_disk)
    process = _start_command(small_disk, flags)
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
    assert f"going on from step {newest}" in nursery.run(small_disk, flags)
    _assert_ended_alike(stage_dir, whole_long)


@pytest.mark.parametrize("leave", [0, 8192, 2**19])
def test_a_disk_that_is_full_from_the_start(
    nursery: Nursery, small_disk: Path, base_flags: list[str], whole: Path, leave: int
) -> None:
    """However little is left, it is one sentence, and the same command goes on once there is space."""
    filler = _fill(small_disk, leave)
    said = nursery.run(small_disk, base_flags, code=1)
    assert len(re.findall(r"^error: the disk is full", said, re.MULTILINE)) == 1 and "Traceback" not in said
    assert not [*_stage_dir(small_disk).glob("*step_*")]
    filler.unlink()
    nursery.run(small_disk, base_flags)
    _assert_ended_alike(_stage_dir(small_disk), whole)


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
        _train_here(base_flags, {7: lambda: os.kill(os.getpid(), signal.SIGTERM)}, monkeypatch)
    assert refused and list_steps(_stage_dir(base_dir))[-1] == 8
    _train_here(base_flags, {}, monkeypatch)
    assert [step for step, _ in _logged(_stage_dir(base_dir), "train/loss")] == list(range(1, LAST + 1))


def test_the_best_checkpoint_is_one_that_there_is(base_flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that was measured best but could not be written does not take the place of the best that was."""
    save_tensors, values = checkpoint_manager._save_tensors, iter((3.0, 1.0, 2.0, 2.5, 2.6, 2.7))

    def fail_once(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step_000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_tensors(tensors, path)

    monkeypatch.setattr(checkpoint_manager, "_save_tensors", fail_once)
    monkeypatch.setattr(base_train, "evaluate_bpb", lambda *arguments: next(values))
    assert base_train.main([*base_flags, "--eval-every=2"]) == 0
    stage_dir = _stage_dir(Path(os.environ["NANOCHAT_BASE_DIR"]))
    assert list_steps(stage_dir) == [6, 10, 12]
    assert json.loads((stage_dir / "best.json").read_text())["step"] == 6


# ----------------------------------------------------------------------------- signals


def _stop(life: Life, stage_dir: Path, rng: random.Random, numbers: list[signal.Signals], longest_s: float) -> None:
    """Signals, one at once after the other, some time after the first update of this life."""
    before = _rows(stage_dir)
    life.wait(lambda: _rows(stage_dir) > before + 1)
    time.sleep(rng.uniform(0, longest_s))
    for number in numbers:
        life.send(number)


@pytest.mark.slow
def test_signals_at_random_moments(nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path) -> None:
    """SIGTERM or SIGINT, or both as torchrun and a terminal send them: saved at once, exit 130, and the end is the same."""
    rng, stage_dir, stopped = random.Random(8), _stage_dir(base_dir), 0
    while stopped < 5:
        shutil.rmtree(stage_dir, ignore_errors=True)
        code = None
        while code != 0:
            life = nursery.start(base_dir, base_flags)
            numbers = rng.choices([signal.SIGTERM, signal.SIGINT], k=rng.randrange(1, 3))
            _stop(life, stage_dir, rng, numbers, 0.2)
            code = life.wait()
            assert code in (0, 130), life.said()
            if code == 130:
                stopped += 1
                step = int(re.search(r"stopped after step (\d+); saved", life.said())[1])
                assert newest_valid_step(stage_dir) == (step, [])
                assert _content(stage_dir, step)[:2] == _content(whole, step)[:2] if step % 2 == 0 else step < LAST
        assert _content(stage_dir, LAST)[:2] == _content(whole, LAST)[:2]
        assert _logged(stage_dir, "train/loss") == _logged(whole, "train/loss")


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_a_stopped_command_goes_on(
    nursery: Nursery, base_flags: list[str], whole_long: Path, base_dir: Path, numbers: list[signal.Signals]
) -> None:
    """The same of a real command, by a process as a user would start it."""
    flags, stage_dir = [*base_flags, f"--num-iterations={LONG}"], _stage_dir(base_dir)
    process = _start_command(base_dir, flags)
    while process.poll() is None and not _rows(stage_dir):
        time.sleep(0.001)
    time.sleep(random.Random(str(numbers)).uniform(0, 0.5))
    for number in numbers:
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    step = int(re.search(r"stopped after step (\d+); saved", output)[1])
    assert newest_valid_step(stage_dir) == (step, [])
    nursery.run(base_dir, flags)
    assert _content(stage_dir, LONG)[:2] == _content(whole_long, LONG)[:2]
    assert _logged(stage_dir, "train/loss") == _logged(whole_long, "train/loss")


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
    flags, stage_dir = [*base_flags, "--num-iterations=100000"], _stage_dir(base_dir)
    if resume == "none":
        flags += ["--save-every=-1"]  # with checkpoints there another sentence would come first
    first = nursery.start(base_dir, flags)
    try:
        assert first.wait(lambda: _rows(stage_dir) > 5) is None, first.said()
        paths = [stage_dir / "settings.json", stage_dir.parent / "tokenizer.json"]
        before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]
        rows = (stage_dir / "metrics.jsonl").read_bytes()
        said = nursery.run(base_dir, [*flags, f"--resume={resume}", "--matrix-lr=0.5"], code=1)
        assert len(re.findall(RIVAL, said, re.MULTILINE)) == 1 and "Traceback" not in said
        assert before == [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]
        now = _rows(stage_dir)
        assert (stage_dir / "metrics.jsonl").read_bytes().startswith(rows)
        assert first.wait(lambda: _rows(stage_dir) > now) is None, first.said()
    finally:
        first.send(signal.SIGTERM)
        assert first.wait() == 130, first.said()


def test_rivals_that_start_together(nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path) -> None:
    """One of them trains and ends as it would have alone."""
    for _ in range(2):
        lives = [nursery.start(base_dir, base_flags) for _ in range(3)]
        codes = sorted(life.wait() for life in lives)
        assert codes[0] == 0 and set(codes) <= {0, 1}, [life.said() for life in lives]
        assert all(life.poll() == 0 or re.search(RIVAL, life.said(), re.MULTILINE) for life in lives)
        _assert_ended_alike(_stage_dir(base_dir), whole)
        assert _rows(_stage_dir(base_dir)) == LAST + LAST // 3
        shutil.rmtree(_stage_dir(base_dir))


def test_a_stage_is_taken_before_training_begins(
    nursery: Nursery, base_flags: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes while the first one still builds its model and its data is turned away as well."""
    said = []

    def meet_a_rival(*arguments: Any) -> MetricsLog:
        log = MetricsLog(*arguments)
        rival = nursery.start(base_dir, [*base_flags, "--matrix-lr=0.5"])
        rival.wait()
        said.append(rival.said())
        return log

    monkeypatch.setattr(base_train, "MetricsLog", meet_a_rival)
    assert base_train.main(base_flags) == 0
    assert re.search(RIVAL, said[0], re.MULTILINE)
    settings = json.loads((_stage_dir(base_dir) / "settings.json").read_text(encoding="utf-8"))
    assert settings["matrix_lr"] == 0.02 and len(_logged(_stage_dir(base_dir), "train/loss")) == LAST


# ----------------------------------------------------------------------------- data that goes away


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Many small shards, read just before they are needed."""
    for name in ("BATCHES_AHEAD", "CHUNKS_AHEAD", "LANE_DOCUMENTS"):
        monkeypatch.setattr(dataloader, name, 1)
    monkeypatch.setattr(dataloader, "CHUNK_DOCUMENTS", 2)
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(40):
        texts = [make_document(100 * shard + i, 5) for i in range(4)]
        pq.write_table(pa.table({"text": texts}), folder / f"{'val' if shard == 39 else 'train'}_{shard:02d}.parquet")
    return folder


def _delete(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.slow
def test_data_that_fails_in_mid_run(
    shards: Path, base_flags: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence names the file, all that was learned is saved, and once the file is back the end is the same."""
    flags, stage_dir = [*base_flags, f"--data={shards}", "--save-every=5", "--device-batch-size=1"], _stage_dir(base_dir)
    undisturbed = load_checkpoint(_train_here(flags, {}, monkeypatch), LAST)[0]
    losses = _logged(stage_dir, "train/loss")
    victim = shards / "train_23.parquet"  # its rows come to an update that has read some of its micro-batches
    content = victim.read_bytes()
    for damage in (_delete, _truncate, _zero):
        shutil.rmtree(stage_dir)
        with pytest.raises(NanochatError, match=re.escape(str(victim))) as error:
            _train_here(flags, {3: lambda damage=damage: damage(victim)}, monkeypatch)
        assert "\n" not in str(error.value)
        trained = _logged(stage_dir, "train/loss")[-1][0]
        assert 3 < trained < LAST and newest_valid_step(stage_dir) == (trained, [])
        with pytest.raises(NanochatError):  # as long as it is damaged
            _train_here(flags, {}, monkeypatch)
        assert newest_valid_step(stage_dir) == (trained, [])
        victim.write_bytes(content)
        _train_here(flags, {}, monkeypatch)
        assert _logged(stage_dir, "train/loss") == losses
        for name, tensor in load_checkpoint(stage_dir, LAST)[0].items():
            assert torch.equal(tensor, undisturbed[name]), name


def test_validation_data_that_fails_costs_no_training(
    shards: Path, base_flags: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at a step at which no checkpoint was due."""
    flags = [*base_flags, f"--data={shards}", "--save-every=-1"]
    with pytest.raises(NanochatError, match="val_39"):
        _train_here(flags, {5: lambda: _delete(shards / "val_39.parquet")}, monkeypatch)
    assert newest_valid_step(_stage_dir(base_dir)) == (5, [])

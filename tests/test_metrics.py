"""Numbers on their way out of a run: metrics.jsonl, and the loggers that may break without harm."""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from nanochat import loggers, metrics
from nanochat.common import NanochatError
from nanochat.loggers import LOGGERS, LoggedRun, Logger, check_installed
from nanochat.metrics import MetricsLog, read_metrics, series, smooth, thinned
from nanochat.quantities import quantity
from nanochat.stage import Stage, open_metrics
from scripts.base_train import parse_arguments

SETTINGS = {"tag": "d2", "stage": "base", "depth": 2}


@pytest.fixture
def stage_dir(base_dir: Path) -> Path:
    return base_dir / "runs" / "d2" / "base"


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def trackio_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the runs that the test logs; trackio decides where it is when it is first imported."""
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    for module in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path / "trackio" / "nanochat.db"


def _row(step: int, loss: float | None = None) -> dict[str, float]:
    return {"step": step, "time_s": float(step), "train/loss": 1 / step if loss is None else loss}


def _train_and_resume(stage_dir: Path, logger: str) -> None:
    """Six steps, of which those after the fourth are lost with their process and done again."""
    log = MetricsLog(stage_dir, SETTINGS, "dummy", [logger], rank=0)
    for step in range(1, 7):
        log.log(_row(step))
    log.log({"step": 4, "time_s": 4.0, "sample/prompt": "a", "sample/text": "b"})
    log.close()
    log = MetricsLog(stage_dir, SETTINGS, "dummy", [logger], rank=0, resume_step=4)
    for step in range(5, 9):
        log.log(_row(step))
    log.log({"step": 8, "time_s": 8.0, "val/bpb": 0.5})
    log.close()


# ----------------------------------------------------------------------------- metrics.jsonl


def test_metrics_survive_a_torn_line_and_numbers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra', encoding="utf-8")
    log = MetricsLog(tmp_path, {}, "dummy", [], rank=0)
    log.log({"step": 2, "time_s": 1.0, "train/loss": math.nan})
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert read_metrics(path)[-1]["train/loss"] is None


@pytest.mark.parametrize(("there", "lines"), [(b"", 1), (b"\n", 2), (b"{", 2), (b"{}\n", 2), (b"{}\n{", 3)])
def test_a_row_has_a_line_of_its_own_whatever_stands_before_it(tmp_path: Path, there: bytes, lines: int) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(there)
    log = MetricsLog(tmp_path, {})
    log.log(_row(1))
    log.close()
    found = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(found) == lines and json.loads(found[-1])["step"] == 1


@pytest.mark.parametrize("ends", [False, True])
def test_what_a_full_disk_refused_is_written_later(tmp_path: Path, ends: bool, capfd: pytest.CaptureFixture) -> None:
    """With the next row, or at the end; and it is told at once, and once."""

    class Disk:
        full = True

        def write(self, content: bytes) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return file.write(content[:10])  # as systems may do

        def close(self) -> None:
            file.close()

    log = MetricsLog(tmp_path, {})
    file, log._file = log._file, Disk()
    for step, told in ((1, 1), (2, 0)):
        log.log(_row(step))
        assert capfd.readouterr().err.count("metrics cannot be written now (No space left on device)") == told
    Disk.full = False
    if not ends:
        log.log(_row(3))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == ([] if ends else [1, 2, 3])
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == ([1, 2] if ends else [1, 2, 3])


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 100, 101, 109])
def test_points_are_left_out_evenly_but_for_the_last(count: int) -> None:
    kept = thinned(count, 10)
    assert kept == sorted(set(kept)) and len(kept) <= 11
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert len({*gaps[:-1]}) <= 1 and (not gaps or gaps[-1] <= gaps[0] <= -(-count // 10))


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "train/loss": 2.0}', "7", "[]", "{}", '{"step": null}', '{"step": "2"}', '{"step": 2.5}']
    path.write_bytes("\n".join([*lines, "[" * 100_000, "9" * 5000]).encode() + b"\n\xff\xfe\n")
    assert read_metrics(path) == [{"step": 1, "train/loss": 2.0}]


def test_only_rank_0_writes_metrics(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "stage", {}, "dummy", ["no such logger"], rank=1)
    log.log({"step": 1, "time_s": 0.0})
    log.close()
    assert not (tmp_path / "stage").exists()


def test_a_series_is_of_numbers_alone() -> None:
    values: list = [1, 2.5, math.nan, "3", None, math.inf, 10**400, True]
    rows = [{"step": step, "x": value} for step, value in enumerate(values)] + [{"step": 9, "y": 1}]
    assert series(rows, "x") == ([0, 1, 6, 7], [1, 2.5, 10**400, True])


def test_megabytes_are_rounded_once() -> None:
    """695 times 1e-3 is a little more than 0.695."""
    show = quantity("train/peak_memory_mb").show
    assert [show(mb) for mb in range(2000)] == [f"{mb / 1000:.2f} GB" for mb in range(2000)]


def test_a_smoothed_picture_neither_lags_nor_leads() -> None:
    values = [math.sin(i) + i / 10 for i in range(200)]
    smoothed = smooth(values)
    assert smooth(values[::-1]) == pytest.approx(smoothed[::-1])
    assert smooth([]) == []
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smoothed[100] == pytest.approx(10.0, abs=0.2)  # on the line that the values sway about


# ----------------------------------------------------------------------------- which loggers


class _Memory:
    """A logger that keeps what it is given."""

    made: list[_Memory]
    package = "json"

    def __init__(self, run: LoggedRun) -> None:
        self.run, self.rows, self.closed = run, [], False
        self.made.append(self)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.rows.append((step, dict(numbers)))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_Memory]]:
    """Takes the place of every logger, installed or not."""
    monkeypatch.setattr(_Memory, "made", [], raising=False)
    for name in LOGGERS:
        monkeypatch.setitem(LOGGERS, name, _Memory)
    yield _Memory.made


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], []),
        (["--run=dummy"], []),
        (["--run=x"], ["x"]),
        (["--log-to=tensorboard"], ["d2-base"]),
        (["--run=x", "--log-to", "trackio", "tensorboard", "--log-to", "trackio", "wandb"], ["x", "x", "x"]),
    ],
)
def test_flags_choose_the_loggers(flags: list[str], names: list[str], stage_dir: Path, memory: list[_Memory]) -> None:
    args = parse_arguments(flags)
    log = open_metrics(Stage("d2", "base", stage_dir, 7, [7]), SETTINGS, args)
    log.log({**_row(8), "val/bpb": math.inf, "note": "text"})
    log.close()
    assert [logger.run.name for logger in memory] == names
    for logger in memory:
        assert logger.run.resume_step == 7
        assert logger.rows == [(8, {"time_s": 8.0, "train/loss": 0.125})]  # what can be drawn, and nothing else
        assert logger.closed


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGERS, "file", type("Needy", (_Memory,), {"package": "no_such_package"}))
    with pytest.raises(NanochatError, match="pip install no_such_package, or leave out file"):
        check_installed("file")


def test_a_logger_may_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGERS, "file", type("Plain", (Logger,), {}))
    check_installed("file")


def test_a_folder_of_a_loggers_name_is_no_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb makes one where it runs."""
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    test_a_logger_that_is_not_installed_is_named(monkeypatch)


# ----------------------------------------------------------------------------- loggers that break


@pytest.mark.parametrize("breaks_at", ["opening", "logging", "closing", "never ends"])
def test_a_logger_that_breaks_harms_nothing(
    breaks_at: str, stage_dir: Path, memory: list[_Memory], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """One warning with the way out; metrics.jsonl has every row, and the training waits for none of it."""
    hung = threading.Event()

    class Broken(_Memory):
        def __init__(self, run: LoggedRun) -> None:
            if breaks_at == "opening":
                raise ConnectionError("no network")
            super().__init__(run)

        def log(self, step: int, numbers: Mapping[str, float]) -> None:
            super().log(step, numbers)
            if breaks_at == "logging" and step == 3:
                raise OSError(28, "No space left on device")
            if breaks_at == "never ends":
                hung.wait()

        def close(self) -> None:
            if breaks_at == "closing":
                raise TimeoutError("service down")

    monkeypatch.setitem(LOGGERS, "wandb", Broken)
    monkeypatch.setattr(loggers, "CLOSE_S", 0.2)
    monkeypatch.setattr(loggers, "MAX_WAITING", 50)
    log = MetricsLog(stage_dir, SETTINGS, "dummy", ["wandb", "trackio"], rank=0)
    began = time.perf_counter()
    for step in range(1, 40):
        log.log(_row(step))
    logged_in_s = time.perf_counter() - began
    log.close()
    hung.set()
    assert logged_in_s < 10
    assert len(read_metrics(stage_dir / "metrics.jsonl")) == 39
    sound = next(logger for logger in memory if type(logger) is _Memory)
    assert len(sound.rows) == 39 and sound.closed
    errors = capfd.readouterr().err
    assert errors.count("warning") == 1
    assert "python -m nanochat.metrics d2 --to wandb" in errors


def test_a_logger_that_falls_behind_is_left(
    stage_dir: Path, memory: list[_Memory], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    hung = threading.Event()
    monkeypatch.setattr(_Memory, "log", lambda *row: hung.wait())
    monkeypatch.setattr(loggers, "MAX_WAITING", 5)
    log = MetricsLog(stage_dir, SETTINGS, "dummy", ["trackio"], rank=0)
    for step in range(1, 40):
        log.log(_row(step))
    log.close()
    hung.set()
    assert "5 rows behind" in capfd.readouterr().err


# ----------------------------------------------------------------------------- the real ones


def _read_tensorboard(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def _expect_whole(points: list[tuple[int, float]]) -> None:
    assert [step for step, _ in points] == list(range(1, 9))
    assert [value for _, value in points] == pytest.approx([1 / step for step in range(1, 9)])


@pytest.mark.slow
def test_tensorboard_shows_a_resumed_run_as_one(tensorboard: None, stage_dir: Path) -> None:
    log = MetricsLog(stage_dir, SETTINGS, "dummy", ["tensorboard"], rank=0)
    log.log(_row(50))  # of a start that never reached a checkpoint
    log.close()
    _train_and_resume(stage_dir, "tensorboard")
    _expect_whole(_read_tensorboard(stage_dir / "tensorboard", "train/loss"))
    assert _read_tensorboard(stage_dir / "tensorboard", "val/bpb") == [(8, 0.5)]


@pytest.mark.slow
def test_trackio_shows_a_resumed_run_as_one(trackio_database: Path, stage_dir: Path) -> None:
    _train_and_resume(stage_dir, "trackio")
    with sqlite3.connect(trackio_database) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, _, _ in rows} == {"d2-base"}
    logged = [(step, json.loads(text)) for _, step, text in rows]
    points = {(step, numbers["train/loss"]) for step, numbers in logged if "train/loss" in numbers}
    _expect_whole(sorted(points))
    assert [numbers["val/bpb"] for _, numbers in logged if "val/bpb" in numbers] == [0.5]


@pytest.mark.slow
def test_wandb_goes_on_with_the_run_it_began(wandb: None, stage_dir: Path) -> None:
    _train_and_resume(stage_dir, "wandb")
    sittings = sorted((stage_dir / "wandb").glob("offline-run-*"))
    ids = {folder.name.split("-")[3] for folder in sittings}  # by which `wandb sync` joins them
    assert ids == {(stage_dir / "wandb_run_id").read_text(encoding="utf-8")}
    for folder in sittings:
        written = next(folder.glob("*.wandb")).read_bytes()
        assert b"train/loss" in written


@pytest.mark.slow
def test_a_finished_run_is_replayed(tensorboard: None, tiny_run: Path) -> None:
    for _ in range(2):  # the second time in the place of the first
        assert metrics.main(["tiny", "--to=tensorboard"]) == 0
    rows = [row for row in read_metrics(tiny_run / "base" / "metrics.jsonl") if "train/loss" in row]
    points = _read_tensorboard(tiny_run / "base" / "tensorboard", "train/loss")
    assert points == [(row["step"], pytest.approx(row["train/loss"])) for row in rows]
    with pytest.raises(NanochatError, match="no run 'nothing'"):
        metrics.main(["nothing", "--to=tensorboard"])


def test_an_update_that_was_made_again_takes_its_evaluation_along(tmp_path: Path) -> None:
    rows = [{"step": 0, "val/bpb": 1}, {"step": 1, "train/loss": 1}, {"step": 1, "val/bpb": 1}, {"step": 1, "train/loss": 2}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_metrics(tmp_path / "m.jsonl") == [rows[0], rows[3]]

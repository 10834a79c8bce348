"""Where a run logs its numbers: always metrics.jsonl, and the loggers that were requested (loggers.py).

Used by trainer.py; read by report.py and others. Each line is a JSON object with "step", "time_s" (seconds of training) and
"timestamp" (of the row, seconds since 1970). A finished run can also be sent to a logger:
python -m nanochat.metrics RUN --to tensorboard
"""

from __future__ import annotations

import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochat.common import complain, run_command
from nanochat.files import read_json_lines, read_json_object
from nanochat.loggers import LOGGERS, BackgroundLogger, LoggedRun, check_installed
from nanochat.progress import format_seconds
from nanochat.quantities import in_order, quantity
from nanochat.runs import SETTINGS_FILE, begun_stages, find_run_dir
from nanochat.settings import SettingsParser

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends rows to `<stage_dir>/metrics.jsonl` on rank 0 and does nothing on the other ranks.

    run: the run's name in loggers; "dummy": its tag and stage. log_to: names of LOGGERS. resume_step: the step that the run
    resumes from, so that loggers continue there.
    """

    def __init__(
        self,
        stage_dir: Path,
        settings: dict[str, Any],
        run: str = "dummy",
        log_to: Iterable[str] = (),
        rank: int = 0,
        resume_step: int | None = None,
    ) -> None:
        self._file: io.FileIO | None = None
        self._loggers: list[BackgroundLogger] = []
        if rank != 0:
            return
        stage_dir.mkdir(parents=True, exist_ok=True)
        path = stage_dir / METRICS_FILE
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the life of the run
        # A crash may have cut the last line short: start a new line after it.
        self._unwritten = b"\n" if torn else b""
        logged_run = LoggedRun(stage_dir, _name(run, stage_dir), settings, resume_step)
        self._loggers = [BackgroundLogger(name, logged_run) for name in dict.fromkeys(log_to)]

    def log(self, row: dict[str, Any]) -> None:
        """Write one row to the system before returning; if the disk is full, try again with the next row."""
        if self._file is None:
            return
        row = {"timestamp": round(time.time(), 3), **row}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._write(json.dumps(finite) + "\n")
        if numbers := _numbers(finite):
            for logger in self._loggers:
                logger.log(row["step"], numbers)

    def _write(self, line: str) -> None:
        complained = bool(self._unwritten.strip())
        self._unwritten += line.encode("utf-8")
        try:
            while self._unwritten and self._file is not None:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not complained:
                complain(f"metrics cannot be written now ({error.strerror}); training goes on and keeps them for later")

    def close(self) -> None:
        if self._file is not None:
            if self._unwritten.strip():
                self._write("")
            self._file.close()
        for logger in self._loggers:
            logger.close()


def _name(run: str, stage_dir: Path) -> str:
    return f"{stage_dir.parent.name}-{stage_dir.name}" if run == "dummy" else run


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row, for loggers; none for a sample."""
    if "sample/text" in row:
        return {}
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "timestamp")}


def thinned(count: int, most: int) -> list[int]:
    """Indices of about `most` of `count` points, evenly spaced, including the last one."""
    stride = -(-count // most) or 1
    return sorted({*range(0, count, stride), count - 1} - {-1})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; rows that a resumed run wrote again replace the earlier ones.

    Invalid lines are skipped.
    """
    rows: dict[Any, dict[str, Any]] = {}  # in the order of their steps
    for row in read_json_lines(path):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            continue
        newest = row["step"] - ("train/loss" in row)  # within a step, the update comes first
        while rows and next(reversed(rows.values()))["step"] > newest:  # back in time: the run was resumed here
            rows.popitem()
        what = (row["step"], frozenset(row), row.get("sample/prompt"))  # a step may have many rows of samples
        rows.pop(what, None)  # a step is evaluated again when a run resumes from it
        rows[what] = row
    return list(rows.values())


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one logged number."""
    chosen = [row for row in rows if _is_finite(row.get(name))]
    return [row["step"] for row in chosen], [row[name] for row in chosen]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and -math.inf < value < math.inf


def drawn(rows: list[dict[str, Any]]) -> list[str]:
    """The names of all numbers in the rows that have curves, in the order in which these are shown."""
    names = {name for row in rows for name, value in row.items() if _is_finite(value)}
    return in_order(name for name in names if quantity(name).curve)


def curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float], list[float]]:
    """(steps, values in the unit of the number's title, the same values smoothed if they are noisy)."""
    shown, (steps, values) = quantity(name), series(rows, name)
    values = [value / shown.divisor for value in values]
    return steps, values, smooth(values) if shown.noisy else values


def smooth(values: list[float]) -> list[float]:
    """A weighted mean around each value, nearer ones counting more: it neither lags nor leads, except at the ends."""
    decay = min(0.95, 1 - 8 / (len(values) + 8))

    def sums(values: list[float]) -> list[tuple[float, float]]:
        total, weight, result = 0.0, 0.0, []
        for value in values:
            total, weight = decay * total + value, decay * weight + 1
            result.append((total, weight))
        return result

    both = zip(values, sums(values), sums(values[::-1])[::-1], strict=True)
    return [(before + after - value) / (w + v - 1) for value, (before, w), (after, v) in both]


# What tables tell of a stage, besides steps and time: a number of its rows, and which of the values.
SUMMARY: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "tokens": ("train/tokens", max),
    "FLOPs": ("train/flops", max),
    "reward, smoothed": ("rl/reward", lambda values: smooth(values)[-1]),
    "loss, smoothed": ("train/loss", lambda values: smooth(values)[-1]),
    "val bpb": ("val/bpb", lambda values: values[-1]),
    "best val bpb": ("val/bpb", min),
    "pass@1": ("val/pass@1", lambda values: values[-1]),
    "tokens/s, median": ("train/tok_per_s", statistics.median),
    "MFU, median": ("train/mfu", statistics.median),
    "most memory": ("train/peak_memory_mb", max),
}


def summarize(rows: list[dict[str, Any]]) -> dict[str, str]:
    """A stage in a few words: steps, time and what SUMMARY names, without what was not logged."""
    if not rows:
        return {}
    found = {
        label: quantity(name).show(choose(values))
        for label, (name, choose) in SUMMARY.items()
        if (values := series(rows, name)[1])
    }
    time_s = max(series(rows, "time_s")[1], default=0.0)
    return {"steps": f"{rows[-1]['step']:,}", "time": format_seconds(time_s), **found}


# ----------------------------------------------------------------------------- replaying


def replay(stage_dir: Path, to: str, run: str = "dummy") -> int:
    """Send what a stage has logged so far to a logger, as a separate run; returns the number of rows."""
    settings = read_json_object(stage_dir / SETTINGS_FILE)
    rows = [(row["step"], _numbers(row)) for row in read_metrics(stage_dir / METRICS_FILE)]
    logger = LOGGERS[to](LoggedRun(stage_dir, _name(run, stage_dir), settings))
    for step, numbers in rows:
        if numbers:
            logger.log(step, numbers)
    logger.close()
    return len(rows)


def main(argv: list[str] | None = None) -> int:
    parser = SettingsParser(
        "Send the metrics of a run that was trained without a logger to one.", examples=["%(prog)s d12 --to tensorboard"]
    )
    parser.add_argument("run_dir", metavar="RUN", help="model tag, or the directory of a run")
    parser.add_argument("--to", required=True, choices=LOGGERS, help="logger to send its numbers to")
    parser.add_argument("--run", default="dummy", metavar="NAME", help="what it is called there (default: its tag and stage)")
    args = parser.parse_args(argv)
    run_dir = find_run_dir(args.run_dir)
    check_installed(args.to)
    for stage_dir in (run_dir / stage for stage in begun_stages(run_dir)):
        print(f"{stage_dir}: {replay(stage_dir, args.to, args.run):,} rows sent to {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

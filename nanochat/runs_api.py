"""The data of the runs page, as JSON: the runs of the base directory, their curves, samples and evaluations.

Files are read again whenever they change, so a run can be followed while it trains. Used by server.py.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from nanochat.common import NanochatError
from nanochat.eval_results import EVAL_FILE, read_eval
from nanochat.files import read_json
from nanochat.metrics import METRICS_FILE, curve, drawn, read_metrics, thinned
from nanochat.openai_api import RequestError
from nanochat.quantities import quantity, title_of
from nanochat.runs import SETTINGS_FILE, STAGE_TITLES, STAGES, get_run_dir, get_runs_dir, is_tag, list_steps

MAX_POINTS = 600  # in a curve: more than a screen shows


def add_run_routes(app: FastAPI) -> None:
    @app.get("/api/runs")
    def runs() -> list[dict[str, Any]]:
        """All runs, the newest first."""
        folder = get_runs_dir()
        found = [describe_run(path) for path in folder.iterdir() if is_tag(path.name)] if folder.is_dir() else []
        return sorted((run for run in found if run["stages"]), key=lambda run: -run["updated"])

    @app.get("/api/runs/{tag}")
    def run(tag: str) -> dict[str, Any]:
        """One run: for each stage its settings, curves, samples and evaluation."""
        try:
            run_dir = get_run_dir(tag)
        except NanochatError as error:
            raise RequestError(str(error), param="tag") from None
        try:  # os.path, since Path.is_dir raises for a name that is too long
            found = [run_dir / stage for stage in STAGES if os.path.isdir(run_dir / stage)]
            stages = {stage_dir.name: describe_stage(stage_dir, _stamp(stage_dir)) for stage_dir in found}
        except NanochatError as error:
            raise RequestError(str(error), status=500) from None
        if not stages:
            raise RequestError(f"there is no run {tag!r}", status=404, param="tag")
        return {"tag": tag, "stages": stages}


def describe_run(run_dir: Path) -> dict[str, Any]:
    stages, updated = [], 0.0
    for stage in STAGES:
        metrics = run_dir / stage / METRICS_FILE
        if metrics.exists():
            stages.append({"name": stage, "checkpoints": list_steps(run_dir / stage)})
            updated = max(updated, metrics.stat().st_mtime)
    return {"tag": run_dir.name, "stages": stages, "updated": updated}


def _stamp(stage_dir: Path) -> tuple[tuple[int, int], ...]:
    """(time of the last change, size) of a stage's files, and of its directory, where checkpoints come and go."""
    paths = [stage_dir, *(stage_dir / name for name in (METRICS_FILE, SETTINGS_FILE, EVAL_FILE))]
    return tuple((info.st_mtime_ns, info.st_size) for info in (path.stat() for path in paths if path.exists()))


@functools.lru_cache(maxsize=8)
def describe_stage(stage_dir: Path, stamp: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """What a stage has done; read once per `stamp`, since long runs take a second."""
    rows = read_metrics(stage_dir / METRICS_FILE)
    sampled = [row for row in rows if "sample/text" in row][-40:]
    return {
        "title": STAGE_TITLES[stage_dir.name],
        "settings": read_json(stage_dir / SETTINGS_FILE),
        "step": max((row["step"] for row in rows), default=0),
        "time_s": rows[-1].get("time_s", 0.0) if rows else 0.0,
        "updated": rows[-1].get("timestamp", 0.0) if rows else 0.0,
        "checkpoints": list_steps(stage_dir),
        "curves": [_curve(rows, name) for name in drawn(rows)],
        "samples": [{"step": r["step"], "prompt": r["sample/prompt"], "text": r["sample/text"]} for r in sampled],
        "evaluation": read_eval(stage_dir),
    }


def _curve(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A series with its title and [[step, value], ...], thinned to what a screen shows but always with the last point."""
    (steps, _, values), title = curve(rows, name), title_of(name)
    points = [[steps[i], values[i]] for i in thinned(len(steps), MAX_POINTS)]
    return {"name": name, "title": f"{title} (smoothed)" if quantity(name).noisy else title, "points": points}

"""Draw runs over each other: python -m scripts.compare d12 d12-wide [--x time] [--stage base] [--output compare.html].

Prints their final numbers and the settings in which they differ, and writes a page with these and the curves. Reads what the
stages left behind, so runs that are still training can be compared as well.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import NanochatError, run_command
from nanochat.eval_results import read_eval
from nanochat.files import read_json
from nanochat.metrics import METRICS_FILE, SUMMARY, curve, drawn, read_metrics, series, summarize
from nanochat.plots import Bar, Curve, Panel, draw_bars, draw_panel, to_svg
from nanochat.quantities import by_kind, in_order, is_result, quantity, starts_at_zero, title_of
from nanochat.report import Picture, Section, format_value, render
from nanochat.runs import SETTINGS_FILE, STAGE_TITLES, STAGES, begun_stages, find_run_dir
from nanochat.same_run import WORK_SETTINGS
from nanochat.scores import centered, centered_mean, core_label
from nanochat.settings import Arguments, SettingsParser
from nanochat.tables import print_table

AXES = {"steps": "step", "time": "minutes of training"} | {x: quantity(f"train/{x}").title for x in ("tokens", "flops")}
# Settings that say nothing about training, or nothing to a reader.
NAMES = {"tag", "mixture", "model_tag", "run", "log_to", "resume", "resume_from_step", "stage"}


@dataclass
class Run:
    """A stage of a run, as found on disk."""

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    results: dict[str, Any]  # of eval.json

    @functools.cached_property
    def summary(self) -> dict[str, str]:
        return summarize(self.rows)


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Draw runs over each other.", examples=["%(prog)s d12 d12-wide", "%(prog)s d12 d16 --x flops --output scaling.html"]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="model tag, or the directory of a run")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), metavar="FILE", help="the page to write")
    parser.add_argument("--x", choices=AXES, default="steps", help="what the curves are drawn over")
    parser.add_argument("--stage", choices=STAGES, default="base", help="stage of the runs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    directories = list(dict.fromkeys(find_run_dir(run).resolve() for run in args.runs))  # a run given twice counts once
    runs = [read_run(directory, args.stage, name_among(directory, directories)) for directory in directories]
    tables = [
        Section("Numbers", ["", *(run.name for run in runs)], final_numbers(runs)),
        Section("Settings that differ", ["", *(run.name for run in runs)], differing_settings(runs)),
    ]
    tables = [table for table in tables if table.rows]
    for table in tables:
        print_table(table.columns, table.rows, table.title)
    sections = [Section(f"{STAGE_TITLES[args.stage]}: curves", pictures=draw_curves(runs, args.x)), *draw_scores(runs)]
    context = {
        "title": f"nanochat: {', '.join(run.name for run in runs)}", "made": time.strftime("%Y-%m-%d %H:%M"),
        "sections": [*tables[:1], *(s for s in sections if s.pictures), *tables[1:]],
    }  # fmt: skip
    print(render("report.html", args.output, context))
    return 0


# ----------------------------------------------------------------------------- reading


def name_among(directory: Path, all_directories: list[Path]) -> str:
    """The last parts of a directory's path, as many as tell it from the others."""
    for n in range(1, len(directory.parts)):
        if sum(other.parts[-n:] == directory.parts[-n:] for other in all_directories) == 1:
            return "/".join(directory.parts[-n:])
    return str(directory)


def read_run(directory: Path, stage: str, name: str) -> Run:
    """Raises NanochatError if the run has no such stage."""
    stage_dir = directory / stage
    if stage not in (begun := begun_stages(directory)):
        raise NanochatError(f"run {name!r} has no stage {stage}: choose --stage {' or '.join(begun)}, or leave it out")
    rows = read_metrics(stage_dir / METRICS_FILE)
    return Run(name, read_json(stage_dir / SETTINGS_FILE), rows, read_eval(stage_dir))


# ----------------------------------------------------------------------------- tables


def final_numbers(runs: list[Run]) -> list[list[str]]:
    """A row for each number that any of the runs has, beginning with its name."""

    def summary(label: str) -> Callable[[Run], str]:
        return lambda run: run.summary[label]

    def chat_mean(key: str) -> Callable[[Run], str]:
        return lambda run: f"{run.results[key]['value']:.4f}"

    wanted: dict[str, Callable[[Run], str]] = {
        "parameters": lambda run: f"{run.settings['num_params']:,}",
        "steps": lambda run: f"{run.summary['steps']} of {run.settings['num_iterations']:,}",
        **{label: summary(label) for label in ("time", *SUMMARY)},
        "FLOPs to the first one's bits per byte": lambda run: share_to_result(run, runs[0], "flops"),
        "time to the first one's bits per byte": lambda run: share_to_result(run, runs[0], "time"),
        "evaluated at step": lambda run: f"{run.results['step']:,}",
        "evaluated bits per byte": lambda run: f"{run.results['bpb']['val']:.4f}",
    }
    wanted |= core_numbers(runs)
    for key in dict.fromkeys(key for run in runs for key in run.results if key.startswith("chatcore")):  # by settings
        wanted[key.replace("chatcore", "mean of the chat tasks")] = chat_mean(key)
    for label, number in other_numbers(runs).items():
        wanted.setdefault(label, number)
    rows = [[label, *(_or_dash(number, run) for run in runs)] for label, number in wanted.items()]
    return [row for row in rows if set(row[1:]) != {"-"}]


def other_numbers(runs: list[Run]) -> dict[str, Callable[[Run], str]]:
    """The last values of what the runs logged besides the numbers of SUMMARY, smoothed if they are noisy."""

    def last(name: str) -> Callable[[Run], str]:
        return lambda run: quantity(name).form.format(curve(run.rows, name)[2][-1])

    names = {name for run in runs for name in drawn(run.rows)} - {name for name, _ in SUMMARY.values()}
    found = [name for name in in_order(names) if quantity(name).form]
    return {title_of(name) + ", smoothed" * quantity(name).noisy: last(name) for name in found}


def share_to_result(run: Run, first: Run, x: str) -> str:
    """What a run had spent, in FLOPs or time, when it reached the first run's last bits per byte: a share of what that spent.

    Between two evaluations as on a straight line. Raises IndexError if the first run has none.
    """
    ends, results = series(first.rows, "val/bpb")
    steps, values = series(run.rows, "val/bpb")
    reached = next((i for i, value in enumerate(values) if value <= results[-1]), None)
    begun_elsewhere = any(each.settings.get("stage") == "base" and each.settings.get("from_run") for each in (run, first))
    if run is first or not values or begun_elsewhere or not (whole := over(x, first, ends[-1:])[0]):
        return "-"
    if reached is None:
        return "not reached"
    around = slice(max(0, reached - 1), reached + 1)  # np.interp wants what it looks up to ascend
    spent = np.interp(results[-1], values[around][::-1], over(x, run, steps[around])[::-1])
    return f"{spent / whole:.0%}"


def core_numbers(runs: list[Run]) -> dict[str, Callable[[Run], str]]:
    """CORE of runs measured on all tasks; if others were measured on fewer, also the mean over the tasks that all share."""
    measured = [run.results["core"] for run in runs if "core" in run.results]
    shared = [label for label in measured[0]["tasks"] if all(label in core["tasks"] for core in measured)] if measured else []

    def whole(run: Run) -> str:
        core = run.results["core"]
        return f"{core['value']:.4f}" if core_label(core) == "CORE" else "-"

    def over_shared(run: Run) -> str:
        tasks = [run.results["core"]["tasks"][label] for label in shared]
        return f"{centered_mean(tasks)[0]:.4f} ({sum(task['n'] for task in tasks):,} questions)"

    if not shared or all(core_label(core) == "CORE" for core in measured):
        return {"CORE": whole}
    return {"CORE": whole, f"CORE, tasks that all have: {len(shared)}": over_shared}


def _or_dash(number: Callable[[Run], str], run: Run) -> str:
    try:
        return number(run)
    except (KeyError, IndexError, ValueError, NanochatError):  # it was not measured
        return "-"


def differing_settings(runs: list[Run]) -> list[list[str]]:
    """A row for each setting that differs between the runs; those that affect the result come first."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in NAMES)
    ordered = sorted(keys, key=lambda key: key in WORK_SETTINGS)
    # Of a fingerprint, the beginning tells two apart; all of it would push the other columns off the page.
    most = {"tokenizer_fingerprint": 12}
    rows = [
        [key.replace("_", " "), *(format_value(run.settings.get(key, "-"))[: most.get(key)] for run in runs)]
        for key in ordered
    ]
    return [row for row in rows if len(set(row[1:])) > 1]


# ----------------------------------------------------------------------------- pictures


def draw_curves(runs: list[Run], x: str) -> list[Picture]:
    """A panel for each kind of series that any run has, with a curve for each run, always in the same colour."""
    names, pictures = in_order({name for run in runs for name in drawn(run.rows)}), []
    for kind, members in by_kind(names).items():
        curves = []
        for color, run in enumerate(runs):
            for dashes, name in enumerate(members):
                steps, _, values = curve(run.rows, name)
                if values:
                    label = run.name if len(members) == 1 else f"{run.name} {name.partition('/')[2]}"
                    places = over(x, run, steps)
                    curves.append(Curve(label, places, values, dots=is_result(kind), color=color, dashes=dashes))
        panel = Panel(quantity(kind).title, curves, AXES[x], from_zero=starts_at_zero(kind))
        pictures.append(Picture(kind, panel.title, to_svg(draw_panel(panel), panel.title), wide=False))
    return pictures


def over(x: str, run: Run, steps: list[int]) -> list[float]:
    """Steps as places on an axis. Raises NanochatError if the run did not count what the axis shows."""
    if x == "steps":
        return list(steps)
    if x == "time":
        times = {row["step"]: row["time_s"] / 60 for row in run.rows}
        return [times[step] for step in steps]
    counted_at, counts = series(run.rows, f"train/{x}")
    if not counts:
        raise NanochatError(f"run {run.name!r} did not count its {x}: choose --x steps or --x time")
    return np.interp(steps, [0, *counted_at], [0.0, *counts]).tolist()


def draw_scores(runs: list[Run]) -> list[Section]:
    """The CORE and chat tasks that any of the runs was measured on, with a bar for each run."""
    sections = []
    for title, value, tasks_of in (
        ("CORE: centred accuracy", "centered", lambda run: run.results.get("core", {}).get("tasks", {})),
        ("Chat: right answers", "accuracy", lambda run: run.results.get("tasks", {})),
    ):
        bars = []
        for name in dict.fromkeys(name for run in runs for name in tasks_of(run)):
            label = name  # only the first bar of a task has a label
            for color, run in enumerate(runs):
                if task := tasks_of(run).get(name):
                    base = task["baseline"] if value == "centered" else 0.0
                    low, high = (centered(task[side], base) for side in ("low", "high"))
                    bars.append(Bar(label, task[value], low, high, color=color))
                    label = ""
        if bars:
            figure = draw_bars("with 95% intervals", bars, percent=value == "accuracy", names=[run.name for run in runs])
            sections.append(Section(title, pictures=[Picture(title, title, to_svg(figure, title), wide=True)]))
    return sections


if __name__ == "__main__":
    sys.exit(run_command(main))

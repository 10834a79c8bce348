"""Fits scaling laws to a series of runs: python -m dev.scaling_analysis --runs 'law-*'

Reads the runs that runs/miniseries.sh or runs/scaling_laws.sh left in NANOCHAT_BASE_DIR, prints a table of their sizes,
tokens, FLOPs and validation bits per byte, and writes scaling.csv and scaling.png beside them. For each budget with three
or more sizes, the minimum of a parabola through bits per byte against log(size) is the best size (approach 2 of
arXiv 2203.15556). From several budgets follow the exponents by which the best size and number of tokens grow.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import NanochatError, run_command
from nanochat.files import read_json
from nanochat.metrics import METRICS_FILE, read_metrics, series
from nanochat.runs import SETTINGS_FILE, get_runs_dir
from nanochat.settings import SettingsParser
from nanochat.tables import print_table

COLUMNS = ("run", "depth", "size", "tokens", "flops", "tokens_per_param", "bpb")


def read_run(folder: Path) -> dict[str, Any] | None:
    """A row of the table; None for a run without a validation result, or not yet with that of its last update.

    size: parameters as scaling laws count them.
    """
    stage_dir = folder / "base"
    settings = read_json(stage_dir / SETTINGS_FILE)
    rows = read_metrics(stage_dir / METRICS_FILE)
    _, measured = series(rows, "val/bpb")  # without those of a run that diverged, which are no numbers
    if not settings or not measured:
        return None
    last = max(row["step"] for row in rows if "val/bpb" in row)
    if last < settings["num_iterations"]:  # the bits per byte are not those of the planned tokens
        print(f"left out: {folder.name}, unfinished, was measured up to step {last} of {settings['num_iterations']}")
        return None
    tokens, size = settings["num_iterations"] * settings["total_batch_size"], settings["num_scaling_params"]
    flops = max(row.get("train/flops", 0) for row in rows)
    return {
        "run": folder.name, "depth": settings["depth"], "size": size, "tokens": tokens, "flops": flops,
        "tokens_per_param": round(tokens / size, 2), "bpb": measured[-1], "budget": settings["target_flops"],
    }  # fmt: skip


def best_size(rows: list[dict[str, Any]]) -> float | None:
    """The size at the minimum of a parabola through bpb against log(size); None if the parabola has no minimum."""
    a, b, _ = np.polyfit([np.log(row["size"]) for row in rows], [row["bpb"] for row in rows], 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else None


def analyse(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """{"budget", "size", "tokens"} at the optimum of each budget that has three or more sizes and an optimum."""
    by_budget: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["budget"] > 0:
            by_budget[row["budget"]].append(row)
    optima = []
    for budget, group in sorted(by_budget.items()):
        if len({row["size"] for row in group}) >= 3 and (size := best_size(group)):
            # FLOPs per token grow with size, so interpolate tokens between the runs as a power of it.
            slope, offset = np.polyfit(np.log([r["size"] for r in group]), np.log([r["tokens"] for r in group]), 1)
            optima.append({"budget": budget, "size": size, "tokens": float(np.exp(offset + slope * np.log(size)))})
    return optima


def draw(rows: list[dict[str, Any]], optima: list[dict[str, float]], path: Path) -> None:
    """Left: bits per byte against FLOPs. Right: against size, a line for each budget, the best sizes marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    left.scatter([row["flops"] for row in rows], [row["bpb"] for row in rows])
    for row in rows:
        left.annotate(f"d{row['depth']}", (row["flops"], row["bpb"]), textcoords="offset points", xytext=(4, 4), fontsize=8)
    for budget in sorted({row["budget"] for row in rows}):
        group = sorted((row for row in rows if row["budget"] == budget), key=lambda row: row["size"])
        label = f"{budget:.0e} FLOPs" if budget > 0 else "by depth"
        right.plot([row["size"] for row in group], [row["bpb"] for row in group], marker="o", label=label)
    for optimum in optima:
        right.axvline(optimum["size"], color="grey", linestyle=":", linewidth=1)
    left.set(xscale="log", xlabel="FLOPs", ylabel="validation bits per byte")
    right.set(xscale="log", xlabel="parameters (matrices and head)")
    for axis in (left.xaxis, right.xaxis):  # label only 1, 2 and 5 of each decade: more labels would overlap
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(9, 9)))
        axis.set_minor_formatter(ticker.NullFormatter())
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = SettingsParser("Table, fit and plot of a series of runs.")
    parser.add_argument("--runs", default="*", metavar="PATTERN", help="names of runs, with * and ?")
    args = parser.parse_args(argv)
    found = [read_run(folder) for folder in sorted(get_runs_dir().glob(args.runs))]
    rows = sorted((row for row in found if row), key=lambda row: (row["budget"], row["size"]))
    if not rows:
        raise NanochatError(f"no run {args.runs!r} in {get_runs_dir()} has a validation result: start with runs/miniseries.sh")
    table = [[row["run"], str(row["depth"]), f"{row['size']:,}", f"{row['tokens']:,}", f"{row['flops']:.2e}",
              f"{row['tokens_per_param']:.1f}", f"{row['bpb']:.4f}"] for row in rows]  # fmt: skip
    print_table(["run", "depth", "size", "tokens", "FLOPs", "tokens/size", "bpb"], table)
    optima = analyse(rows)
    for optimum in optima:
        ratio = optimum["tokens"] / optimum["size"]
        print(f"best at {optimum['budget']:.1e} FLOPs: {optimum['size']:,.0f} parameters, {ratio:.1f} tokens for each")
    if len(optima) > 1:
        budgets = np.log([optimum["budget"] for optimum in optima])
        for name in ("size", "tokens"):
            exponent = np.polyfit(budgets, np.log([optimum[name] for optimum in optima]), 1)[0]
            print(f"best {name} grows as FLOPs^{exponent:.2f}")
    with open(get_runs_dir() / "scaling.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, optima, get_runs_dir() / "scaling.png")
    print(f"written: {get_runs_dir() / 'scaling.csv'}, scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

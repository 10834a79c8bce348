"""The report card of a run: report.md and report.html in its directory. python -m nanochat.report [--model-tag TAG]

Everything comes from what the stages left behind (settings.json, metrics.jsonl, eval.json), so an unfinished run has a
report as well.
"""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import psutil
import torch

from nanochat.checkpoint_manager import SETTINGS_FILE, STAGES, get_run_dir, get_runs_dir
from nanochat.common import NanochatError, atomic_write, run_command
from nanochat.metrics import read_metrics
from nanochat.progress import format_seconds
from nanochat.scores import describe_pass_at
from nanochat.settings import SettingsParser

STAGE_TITLES = {"base": "Pretraining", "sft": "Supervised fine-tuning", "rl": "Reinforcement learning"}
TRAINED_TITLES = {"train/loss": "training loss (nats per token)", "rl/reward": "reward of the sampled answers"}
MEASURED_TITLES = {"val/bpb": "validation bits per byte", "val/core": "CORE", "val/pass@": "held-out problems solved"}
SHOWN_SETTINGS = (
    "depth", "data", "tasks", "max_seq_len", "window_pattern", "num_iterations", "total_batch_size", "device_batch_size",
    "num_params", "num_scaling_params", "flops_per_token", "matrix_lr", "embedding_lr", "unembedding_lr", "weight_decay",
    "device", "dtype", "world_size", "parent",
)  # fmt: skip


@dataclass
class Section:
    """A heading with any of: rows of a table, a picture (SVG and PNG), pairs of prompt and text."""

    title: str
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    plot: str | None = None  # file name below plots/, without suffix
    samples: list[dict[str, str]] = field(default_factory=list)


# ----------------------------------------------------------------------------- reading a run


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def merge_eval(stage_dir: Path, step: int, results: dict[str, Any]) -> None:
    """Add results to the stage's eval.json; results of another step are dropped."""
    path = stage_dir / "eval.json"
    old = read_json(path)
    merged = old if old.get("step") == step else {"step": step}
    for key, value in results.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    atomic_write(path, json.dumps(merged, indent=2))


# ----------------------------------------------------------------------------- making the report


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report.md and report.html (self-contained) into a run's directory; returns their paths."""
    sections = [_system_section()]
    plots: dict[str, str] = {}
    overview = Section("Stages", ["stage", "steps", "tokens", "time", "loss", "val bpb", "tokens/s", "MFU", "memory"])
    sections.append(overview)
    for stage in STAGES:
        stage_dir = run_dir / stage
        rows = read_metrics(stage_dir / "metrics.jsonl")
        settings = read_json(stage_dir / SETTINGS_FILE)
        if not settings:
            continue
        overview.rows.append(_overview_row(stage, rows))
        sections.append(_settings_section(stage, settings))
        if any("train/loss" in row for row in rows):
            name = f"{stage}_curves"
            plots[name] = _plot_curves(rows, run_dir / "plots" / name)
            sections.append(Section(f"{STAGE_TITLES[stage]}: curves", plot=name))
        results = read_json(stage_dir / "eval.json")
        if core := results.get("core"):
            plots["core"] = _plot_core(core["tasks"], run_dir / "plots" / "core")
            sections.append(_core_section(core))
        sections += _evaluation_sections(stage, results, rows)
    if not overview.rows:
        raise NanochatError(f"{run_dir} holds no stage to report on: train one first")
    context = {"title": f"nanochat: {run_dir.name}", "made": time.strftime("%Y-%m-%d %H:%M"), "sections": sections}
    markdown, html = run_dir / "report.md", run_dir / "report.html"
    loader = jinja2.PackageLoader("nanochat", "templates")
    # Only the page is escaped: samples are whatever a model wrote.
    for path, autoescape in ((markdown, False), (html, True)):
        environment = jinja2.Environment(loader=loader, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True)
        environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
        atomic_write(path, environment.get_template(path.name).render(context, plots=plots))
    return markdown, html


def _system_section() -> Section:
    memory = psutil.virtual_memory().total / 2**30
    rows = [
        [
            "System",
            f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}",
        ],
        ["Processor", f"{_cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GiB"],
    ]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        rows.append(["GPU", ", ".join(names)])
    if commit := _git_commit():
        rows.append(["Code", commit])
    return Section("Machine", ["", ""], rows)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or "unknown"


def _git_commit() -> str | None:
    """The commit of the code that runs, "dirty" if it was changed since; None outside a checkout."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def _overview_row(stage: str, rows: list[dict[str, Any]]) -> list[str]:
    train = [row for row in rows if "train/loss" in row]
    val = [row["val/bpb"] for row in rows if "val/bpb" in row]
    if not train:
        return [STAGE_TITLES[stage], "0", *["-"] * 7]
    last = train[-1]
    speeds = sorted(row["train/tok_per_s"] for row in train if "train/tok_per_s" in row)
    shares = sorted(row["train/mfu"] for row in train if "train/mfu" in row)
    return [
        STAGE_TITLES[stage],
        f"{last['step']:,}",
        f"{last['train/tokens']:,}" if "train/tokens" in last else "-",
        format_seconds(last["time_s"]),
        f"{last['train/loss']:.4f}",
        f"{val[-1]:.4f}" if val else "-",
        f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "-",
        f"{shares[len(shares) // 2]:.1%}" if shares else "-",
        f"{last['train/peak_memory_mb'] / 1e3:.2f} GB" if "train/peak_memory_mb" in last else "-",
    ]


def _settings_section(stage: str, settings: dict[str, Any]) -> Section:
    rows = [[key.replace("_", " "), _format(settings[key])] for key in SHOWN_SETTINGS if settings.get(key) is not None]
    return Section(f"{STAGE_TITLES[stage]}: settings", ["", ""], rows)


def _format(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _core_section(core: dict[str, Any]) -> Section:
    table = [
        [
            label,
            f"{task['accuracy']:.1%}",
            f"{task['low']:.1%} to {task['high']:.1%}",
            f"{task['centered']:.4f}",
            f"{task['n']:,}",
        ]
        for label, task in core["tasks"].items()
    ]
    name = "core_metric" if "core_metric" in core else "core_partial"
    table.append(
        [f"{name}, over {len(core['tasks'])} tasks", "", f"{core['low']:.4f} to {core['high']:.4f}", f"{core[name]:.4f}", ""]
    )
    if core["missing"]:
        table.append([f"without data: {', '.join(core['missing'])}", "", "", "", ""])
    return Section("CORE", ["task", "accuracy", "95% interval", "centred", "questions"], table, plot="core")


def _evaluation_sections(stage: str, results: dict[str, Any], rows: list[dict[str, Any]]) -> list[Section]:
    sections = []
    table = [[f"bits per byte, {split}", f"{value:.4f}", "", ""] for split, value in results.get("bpb", {}).items()]
    for name, task in results.get("tasks", {}).items():
        interval = f"{task['low']:.1%} to {task['high']:.1%}"
        table.append([name, f"{task['accuracy']:.1%}", interval, f"{task['n']:,}"])
        if passed := describe_pass_at(task.get("pass_at", {})):
            table.append(["", passed, "", ""])
    if mean := results.get("chatcore"):
        interval = f"{mean['low']:.4f} to {mean['high']:.4f}"
        table.append([f"{mean['name']}, over {mean['tasks']} tasks", f"{mean['value']:.4f}", interval, ""])
    if table:
        sections.append(Section(f"{STAGE_TITLES[stage]}: evaluation", ["", "", "95% interval", "problems"], table))
    samples = list(results.get("samples", []))
    for examples in results.get("examples", {}).values():
        samples += [{"prompt": e["question"], "text": e["answer"]} for e in examples[:3]]
    if not samples:
        logged = [row for row in rows if "sample/text" in row]
        newest = [row for row in logged if row["step"] == logged[-1]["step"]]
        samples = [{"prompt": row["sample/prompt"], "text": row["sample/text"]} for row in newest]
    if samples:
        sections.append(Section(f"{STAGE_TITLES[stage]}: samples", samples=samples))
    return sections


# ----------------------------------------------------------------------------- pictures


def _plot_curves(rows: list[dict[str, Any]], path: Path) -> str:
    """What was trained on and what it was measured by, over steps: written as PNG, returned as SVG."""
    plt = _pyplot()
    names = {name for row in rows for name, value in row.items() if value is not None}
    trained = "rl/reward" if "rl/reward" in names else "train/loss"
    measured = sorted(name for name in names if name.startswith("val/"))
    titles = dict.fromkeys(map(_kind_of, measured))  # pass@1 and pass@8 share a picture; bits per byte and CORE do not
    count = 1 + len(titles)
    figure, axes = plt.subplots(1, count, figsize=(4.5 * count + 0.5, 3.2), layout="constrained", squeeze=False)
    steps, values = _series(rows, trained)
    axes[0][0].plot(steps, values, color="#9db8d9", linewidth=0.8)
    axes[0][0].plot(steps, smooth(values, min(0.95, 1 - 8 / (len(values) + 8))), color="#2b5c9e", linewidth=1.6)
    axes[0][0].set(title=TRAINED_TITLES[trained], xlabel="step")
    for axis, title in zip(axes[0][1:], titles, strict=True):
        for name in (name for name in measured if _kind_of(name) == title):
            steps, values = _series(rows, name)
            axis.plot(steps, values, marker="o", markersize=3.5, label=f"{name.removeprefix('val/')} {values[-1]:.3f}")
        axis.set(title=title, xlabel="step")
        axis.legend()
    return _save_figure(figure, path)


def _kind_of(name: str) -> str:
    return next((title for prefix, title in MEASURED_TITLES.items() if name.startswith(prefix)), name.removeprefix("val/"))


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    chosen = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in chosen], [row[name] for row in chosen]


def _plot_core(tasks: dict[str, dict[str, Any]], path: Path) -> str:
    """Centred accuracies with their intervals, the best on top: written as PNG, returned as SVG."""
    plt = _pyplot()
    ordered = sorted(tasks.items(), key=lambda item: item[1]["centered"])
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.24 * len(ordered)), layout="constrained")
    values = [task["centered"] for _, task in ordered]
    bounds = [[(task[side] - task["baseline"]) / (1 - task["baseline"]) for _, task in ordered] for side in ("low", "high")]
    errors = [
        [v - low for v, low in zip(values, bounds[0], strict=True)],
        [h - v for v, h in zip(values, bounds[1], strict=True)],
    ]
    axis.barh([label for label, _ in ordered], values, xerr=errors, color="#9db8d9", ecolor="#2b5c9e", capsize=2)
    axis.axvline(0, color="#667085", linewidth=0.8)
    axis.set(title="centred accuracy: 0 is guessing, 1 is all right", ylim=(-0.7, len(ordered) - 0.3))
    return _save_figure(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save_figure(figure: Any, path: Path) -> str:
    """Write a figure as PNG beside `path` and return it as SVG."""
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    _pyplot().close(figure)
    text = svg.getvalue()
    return text[text.index("<svg") :]


def smooth(values: list[float], decay: float = 0.95) -> list[float]:
    """An exponential mean of the values so far, without a bias towards the first."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(mean / weight)
    return result


def find_newest_run() -> str:
    """The run that was written to last. Raises NanochatError if there is none."""
    runs = [path for path in get_runs_dir().glob("*") if any((path / stage / SETTINGS_FILE).exists() for stage in STAGES)]
    if not runs:
        raise NanochatError(f"no run in {get_runs_dir()}: make one with python -m scripts.base_train")
    stamps = {run: max(p.stat().st_mtime for stage in STAGES for p in run.glob(f"{stage}/*.json*")) for run in runs}
    return max(runs, key=stamps.__getitem__).name


def main(argv: list[str] | None = None) -> int:
    parser = SettingsParser("Write the report of a run.", examples=["%(prog)s", "%(prog)s --model-tag d12"])
    parser.add_argument("command", nargs="?", default="generate", choices=("generate",), help="may be left out")
    parser.add_argument("-g", "--model-tag", default=None, help="run (default: the newest)")
    args = parser.parse_args(argv)
    for path in write_report(get_run_dir(args.model_tag or find_newest_run())):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

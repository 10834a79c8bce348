"""The report card of a run: report.md and report.html in its directory. python -m nanochat.report [--model-tag TAG]

Everything comes from files of the stages (settings.json, metrics.jsonl, eval.json, a checkpoint's meta.json), so unfinished
runs have a report as well. The page is one file with styles and pictures included, and needs no JavaScript.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import psutil
import torch
from markupsafe import Markup, escape

from nanochat.checkpoint_manager import META_FILE, read_config
from nanochat.common import NanochatError, run_command
from nanochat.cpu import cpu_name
from nanochat.eval_results import read_eval
from nanochat.files import atomic_write, read_json, short_name
from nanochat.gpt import GPT
from nanochat.metrics import METRICS_FILE, curve, drawn, read_metrics, series, summarize
from nanochat.plots import Bar, Curve, Panel, draw_bars, draw_panel, draw_shares, save_png, to_svg
from nanochat.progress import format_seconds
from nanochat.quantities import by_kind, is_result, quantity, starts_at_zero
from nanochat.runs import (
    SETTINGS_FILE,
    STAGE_TITLES,
    STAGES,
    begun_stages,
    find_run_dir,
    get_runs_dir,
    is_tag,
    list_steps,
    step_dir,
)
from nanochat.scores import centered, core_label, core_table, describe_interval, describe_mean, describe_pass_at
from nanochat.settings import SettingsParser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of a stage's summary (metrics.py), as many as a page has room for beside each other.
OVERVIEW = (
    "steps", "time", "tokens", "reward, smoothed", "loss, smoothed", "val bpb", "pass@1", "tokens/s, median", "MFU, median",
    "most memory",
)  # fmt: skip
SHOWN_SETTINGS = (
    "depth", "data", "tasks", "max_seq_len", "window_pattern", "num_iterations", "total_batch_size", "expand_at",
    "objective", "examples_per_step", "num_samples", "max_new_tokens", "temperature", "top_k", "kl_weight",
    "device_batch_size", "num_params", "num_scaling_params", "flops_per_token", "matrix_lr", "embedding_lr",
    "unembedding_lr", "init_lr_frac", "weight_decay", "switches", "device", "dtype", "attention", "world_size",
    "parent",
)  # fmt: skip


@dataclass
class Picture:
    """A picture in a section: SVG in the page, plots/NAME.png beside report.md. wide: over both columns."""

    name: str
    description: str
    svg: str
    wide: bool


@dataclass
class Section:
    """A heading with any of: a table, a note below it, pictures, pairs of prompt and text."""

    title: str
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    continues: bool = False  # samples continue their prompts instead of answering them
    note: str = ""


# ----------------------------------------------------------------------------- making the report


def _add_picture(plots: Path, name: str, description: str, figure: Figure, wide: bool = True) -> Picture:
    """A picture of the report: as PNG in the folder `plots`, as SVG for the page."""
    save_png(figure, plots / f"{name}.png")
    return Picture(name, description, to_svg(figure, description), wide)


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report.md and report.html (self-contained) into a run's directory; returns their paths."""
    summaries, sections, facts, plots = dict[str, dict[str, str]](), list[Section](), {}, run_dir / "plots"
    for stage in STAGES:
        stage_dir = run_dir / stage
        settings = read_json(stage_dir / SETTINGS_FILE)
        if not settings:
            continue
        rows = read_metrics(stage_dir / METRICS_FILE)
        results = read_eval(stage_dir)
        summaries[STAGE_TITLES[stage]] = summarize(rows)
        if "num_params" in settings:
            facts["parameters"] = f"{settings['num_params']:,}"
        facts |= _facts(stage, rows, results)
        sections += _curves_section(stage, rows, plots)
        sections += _evaluation_sections(stage, results, rows, plots)
        if stage == "base":
            sections += _model_section(stage_dir, plots)
        sections.append(Section(f"{STAGE_TITLES[stage]}: settings", ["", ""], settings_table(settings)))
    sections = [_overview_section(summaries), *sections, _system_section()]
    context = {
        "title": f"nanochat: {run_dir.name}", "made": time.strftime("%Y-%m-%d %H:%M"), "facts": facts, "sections": sections,
    }  # fmt: skip
    return render("report.md", run_dir / "report.md", context), render("report.html", run_dir / "report.html", context)


def render(template: str, path: Path, context: dict[str, Any]) -> Path:
    """Write a file from one of nanochat/templates."""
    atomic_write(path, fill(template, context))
    return path


def fill(template: str, context: dict[str, Any]) -> str:
    """The text of one of nanochat/templates. HTML is escaped, since samples may contain anything."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nanochat", "templates"), autoescape=template.endswith(".html"),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"cell": as_cell, "tokens": _mark_tokens}
    return environment.get_template(template).render(context)


def as_cell(text: Any) -> str:
    """A text whose pipes and line ends do not break a table or a list of Markdown."""
    return re.sub(r"\r\n?|\n", " ", str(text).replace("|", "\\|"))


def _mark_tokens(text: str) -> Markup:
    """Text for a page, with special tokens highlighted and at most one empty line in a row."""
    text = re.sub(r"\n\s*\n", "\n\n", text).rstrip()
    return Markup(re.sub(r"&lt;\|(\w+)\|&gt;", r"<code>\1</code>", str(escape(text))))


def _facts(stage: str, rows: list[dict[str, Any]], results: dict[str, Any]) -> dict[str, str]:
    """The key numbers at the top of the page."""
    facts = {}
    _, values = series(rows, "val/bpb")
    if stage == "base" and values:
        newest = {} if _at_step(results, rows) else results.get("bpb", {})
        facts["validation bits per byte"] = f"{newest.get('val', values[-1]):.4f}"
    if core := results.get("core"):
        facts[core_label(core) + _at_step(results, rows)] = describe_mean(core)[0]
    for name, mean in _chat_means(results).items():
        facts[name + _at_step(results, rows)] = describe_mean(mean)[0]
    if rows:
        facts[STAGE_TITLES[stage].lower()] = format_seconds(rows[-1].get("time_s", 0.0))
    return facts


def _at_step(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Which step was evaluated, where the run has gone on since; else nothing."""
    step = results.get("step")
    return f" at step {step:,}" if isinstance(step, int) and rows and rows[-1]["step"] > step else ""


def _system_section() -> Section:
    memory = psutil.virtual_memory().total / 2**30
    rows = [
        [
            "System",
            f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}",
        ],
        ["Processor", f"{cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GiB"],
    ]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        rows.append(["GPU", ", ".join(names)])
    if commit := _git_commit():
        rows.append(["Code", commit])
    return Section("The machine that wrote this", ["", ""], rows)


def _git_commit() -> str | None:
    """The commit of the running code, with "dirty" if there are changes; None outside a checkout."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def _overview_section(summaries: dict[str, dict[str, str]]) -> Section:
    """A row for each stage, by its title, and a column for each number that any of them has."""
    labels = [label for label in OVERVIEW if any(label in found for found in summaries.values())]
    rows = [[title, *(found.get(label, "-") for label in labels)] for title, found in summaries.items()]
    return Section("Stages", ["stage", *labels], rows)


def settings_table(settings: dict[str, Any]) -> list[list[str]]:
    """Rows of (name, value): the settings that describe a stage; only the last part of paths."""
    shown = {key: settings[key] for key in SHOWN_SETTINGS if settings.get(key) not in (None, [])}
    if "data" in shown:
        shown["data"] = short_name(str(shown["data"]))
    return [[key.replace("_", " "), format_value(value)] for key, value in shown.items()]


def format_value(value: Any) -> str:
    """A setting, as a table shows it."""
    if value is None or (isinstance(value, float) and value == -1):  # not given
        return "-"
    if isinstance(value, float) and abs(value) >= 1e6:  # FLOPs
        return f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _curves_section(stage: str, rows: list[dict[str, Any]], plots: Path) -> list[Section]:
    """Curves of everything that a stage logged over its steps."""
    title, pictures = STAGE_TITLES[stage], dict[str, Picture]()
    for kind, panel in make_panels(rows).items():
        plain = re.sub("[^a-z0-9]+", "_", f"{stage}_{kind.lower()}").strip("_")
        others = (f"{plain}_{number}" for number in itertools.count(2))  # where names differ only in what was left out
        name = next(name for name in itertools.chain([plain], others) if name not in pictures)
        pictures[name] = _add_picture(plots, name, f"{title}: {panel.title}", draw_panel(panel), wide=False)
    return [Section(f"{title}: curves", pictures=list(pictures.values()))] if pictures else []


def make_panels(rows: list[dict[str, Any]]) -> dict[str, Panel]:
    """A panel for each kind of series: reward, loss, results of evaluations, then the rest.

    pass@1 and pass@8 share a panel; bits per byte and CORE do not. MFU is the second axis of the speed.
    """
    kinds = by_kind(name for name in drawn(rows) if name != "train/mfu")
    return {kind: _make_panel(kind, members, rows) for kind, members in kinds.items()}


def _make_panel(kind: str, names: Sequence[str], rows: list[dict[str, Any]]) -> Panel:
    shown, curves = quantity(kind), []
    for name in names:
        steps, values, smoothed = curve(rows, name)
        label = f"{name.partition('/')[2]} {values[-1]:.3f}"
        curves.append(Curve(label, steps, smoothed, values if shown.noisy else None, dots=is_result(kind)))
    title = shown.title
    if is_result(kind) and len(curves) == 1:
        title += f": {curves[0].y[-1]:.4f}"
    share = _mfu_axis(rows) if kind == "train/tok_per_s" else None
    return Panel(title, curves, from_zero=starts_at_zero(kind), share=share)


def _mfu_axis(rows: list[dict[str, Any]]) -> tuple[float, str] | None:
    """(tokens per second at 100% of the machine's matmul rate, label), for a second axis."""
    row = next((row for row in rows if row.get("train/mfu") and row.get("train/tok_per_s")), None)
    return (row["train/tok_per_s"] / row["train/mfu"], "MFU, %") if row else None


def _model_section(stage_dir: Path, plots: Path) -> list[Section]:
    """The parts of the model in the newest checkpoint: their parameters, and operations per training token."""
    steps = list_steps(stage_dir)
    if not steps:
        return []
    model = GPT.on_meta(read_config(read_json(step_dir(stage_dir, steps[-1]) / META_FILE).get("model_config")))
    parts = count_parts(model)
    total = [sum(column) for column in zip(*parts.values(), strict=True)]

    def cells(count: int, whole: int) -> list[str]:
        return [f"{count:,}", f"{count / whole:.1%}"] if count else ["-", "-"]

    table = [[name, *cells(params, total[0]), *cells(flops, total[1])] for name, (params, flops) in parts.items()]
    table.append(["together", f"{total[0]:,}", "", f"{total[1]:,}", ""])
    wholes = {what: {name: both[i] for name, both in parts.items()} for i, what in enumerate(("parameters", "operations"))}
    picture = _add_picture(plots, "model", "what the model is made of", draw_shares("shares of the model's parts", wholes))
    columns = ["part", "parameters", "share", "FLOPs per token", "share"]
    return [Section("The model", columns, table, [picture])]


def count_parts(model: GPT) -> dict[str, tuple[int, int]]:
    """(parameters, FLOPs to train on one token) of each part; they add up to the model's own counts. Works on meta."""
    counts = model.num_scaling_params()
    attention = sum(p.numel() for block in model.blocks for p in block.attn.parameters())
    mlp = counts["matrices"] - attention
    parts = {
        "token embedding": (counts["wte"], 0),
        "pairs of tokens": (counts.get("bigrams", 0), 0),
        "value embeddings": (counts["value_embeds"], 0),
        "attention matrices": (attention, 6 * attention),
        "MLP matrices": (mlp, 6 * mlp),
        "head": (counts["lm_head"], 6 * counts["lm_head"]),
        "attention itself": (0, model.estimate_flops() - 6 * counts["scaling"]),
        "scalars": (counts["scalars"], 0),
    }
    return {name: numbers for name, numbers in parts.items() if any(numbers)}


def _core_section(core: dict[str, Any], plots: Path, at_step: str) -> Section:
    tasks = core["tasks"]
    table = core_table(core)
    value, interval = describe_mean(core)
    table.append([f"{core['name']}, over {len(tasks)} tasks", "", interval, value, ""])
    note = f"Without data: {', '.join(core['missing'])}." if core["missing"] else ""
    bars = [
        Bar(label, task["centered"], centered(task["low"], task["baseline"]), centered(task["high"], task["baseline"]))
        for label, task in sorted(tasks.items(), key=lambda item: -item[1]["centered"])
    ]
    figure = draw_bars("centred accuracy: 0 is guessing, 1 is all right", bars, percent=False)
    columns = ["task", "accuracy", "95% interval", "centred", "questions"]
    return Section(f"CORE{at_step}", columns, table, [_add_picture(plots, "core", "CORE by task", figure)], note=note)


def evaluation_table(results: dict[str, Any]) -> list[list[str]]:
    """Rows of (what, value, 95% interval, problems) from an eval.json, without CORE."""
    table = [[f"bits per byte, {split}", f"{value:.4f}", "", ""] for split, value in results.get("bpb", {}).items()]
    tasks = results.get("tasks", {})
    for name, task in tasks.items():
        table.append([name, f"{task['accuracy']:.1%}", describe_interval(task), f"{task['n']:,}"])
        if passed := describe_pass_at(task.get("pass_at", {})):
            table.append(["", passed, "", ""])
        if cut := task.get("unfinished"):
            table.append(["", f"{cut:,} answers reached the limit of tokens or the end of the context", "", ""])
    for name, mean in _chat_means(results).items():
        table.append([f"{name}, over {mean['tasks']} tasks", *describe_mean(mean), ""])
    return table


def _chat_means(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """ChatCORE by name; with unusual settings, such as longer answers, it has a name of its own."""
    found = {key.removeprefix("chatcore"): mean for key, mean in results.items() if key.startswith("chatcore")}
    return {mean["name"] + settings: mean for settings, mean in found.items()}


def _evaluation_sections(stage: str, results: dict[str, Any], rows: list[dict[str, Any]], plots: Path) -> list[Section]:
    tasks, table, at = results.get("tasks", {}), evaluation_table(results), _at_step(results, rows)
    sections = [_core_section(results["core"], plots, at)] if "core" in results else []
    title, pictures = STAGE_TITLES[stage], []
    if tasks:
        bars = [Bar(name, t["accuracy"], t["low"], t["high"], t.get("baseline")) for name, t in tasks.items()]
        figure = draw_bars("right answers, with 95% intervals", bars)
        pictures = [_add_picture(plots, f"{stage}_tasks", f"{title}: right answers by task", figure)]
    if table:
        columns = ["", "result", "95% interval", "problems"][: 4 if tasks else 2]
        sections.append(Section(f"{title}: evaluation{at}", columns, [row[: len(columns)] for row in table], pictures))
    if samples := _samples(results, rows):
        sections.append(Section(f"{title}: samples", samples=samples, continues=stage == "base"))
    return sections


def _samples(results: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples of the newest evaluation, three answers per task, else those shown last during training."""
    samples = list(results.get("samples", []))
    for task, examples in results.get("examples", {}).items():
        samples += [
            {"prompt": e["question"], "text": e["answer"], "task": task, "correct": e.get("correct")} for e in examples[:3]
        ]
    if not samples:
        logged = [row for row in rows if "sample/text" in row]
        newest = [row for row in logged if row["step"] == logged[-1]["step"]]
        samples = [{"prompt": row["sample/prompt"], "text": row["sample/text"]} for row in newest]
    return samples


def find_newest_run() -> str:
    """The run that was written to most recently. Raises NanochatError if there is none."""
    found = (path for path in get_runs_dir().glob("*") if is_tag(path.name))
    runs = [path for path in found if begun_stages(path)]
    if not runs:
        raise NanochatError(f"no run in {get_runs_dir()}: make one with python -m scripts.base_train")
    stamps = {run: max(p.stat().st_mtime for stage in STAGES for p in run.glob(f"{stage}/*.json*")) for run in runs}
    return max(runs, key=stamps.__getitem__).name


def main(argv: list[str] | None = None) -> int:
    parser = SettingsParser("Write the report of a run.", examples=["%(prog)s", "%(prog)s d12"])
    parser.add_argument("run", nargs="?", default=None, metavar="RUN", help="model tag, or the directory of a run")
    parser.add_argument("-g", "--model-tag", default=None, metavar="TAG", help="the same (default: the newest)")
    args = parser.parse_args(argv)
    if args.run == "reset":  # as the public recipes begin
        print("nothing to reset: every run has its own report")
        return 0
    run = args.model_tag or (args.run if args.run != "generate" else None)  # their other command
    for path in write_report(find_run_dir(run or find_newest_run())):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

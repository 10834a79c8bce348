"""Runs drawn over each other."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import NanochatError
from nanochat.eval_results import merge_eval
from nanochat.plots import Panel
from nanochat.report import make_panels, write_report
from nanochat.runs import STAGE_TITLES
from nanochat.same_run import FREE_SETTINGS, WORK_SETTINGS
from scripts import compare
from scripts.compare import Run, differing_settings, final_numbers, over


@pytest.fixture
def two_runs(tiny_run: Path) -> Path:
    """The folder of runs "tiny" and "wide", of which the second stopped after four steps of another learning rate."""
    other = shutil.copytree(tiny_run, tiny_run.with_name("wide")) / "base"
    settings = json.loads((other / "settings.json").read_text(encoding="utf-8"))
    settings |= {"matrix_lr": 0.5, "model_tag": "wide", "eval_every": 7}
    (other / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    lines = (other / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[:4]) + '{"step": 5, "tr', encoding="utf-8")
    return tiny_run.parent


def test_two_runs_are_drawn_and_told_apart(
    two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    score = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 90, "baseline": 0.25}
    merge_eval(two_runs / "tiny" / "base", 6, {"tasks": {"Sums": score}})
    page = tmp_path / "out" / "page.html"
    assert compare.main(["tiny", str(two_runs / "wide"), "tiny", "--output", str(page), "--x=time"]) == 0
    text = page.read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == str(page)
    for shown in (said, text):
        assert "4 of 6" in shown and "6 of 6" in shown
        assert "matrix lr" in shown and "0.5" in shown
        assert "head dim" not in shown  # in which they do not differ
    assert re.search(r"val bpb +\d\.\d{4} +-", said)  # not measured in the second
    assert said.count("tiny") == 2  # once a table: what is given twice is one run
    assert text.count("<svg") == 7  # loss, bits per byte, speed, MFU, learning rate, memory, tasks
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)[:1]:
        assert ">tiny<" in svg and ">wide<" in svg and "minutes of training" in svg
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", text)


def test_settings_that_decide_come_first(two_runs: Path) -> None:
    runs = [compare.read_run(two_runs / name, "base", name) for name in ("tiny", "wide")]
    assert differing_settings(runs) == [["matrix lr", "0.0126", "0.5"], ["eval every", "250", "7"]]
    assert differing_settings(runs[:1]) == []
    other = {"target_flops": 22651958329344.0, "tokenizer_fingerprint": 32 * "b3"}
    runs = [Run("a", {"target_flops": -1.0, "tokenizer_fingerprint": 32 * "a1"}, [], {}), Run("b", other, [], {})]
    assert differing_settings(runs) == [
        ["target flops", "-", "2.27e+13"], ["tokenizer fingerprint", 6 * "a1", 6 * "b3"],
    ]  # fmt: skip
    decisive = FREE_SETTINGS - WORK_SETTINGS
    names = ["eval_every", "world_size", *decisive]
    runs = [Run(name, dict.fromkeys(names, name), [], {}) for name in "ab"]
    ordered = [row[0].replace(" ", "_") for row in differing_settings(runs)]
    assert set(ordered[:-2]) == decisive and ordered[-2:] == ["eval_every", "world_size"]


def test_numbers_that_no_run_has_are_left_out() -> None:
    rows = [{"step": s, "time_s": 2.0 * s, "train/loss": 1.0 / s, "val/pass@1": None} for s in (1, 2, 3)]
    means = {
        "chatcore, at most 64 tokens": {"value": 0.25},
        "core": {"name": "core_partial", "value": 0.5, "tasks": {"A": _task(0.5, 8)}},
    }
    table = final_numbers([Run("a", {"num_params": 1000, "num_iterations": 9}, rows, means), Run("empty", {}, [], {})])
    last = "mean of the chat tasks, at most 64 tokens"
    assert [row[0] for row in table] == [
        "parameters",
        "steps",
        "time",
        "loss, smoothed",
        "CORE, tasks that all have: 1",
        last,
    ]
    assert [row[1:] for row in table][:3] == [["1,000", "-"], ["3 of 9", "-"], ["0:06", "-"]]
    assert [row[1:] for row in table][-2:] == [["0.5000 (8 questions)", "-"], ["0.2500", "-"]]


def _task(accuracy: float, n: int) -> dict[str, Any]:
    return {"accuracy": accuracy, "n": n, "low": accuracy, "high": accuracy, "baseline": 0.0}


def test_core_over_other_tasks_is_not_set_side_by_side() -> None:
    def run(name: str, value: float, limit: int = -1, **tasks: dict[str, Any]) -> Run:
        return Run(name, {}, [], {"core": {"name": name, "value": value, "tasks": tasks, "max_per_task": limit}})

    few = run("core_partial", 0.4, A=_task(0.2, 9), B=_task(0.4, 5), C=_task(0.6, 7))
    other = run("core_partial", 0.7, B=_task(0.6, 5), C=_task(1.0, 7), D=_task(0.5, 3))
    whole = run("core_metric", 0.35, A=_task(0.1, 9), B=_task(0.2, 5), C=_task(0.3, 7), D=_task(0.8, 3))
    quick = run("core_metric", 0.9, 2, A=_task(1.0, 2), B=_task(1.0, 2), C=_task(0.5, 2), D=_task(1.0, 2))
    both = "CORE, tasks that all have: 2"
    assert final_numbers([few, other]) == [[both, "0.5000 (12 questions)", "0.8000 (12 questions)"]]
    assert final_numbers([whole, few]) == [
        ["CORE", "0.3500", "-"], ["CORE, tasks that all have: 3", "0.2000 (21 questions)", "0.4000 (21 questions)"],
    ]  # fmt: skip
    assert final_numbers([whole, quick])[0] == ["CORE", "0.3500", "-"]
    assert final_numbers([quick]) == [["CORE, tasks that all have: 4", "0.8750 (8 questions)"]]
    assert final_numbers([whole]) == [["CORE", "0.3500"]]
    assert final_numbers([few, run("core_partial", 0.5, D=_task(0.5, 3))]) == []


def test_axes_say_the_same_of_updates_and_evaluations() -> None:
    rows = [{"step": s, "time_s": 60.0 * s, "train/loss": 1.0, "train/tokens": 512 * s} for s in (10, 20)]
    run = Run("a", {}, [*rows, {"step": 20, "time_s": 1200.0, "val/bpb": 1.0}], {})
    assert over("steps", run, [10, 20]) == [10, 20]
    assert over("time", run, [10, 20]) == [10, 20]
    assert over("tokens", run, [0, 5, 10, 15]) == [0, 2560, 5120, 7680]
    with pytest.raises(NanochatError, match="did not count its flops"):
        over("flops", run, [10])


def test_flops_are_those_that_were_counted() -> None:
    """Updates in which one block learns alone cost less than those that come after; not each has a row."""
    rows = [{"step": s, "time_s": 1.0, "train/flops": flops} for s, flops in ((10, 1e9), (20, 2e9), (30, 6e9), (40, 10e9))]
    run = Run("grown", {}, [*rows, {"step": 25, "time_s": 1.0, "val/bpb": 1.0}], {})
    assert over("flops", run, [5, 10, 20, 25, 30, 40]) == pytest.approx([5e8, 1e9, 2e9, 4e9, 6e9, 10e9])


def test_what_a_result_costs_is_a_share_of_what_it_cost_the_first() -> None:
    """Half way between evaluations on both sides of it."""

    def run(name: str, *values: float, flops: float) -> Run:
        rows = [{"step": i, "time_s": 6 * i, "val/bpb": value, "train/flops": i * flops} for i, value in enumerate(values)]
        return Run(name, {}, rows, {})

    first, others = (
        run("a", 3, 2, 1, flops=10),
        [run("b", 3, 1.5, 0.5, flops=20), run("c", 3, 2, flops=10), run("d", 0.5, flops=1)],
    )
    rows = {label: shown for label, *shown in final_numbers([first, *others]) if "to the first" in label}
    assert rows == {
        "FLOPs to the first one's bits per byte": ["-", "150%", "not reached", "0%"],
        "time to the first one's bits per byte": ["-", "75%", "not reached", "0%"],
    }
    for unequal in (
        [first], [run("e", 3, flops=10), *others],  # nothing was spent on its only evaluation
        [first, Run("f", {"stage": "base", "from_run": "a"}, first.rows, {})],  # which had the first one's work to begin with
    ):  # fmt: skip
        assert not [label for label, *_ in final_numbers(unequal) if "to the first" in label]


def test_a_run_that_is_not_there_is_named_with_its_nearest(two_runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    hints = {"tinny": r"did you mean tiny\?$", "no/such/wide": r"did you mean wide\?$", "xyz": "there are tiny, wide$"}
    for wrong, hint in hints.items():
        with pytest.raises(NanochatError, match=f"no run '{wrong}'.*{hint}"):
            compare.main(["tiny", wrong, "--output", str(page)])
    with pytest.raises(NanochatError, match="no stage rl: choose --stage base or sft"):
        compare.main(["tiny", "--stage=rl", "--output", str(page)])
    for n in range(20, 33):
        shutil.copytree(two_runs / "tiny", two_runs / f"d{n}")
    with pytest.raises(NanochatError, match=r"there are d20, (d\d\d, )+d29 and 5 more$"):
        compare.main(["xyz", "--output", str(page)])
    assert not page.exists()


def test_report_and_comparison_agree(two_runs: Path, quick_pictures: None) -> None:
    """All that the report's overview says of a stage stands in the comparison, under the same name."""
    markdown, _ = write_report(two_runs / "tiny")
    lines = [line.strip("| ").split(" | ") for line in markdown.read_text(encoding="utf-8").splitlines()]
    head = next(line for line in lines if line[0] == "stage")
    for stage in ("base", "sft"):
        overview = next(dict(zip(head, line, strict=True)) for line in lines if line[0] == STAGE_TITLES[stage])
        compared = {label: shown for label, shown in final_numbers([compare.read_run(two_runs / "tiny", stage, "tiny")])}
        assert compared["steps"].startswith(f"{overview.pop('steps')} of ")
        del overview["stage"]
        assert len(overview) >= 7 and overview.items() <= compared.items()


def test_every_logged_number_is_drawn_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every run or in one, often or once, known to quantities.py or not, always 0 or not; totals are axes."""
    panels: list[Panel] = []
    monkeypatch.setattr(compare, "draw_panel", panels.append)
    monkeypatch.setattr(compare, "to_svg", lambda *args: "")
    first = [
        {"step": s, "time_s": 1.0 * s, "timestamp": 1e9, "train/loss": 1.0 / s, "train/tokens": 64 * s, "train/flops": 1e6 * s,
         "train/lrm": 0.1 / s, "rl/reward": 0.5, "rl/unfinished": 0, "train/update norm*": 0.25 * s, "own": 7 * s}
        for s in (1, 2, 3)
    ]  # fmt: skip
    first += [{"step": 3, "time_s": 3.0, "val/bpb": 2.0, "val/pass@8": 0.25, "val/pass@16": 0.5, "val/top1": None}]
    second = [{"step": 1, "time_s": 1.0, "train/grad_norm": 1e-5, "sample/text": "words"}]
    runs = [Run("a", {}, first, {}), Run("b", {}, second, {})]
    kinds = [picture.name for picture in compare.draw_curves(runs, "steps")]
    assert kinds == [
        "rl/reward", "train/loss", "val/bpb", "val/pass@*", "train/lrm", "rl/unfinished",
        "own", "train/grad_norm", "train/update norm*",
    ]  # fmt: skip
    labels = {panel.title: [curve.label for curve in panel.curves] for panel in panels}
    assert labels["train/grad_norm"] == ["b"] and labels["held-out problems solved"] == ["a pass@8", "a pass@16"]
    assert len({curve.dashes for panel in panels for curve in panel.curves}) == 2  # of one colour, but to be told apart
    for run in runs:
        assert set(make_panels(run.rows)) <= set(kinds)
    assert set(kinds) == {kind for run in runs for kind in make_panels(run.rows)}
    table = {label: shown for label, *shown in final_numbers(runs)}
    assert list(table)[-6:] == [
        "held-out problems solved, pass@8", "held-out problems solved, pass@16", "answers cut off, smoothed",
        "own", "train/grad_norm", "train/update norm*",
    ]  # fmt: skip
    assert table["own"] == ["21", "-"] and table["train/grad_norm"] == ["-", "1e-05"]


def test_a_number_of_ones_own_takes_no_place_of_ours() -> None:
    ours = Run("a", {"num_params": 1, "num_iterations": 1}, [{"step": 1, "time_s": 1.0, "train/tokens": 50_000}], {})
    own = Run("b", {"num_params": 1, "num_iterations": 1}, [{"step": 1, "time_s": 1.0, "tokens": 7}], {})
    rows = {label: shown for label, *shown in final_numbers([ours, own])}
    assert rows["tokens"] == ["50,000", "-"]


def test_runs_of_one_name_are_told_apart(two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = shutil.copytree(two_runs / "tiny", tmp_path / "elsewhere" / "tiny")
    assert compare.main(["tiny", str(copy / "sft"), "--stage=sft", "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "elsewhere/tiny" in page and "runs/tiny" in page and str(tmp_path) not in page  # nor a path that fills the page


def test_the_best_loss_is_the_least() -> None:
    rows = [{"step": step, "time_s": 2.0 * step, "val/bpb": value} for step, value in ((1, 0.9), (2, 0.5), (3, 0.7))]
    assert ["best val bpb", "0.5000"] in final_numbers([Run("a", {}, rows, {})])


def test_pictures_are_over_minutes_and_intervals_are_centred(monkeypatch: pytest.MonkeyPatch) -> None:
    panels, bars = [], []
    monkeypatch.setattr(compare, "draw_panel", panels.append)
    monkeypatch.setattr(compare, "draw_bars", lambda title, drawn, **settings: bars.extend(drawn))
    monkeypatch.setattr(compare, "to_svg", lambda *args: "")
    rows = {name: [{"step": s, "time_s": k * s * 60.0, "val/bpb": 1.0} for s in (1, 2)] for name, k in (("a", 1), ("b", 5))}
    compare.draw_curves([Run(name, {}, of, {}) for name, of in rows.items()], "time")
    assert [list(curve.x) for curve in panels[0].curves] == [[1, 2], [5, 10]]
    task = {"centered": 0.2, "low": 0.4, "high": 0.7, "baseline": 0.25}
    names = ("t", "u")
    compare.draw_scores([Run(run, {}, [], {"core": {"tasks": dict.fromkeys(names, task)}}) for run in "ab"])
    assert (bars[0].low, bars[0].high) == pytest.approx((0.2, 0.6))
    assert [(bar.label, bar.color) for bar in bars] == [("t", 0), ("", 1), ("u", 0), ("", 1)]

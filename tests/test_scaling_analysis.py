"""The analysis of a series of runs: known optima are found, runs are read as they were left."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from dev import scaling_analysis
from dev.scaling_analysis import analyse, best_size
from nanochat.common import NanochatError


def _rows(budget: float, best: float) -> list[dict]:
    """Runs whose bits per byte have their least value at a size, and whose tokens fall as FLOPs / size."""
    rows = []
    for size in (best * factor for factor in (0.4, 0.9, 1.5, 4.0)):
        bpb = 1 + 0.1 * math.log(size / best) ** 2
        rows.append({"budget": budget, "size": size, "tokens": budget / size, "bpb": bpb})
    return rows


def test_the_bottom_of_a_parabola_is_found() -> None:
    assert best_size(_rows(1e13, 3e6)) == pytest.approx(3e6)
    optima = analyse(_rows(1e13, 3e6) + _rows(4e13, 6e6))
    assert [optimum["size"] for optimum in optima] == pytest.approx([3e6, 6e6])
    assert [optimum["tokens"] for optimum in optima] == pytest.approx([1e13 / 3e6, 4e13 / 6e6])
    falling = [{**row, "bpb": 2 - row["bpb"]} for row in _rows(1e13, 3e6)]
    assert best_size(falling) is None


def test_two_sizes_have_no_best_one() -> None:
    """However often each was trained."""
    rows = _rows(1e13, 3e6)
    assert analyse([rows[0], rows[0], rows[2], rows[2]]) == []


def test_a_run_that_diverged_counts_by_what_it_was_before(tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    metrics = tiny_run / "base" / "metrics.jsonl"
    rows = [json.dumps({"step": step, "train/flops": 1e9, "val/bpb": bpb}) + "\n" for step, bpb in ((3, 2.5), (6, None))]
    metrics.write_text("".join(rows), encoding="utf-8")
    assert scaling_analysis.main(["--runs=tiny"]) == 0
    assert "2.5000" in capsys.readouterr().out
    metrics.write_text(rows[1], encoding="utf-8")
    with pytest.raises(NanochatError, match="no run 'tiny'"):
        scaling_analysis.main(["--runs=tiny"])


def test_a_run_that_is_not_finished_is_left_out(tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    """Its newest result does not belong to the tokens that were planned."""
    shutil.copytree(tiny_run, tiny_run.parent / "tiny-2")
    metrics = tiny_run / "base" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    early = [row for row in rows if row["step"] < max(row["step"] for row in rows)]
    early.append({**early[-1], "val/bpb": 2.5})
    metrics.write_text("".join(json.dumps(row) + "\n" for row in early), encoding="utf-8")
    assert scaling_analysis.main(["--runs=tiny*"]) == 0
    assert f"left out: tiny, unfinished, was measured up to step {early[-1]['step']} of " in capsys.readouterr().out
    with open(tiny_run.parent / "scaling.csv", encoding="utf-8") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["tiny-2"]


def test_runs_are_read_as_they_were_left(tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(tiny_run, tiny_run.parent / "tiny-2")
    (tiny_run.parent / "unfinished" / "base").mkdir(parents=True)
    assert scaling_analysis.main(["--runs=*"]) == 0
    assert capsys.readouterr().out.count("tiny") >= 2
    with open(tiny_run.parent / "scaling.csv", encoding="utf-8") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["tiny", "tiny-2"]
    assert (tiny_run.parent / "scaling.png").stat().st_size > 1000
    (tiny_run / "mine.toml").write_text('runs = "none-*"', encoding="utf-8")
    with pytest.raises(NanochatError, match=r"no run 'none-\*' .* runs/miniseries\.sh"):
        scaling_analysis.main([f"--config={tiny_run / 'mine.toml'}"])

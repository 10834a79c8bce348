"""What the runs page is given of runs whose files were damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from nanochat.openai_api import RequestError
from nanochat.runs_api import add_run_routes


@pytest.fixture
def client(tiny_run: Path) -> TestClient:
    app = FastAPI()
    add_run_routes(app)
    return TestClient(app)


def test_lines_that_are_no_rows_do_not_hide_a_run(client: TestClient, tiny_run: Path) -> None:
    lines = ["7", '{"step": 7, "val/bpb": 1.5}']
    with open(tiny_run / "base" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    assert client.get("/api/runs/tiny").json()["stages"]["base"]["step"] == 7


@pytest.mark.parametrize("name", ["eval.json", "settings.json"])
@pytest.mark.parametrize("damage", ["", "[]"])
def test_a_damaged_file_is_named(client: TestClient, tiny_run: Path, name: str, damage: str) -> None:
    (tiny_run / "base" / name).write_text(damage, encoding="utf-8")
    with pytest.raises(RequestError, match=f"{name} cannot be read .*: restore or remove it") as raised:
        client.get("/api/runs/tiny")
    assert raised.value.status == 500


def test_a_new_number_has_a_curve(client: TestClient, tiny_run: Path) -> None:
    """In the order of reports; totals and times have none."""
    with open(tiny_run / "base" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "time_s": 1.0, "val/pass@8": 0.5, "train/norm": 3.0, "own": 0}\n')
    curves = client.get("/api/runs/tiny").json()["stages"]["base"]["curves"]
    assert [curve["name"] for curve in curves] == [
        "train/loss", "val/bpb", "val/pass@8", "train/tok_per_s", "train/mfu", "train/lrm", "train/peak_memory_mb",
        "own", "train/norm",
    ]  # fmt: skip
    titles = {curve["name"]: curve["title"] for curve in curves}
    assert titles["val/pass@8"] == "held-out problems solved, pass@8" and titles["train/norm"] == "train/norm"


def test_only_runs_that_can_be_asked_for_are_listed(client: TestClient, tiny_run: Path) -> None:
    shutil.copytree(tiny_run, tiny_run.with_name("tiny - Copy"))
    assert [run["tag"] for run in client.get("/api/runs").json()] == ["tiny"]

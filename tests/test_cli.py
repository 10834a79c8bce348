"""`nanochat NAME` is the module of the table, and nothing else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import cli, memory
from nanochat.common import run_command, seconds_since_start


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("flags", [[], ["--help"], ["-h"]])
def test_the_list_has_a_line_for_each_command_and_loads_none(
    flags: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["nanochat", *flags])
    assert cli.main() == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, what) in cli.COMMANDS.items():
        assert sum(line.split()[:1] == [name] and line.endswith(what) for line in lines) == 1
    code = "import sys, nanochat.cli\nnanochat.cli.overview()\nprint('torch' in sys.modules)"
    assert run("-c", code).stdout == "False\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("trian", "train"), ("servr", "serve"), ("base_train", "train"), ("chat_web", "serve"), ("zzz", "nanochat --help")],
)
def test_an_unknown_command_names_the_nearest(
    name: str, hint: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["nanochat", name])
    assert cli.main() == 2
    said = capsys.readouterr().err
    assert repr(name) in said and hint in said and said.count("\n") == 1


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nanochat", "--version"])
    assert cli.main() == 0
    assert capsys.readouterr().out == f"nanochat {importlib.metadata.version('nanochat')}\n"


def test_each_module_of_the_table_exists_and_has_a_main() -> None:
    for module in {module for module, _ in cli.COMMANDS.values()}:
        assert "\ndef main(argv" in Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")


def test_a_command_runs_as_its_module_does(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    flags = ["--gb", "2", "--max-seq-len=256", "--vocab-size=512"]
    for program, main in (("nanochat", cli.main), ("memory.py", lambda: run_command(memory.main))):
        monkeypatch.setattr("nanochat.common._is_command", False)
        monkeypatch.setattr(sys, "argv", [program, *["memory"] * (program == "nanochat"), *flags])
        said.append((main(), capsys.readouterr()))
        assert seconds_since_start() > 0  # --target-minutes counts from the command
    assert said[0] == said[1]
    assert "2 GB" in said[0][1].out


def test_help_and_errors_call_a_command_by_the_name_it_was_called_by() -> None:
    result = run("-m", "nanochat.cli", "memory", "--gbb")
    assert result.returncode == 2
    assert result.stderr == "error: there is no '--gbb' here; did you mean --gb? (nanochat memory --help lists the flags)\n"

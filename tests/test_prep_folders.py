"""Where data_prep reads and writes: no command disturbs another, and none reads what it is not meant to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.prep_output import Layout, lock_output
from nanochat.tokenizer import Tokenizer
from tests.helpers import make_document

pytest.importorskip("datatrove", reason="data preparation needs bash runs/setup.sh data")


def _write(path: Path, seeds: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": make_document(seed)}) + "\n" for seed in seeds), encoding="utf-8")


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_refused_command_writes_nothing(tmp_path: Path, tokenizer: Tokenizer, executor: str) -> None:
    """Neither its settings nor its tokenizer take the place of those of the command at work."""
    output, raw = tmp_path / "out", tmp_path / "raw"
    _write(raw / "a.jsonl", range(20))
    own = tokenizer.save(tmp_path / "tokenizer").parent
    flags = ["--input", str(raw), "--output", str(output), "--tokenizer", str(own), "--executor", executor, "--partition=cpu"]
    with lock_output(Layout(output)):
        refused = subprocess.run(
            [sys.executable, "-m", "scripts.data_prep", *flags], capture_output=True, text=True, timeout=60
        )
    assert refused.returncode == 1 and "is being prepared by process" in refused.stderr
    assert [path.name for path in output.iterdir()] == ["work"]

"""Where data_prep reads and writes: no command disturbs another, and none reads what it is not meant to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import NanochatError
from nanochat.prep_output import Layout, lock_output
from nanochat.tokenizer import Tokenizer
from scripts import data_prep
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
    flags = ["--input", str(raw), "--output", str(output), "--tokenizer", str(own), "--executor", executor]
    flags += ["--partition=cpu"] if executor == "slurm" else []
    with lock_output(Layout(output)):
        refused = subprocess.run(
            [sys.executable, "-m", "scripts.data_prep", *flags], capture_output=True, text=True, timeout=60
        )
    assert refused.returncode == 1 and "is being prepared by process" in refused.stderr
    assert [path.name for path in output.iterdir()] == ["work"]


@pytest.mark.parametrize("address", ["{raw}/**/*.parquet", "file://{raw}", "{raw}/*/*", "{raw}/p*/shard*"])
def test_an_output_that_the_input_would_find_is_refused(tmp_path: Path, address: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    pq.write_table(pa.table({"text": [make_document(seed) for seed in range(20)]}), raw / "a.parquet")
    (raw / "part").mkdir()
    (raw / "a.parquet").rename(raw / "part" / "shard.parquet")
    with pytest.raises(NanochatError, match=r"overlap: choose another folder"):
        data_prep.main(["--input", address.format(raw=raw), "--output", str(raw / "prep"), "--no-tokenize"])
    assert not (raw / "prep").exists()


@pytest.mark.parametrize("address", ["{raw}/*.jsonl", "file://{raw}/a.jsonl", "{raw}/**/*.jsonl"])
def test_an_output_that_the_input_would_not_find_may_lie_below(tmp_path: Path, address: str) -> None:
    raw = tmp_path / "raw"
    _write(raw / "a.jsonl", range(20))
    for _ in range(2):  # and is complete
        flags = ["--input", address.format(raw=raw), "--output", str(raw / "prep"), "--no-tokenize", "--workers=1"]
        assert data_prep.main(flags) == 0
    assert (raw / "prep" / "manifest.json").exists()


def test_an_output_begun_where_the_input_finds_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an earlier version allowed: killed among its shards, it would find them as other input files."""
    raw = tmp_path / "raw"
    raw.mkdir()
    pq.write_table(pa.table({"text": [make_document(seed) for seed in range(20)]}), raw / "a.parquet")
    flags = ["--input", f"{raw}/**/*.parquet", "--output", str(raw / "prep"), "--no-tokenize", "--workers=1"]
    with monkeypatch.context() as patch:
        patch.setattr(data_prep, "finds_below", lambda *_: False)
        assert data_prep.main(flags) == 0
    for name in ("manifest.json", "work/log/manifest/completions/00000"):
        (raw / "prep" / name).unlink()
    assert data_prep.main(flags) == 0

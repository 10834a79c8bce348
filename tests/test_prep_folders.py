"""Where data_prep reads and writes: no command disturbs another, and none reads what it is not meant to."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import NanochatError
from nanochat.dataset import get_source
from nanochat.prep_input import read_texts
from nanochat.prep_output import OutputLayout, PrepSettings, lock_output
from nanochat.tokenizer import Tokenizer
from scripts import data_prep
from tests.helpers import make_document, write_documents

pytest.importorskip("datatrove", reason="data preparation needs bash runs/setup.sh data")

from nanochat.prep_steps import ChooseValidation


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_refused_command_writes_nothing(tmp_path: Path, tokenizer: Tokenizer, executor: str) -> None:
    """Neither its settings nor its tokenizer take the place of those of the command at work."""
    output, raw = tmp_path / "out", tmp_path / "raw"
    write_documents(raw / "a.jsonl", map(make_document, range(20)))
    own = tokenizer.save(tmp_path / "tokenizer").parent
    flags = ["--input", str(raw), "--output", str(output), "--tokenizer", str(own), "--executor", executor]
    flags += ["--partition=cpu"] if executor == "slurm" else []
    with lock_output(OutputLayout(output)):
        refused = subprocess.run(
            [sys.executable, "-m", "scripts.data_prep", *flags], capture_output=True, text=True, timeout=60
        )
    assert refused.returncode == 1 and "is being prepared by process" in refused.stderr
    assert [path.name for path in output.iterdir()] == ["work"]


@pytest.mark.parametrize("address", ["{raw}/**/*.parquet", "file://{raw}", "{raw}/*/*", "{raw}/p*/shard*"])
def test_an_output_that_the_input_would_find_is_refused(tmp_path: Path, address: str) -> None:
    raw = tmp_path / "raw"
    write_documents(raw / "part" / "shard.parquet", map(make_document, range(20)))
    with pytest.raises(NanochatError, match=r"overlap: choose another folder"):
        data_prep.main(["--input", address.format(raw=raw), "--output", str(raw / "prep"), "--no-tokenize"])
    assert not (raw / "prep").exists()


@pytest.mark.parametrize("address", ["{raw}/*.jsonl", "file://{raw}/a.jsonl", "{raw}/**/*.jsonl"])
def test_an_output_that_the_input_would_not_find_may_lie_below(tmp_path: Path, address: str) -> None:
    raw = tmp_path / "raw"
    write_documents(raw / "a.jsonl", map(make_document, range(20)))
    for _ in range(2):  # and is complete
        flags = ["--input", address.format(raw=raw), "--output", str(raw / "prep"), "--no-tokenize", "--workers=1"]
        assert data_prep.main(flags) == 0
    assert (raw / "prep" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("settings.json", '{"editor": 1}'), ("settings.json", "{"), ("manifest.json", "{}"), ("thesis.tex", "all of it")],
)
def test_files_of_another_origin_are_left_alone(tmp_path: Path, name: str, content: str) -> None:
    write_documents(tmp_path / "raw" / "a.jsonl", map(make_document, range(20)))
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text(content)
    with pytest.raises(NanochatError, match=r"of another origin: choose an empty folder|cannot be read .*: restore or remove"):
        data_prep.main(["--input", str(tmp_path / "raw"), "--output", str(output), "--no-tokenize"])
    assert [path.read_text() for path in output.iterdir()] == [content]


def test_too_few_documents_for_two_splits(tmp_path: Path) -> None:
    write_documents(tmp_path / "raw" / "a.jsonl", map(make_document, range(1)))
    flags = ["--input", str(tmp_path / "raw"), "--output", str(tmp_path / "out"), "--no-tokenize", "--workers=1"]
    with pytest.raises(NanochatError, match="leaves none to train on: give more text"):
        data_prep.main(flags)


def test_what_a_killed_task_left_does_not_move_the_split(tmp_path: Path) -> None:
    def limit(output: Path, leftover: bytes) -> str:
        layout = OutputLayout(output)
        for folder in (layout.lowest, layout.val_limit.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (layout.lowest / "00000").write_bytes(bytes(range(64)))
        (layout.lowest / ".00000.1.tmp").write_bytes(leftover)
        ChooseValidation(PrepSettings("x", {}, None, None, 0, 2, 1, 1, True, False, 1), layout).run()
        return layout.val_limit.read_text()

    assert limit(tmp_path / "a", b"\0" * 5) == limit(tmp_path / "b", b"\xff" * 5) == bytes(range(16, 32)).hex()


@pytest.mark.parametrize("path", ["data/a.jsonl.gz", "https://host/a.jsonl.gz?download=true"])
def test_the_query_of_a_web_address_does_not_hide_the_kind(path: str) -> None:
    lines = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')
    assert list(read_texts(io.BytesIO(lines), path, None)) == ["one", "two"]


def test_training_passes_over_what_a_preparation_left_beside_its_shards(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_documents(tmp_path / "raw" / "a.jsonl", map(make_document, range(20)))
    flags = ["--input", str(tmp_path / "raw"), "--output", str(tmp_path / "data" / "out"), "--no-tokenize", "--workers=1"]
    assert data_prep.main(flags) == 0
    (tmp_path / "data" / "out" / "mine.csv").touch()
    for address in (tmp_path / "data", tmp_path / "data" / "out"):
        capsys.readouterr()
        get_source(str(address))
        name = (tmp_path / "data" / "out" / "mine.csv").relative_to(address)
        assert capsys.readouterr().out.startswith(f"not read, being of another kind: {name}; ")

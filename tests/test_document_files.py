"""What of a folder is text to learn from, and how plain text becomes documents."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import random
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import hub_shards
from nanochat.common import NanochatError
from nanochat.dataset import get_source
from nanochat.document_files import READERS, Batches, DocumentFile
from nanochat.prep_input import estimate_tokens, list_inputs, read_texts
from nanochat.tokenizer import Tokenizer
from tests.helpers import DOCUMENTS, write_documents


def test_text_files_become_documents(tmp_path: Path) -> None:
    write_documents(tmp_path / "book.txt", DOCUMENTS)
    source = get_source(str(tmp_path / "book.txt"))
    documents = [*source.documents("train"), *source.documents("val")]
    assert 5 < len(documents) < 100
    assert sum(len(d.split()) for d in documents) == sum(len(d.split()) for d in DOCUMENTS)


@pytest.mark.parametrize(
    "text", ["a name\n" * 30_000, "words of one line " * 9000, "字" * 90_000], ids=["lines", "words", "none"]
)
def test_text_without_blank_lines_becomes_documents(tmp_path: Path, text: str) -> None:
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    source = get_source(str(tmp_path / "book.txt"))
    documents = [text for _, text in sorted([*source.numbered("train"), *source.numbered("val")])]
    assert {len(d) for d in documents[:-1]} <= set(range(15_900, 16_100))
    whole = next(DocumentFile(tmp_path / "book.txt").batches())[1]
    assert "".join(whole) == text
    assert all(d.endswith(("\n", " ", "字")) for d in whole[:-1])


def test_what_is_hidden_is_no_text(tmp_path: Path) -> None:
    """macOS writes ._a.jsonl beside a.jsonl on foreign disks, and notebooks keep copies."""
    for name in ("a.jsonl", "b.jsonl", ".venv/lib/c.jsonl"):
        write_documents(tmp_path / ".mine" / name, DOCUMENTS)
    (tmp_path / ".mine" / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07\xff")
    (tmp_path / ".mine" / "linked").symlink_to(tmp_path / ".mine" / ".venv")  # by a name that says it is meant
    assert "linked/lib/c.jsonl" in get_source(str(tmp_path / ".mine")).describe()["files"]
    (tmp_path / ".mine" / "linked").unlink()
    remote = f"memory://{tmp_path.name}/.mine"
    for address in (str(tmp_path / ".mine"), remote, f"{remote}/**/*.jsonl"):
        if "memory" in address:
            filesystem = fsspec.filesystem("memory")
            for path in (tmp_path / ".mine").rglob("*.jsonl"):
                filesystem.pipe(f"/{path.relative_to(tmp_path.parent)}", path.read_bytes())
        assert [Path(name).name for name in get_source(address).describe()["files"]] == ["a.jsonl", "b.jsonl"]
        assert [Path(name).name for name in list_inputs(address)] == ["a.jsonl", "b.jsonl"]
    assert [Path(name).name for name in list_inputs(f"{remote}/.venv/*/*.jsonl")] == ["c.jsonl"]


@pytest.mark.parametrize("remote", [False, True])
def test_folders_may_be_named_for_splits(tmp_path: Path, remote: bool, capsys: pytest.CaptureFixture) -> None:
    """But not those in which the data set itself lies."""
    root, address = tmp_path / "test" / "val", str(tmp_path / "test" / "val")
    for split in ("train", "validation", "test"):
        write_documents(root / split / "part-0.jsonl", DOCUMENTS)
    if remote:
        address = f"memory://{tmp_path.name}/test/val"
        for path in root.rglob("*.jsonl"):
            fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    for found in (address, f"{address}/**/*.jsonl"):
        source = get_source(found)
        assert [Path(file.name).parent.name for file in source.train_files] == ["train"]
        assert [Path(file.name).parent.name for file in source.val_files] == ["validation"]
    assert [Path(path).parent.name for path in list_inputs(address)] == ["train"]
    said = capsys.readouterr().out
    assert "not read, as no text to learn from: test/part-0.jsonl" in said
    assert "left out, as named for validation: validation/part-0.jsonl; the shards hold out text of the other files" in said
    assert [Path(path).parent.name for path in list_inputs(f"{address}/validation")] == ["validation"]


def test_a_file_is_read_once_and_what_is_not_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_documents(tmp_path / "part-1.jsonl", DOCUMENTS)
    (tmp_path / "latest.jsonl").symlink_to("part-1.jsonl")
    (tmp_path / "part-2.jsonl.gz").write_bytes(b"x")
    assert [file.name for file in get_source(str(tmp_path)).train_files] == ["part-1.jsonl"]
    assert "not read: part-2.jsonl.gz; scripts.data_prep makes what training reads of it" in capsys.readouterr().out


@pytest.mark.parametrize("read", [get_source, list_inputs])
def test_text_in_other_forms_is_named(read: Callable[[str], object], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a.jsonl", "b.json", "c.jsonl.bz2", "d.csv", "dataset_infos.json", "picture.png"):
        write_documents(tmp_path / "some" / name, DOCUMENTS)
    read(str(tmp_path / "some"))
    assert "not read, being of another kind: b.json, c.jsonl.bz2, d.csv; convert to .jsonl" in capsys.readouterr().out
    (tmp_path / "some" / "e.jsonl").touch()
    with pytest.raises(NanochatError, match=r"e\.jsonl is empty: remove it or fill it"):
        read(str(tmp_path / "some"))


def test_a_new_kind_of_file_is_read_wherever_text_is(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With the one reader that was added, by training and by data_prep; a --text-column is nothing that it knows."""

    def read_csv(file: BinaryIO, address: str, start: int) -> Batches:
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
        yield start, [text for _, text in csv.reader(lines)][start:]
        lines.detach()

    monkeypatch.setitem(READERS, ".csv", read_csv)
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as written:
        csv.writer(written).writerows(enumerate(DOCUMENTS))
    (tmp_path / "b.tsv").touch()
    (file,) = get_source(str(tmp_path)).train_files
    assert [text for _, texts in file.batches(3) for text in texts] == DOCUMENTS[3:]
    inputs = list_inputs(str(tmp_path))
    assert capsys.readouterr().out.count("another kind: b.tsv; ") == 2
    (path,) = inputs
    with open(path, "rb") as opened:
        assert list(read_texts(opened, path, None)) == DOCUMENTS
    with open(path, "rb") as opened, pytest.raises(NanochatError, match="leave it out"):
        list(read_texts(opened, path, "text"))
    tokens = sum(map(len, tokenizer.encode(DOCUMENTS)))
    for sample_bytes in (1000, 10**9):
        assert estimate_tokens(str(tmp_path), inputs, None, tokenizer, sample_bytes) == pytest.approx(tokens, rel=0.1)


def test_what_only_data_prep_reads_is_sent_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"x")
    with pytest.raises(NanochatError, match=r"holds no .*, but a\.jsonl\.gz; scripts\.data_prep makes what training reads"):
        get_source(str(tmp_path))


@pytest.mark.parametrize("read", [get_source, list_inputs])
def test_the_name_of_a_data_set_of_the_hub_is_recognized(read: Callable[[str], object]) -> None:
    with pytest.raises(NanochatError, match=r"given as hf://datasets/HuggingFaceFW/fineweb-edu/\*\*/\*\.parquet"):
        read("HuggingFaceFW/fineweb-edu")
    with pytest.raises(NanochatError) as error:
        read("/no/such/folder")
    assert "hub" not in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_colons_in_a_local_path_are_part_of_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """In a remote address they chain file systems."""
    write_documents(tmp_path / "we::ird" / "a.jsonl", DOCUMENTS)
    address = str(tmp_path / "we::ird")
    assert estimate_tokens(address, list_inputs(address), None, tokenizer) > 100


def test_an_archive_of_the_same_size_is_another(tmp_path: Path) -> None:
    def read(text: str) -> str:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("a.jsonl", json.dumps({"text": text}))
        return next(iter(get_source(f"zip://a.jsonl::{tmp_path / 'a.zip'}").train_files[0].batches()))[1][0]

    assert [read("old"), read("new")] == ["old", "new"]


def test_what_lies_beside_a_data_set_is_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "test-00000-of-00001"):
        write_documents(tmp_path / f"{name}.parquet", DOCUMENTS)
    (tmp_path / "README.md").write_text("# A data set", encoding="utf-8")
    source = get_source(str(tmp_path))
    assert [file.name[:5] for file in source.train_files] == ["train"] * 2 and len(source.val_files) == 1
    said = capsys.readouterr().out
    assert "README.md" in said and "test-00000-of-00001.parquet" in said
    assert [Path(path).name[:5] for path in list_inputs(str(tmp_path))] == ["train", "train"]
    write_documents(tmp_path / "both" / "train_test_split.jsonl", DOCUMENTS)
    assert len(get_source(str(tmp_path / "both")).train_files) == 1
    capsys.readouterr()
    notes = tmp_path / "notes"
    for name in ("README.md", "how to test.md", "test.txt"):
        write_documents(notes / name, DOCUMENTS)
    assert len(get_source(str(notes)).train_files) == 3  # these are texts of one's own
    assert not capsys.readouterr().out


def test_a_truncated_shard_is_noticed_before_training(tmp_path: Path) -> None:
    names = ("shard_00000.parquet", "shard_00001.parquet", "shard_val.parquet")
    for name in names:
        write_documents(tmp_path / name, DOCUMENTS)
    shards = {name: {"bytes": (tmp_path / name).stat().st_size} for name in names}
    (tmp_path / "settings.json").write_text(json.dumps({"num_shards": 2, "shard_tokens": 100}))
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    assert len(get_source(str(tmp_path)).train_files) == 2
    os.truncate(tmp_path / names[1], 1000)
    with pytest.raises(
        NanochatError, match=r"shard_00001.parquet has 1000 bytes, and had \d+ when scripts.data_prep wrote it"
    ):
        get_source(str(tmp_path))


@pytest.mark.parametrize("read", [get_source, list_inputs])
def test_what_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], object], capsys: pytest.CaptureFixture
) -> None:
    """A user may not enter a folder; a disk that links lead to is not there. A glob goes past, and says so."""
    write_documents(tmp_path / "a.jsonl", DOCUMENTS)
    write_documents(tmp_path / "closed" / "b.jsonl", DOCUMENTS)
    (tmp_path / "notes").symlink_to("nowhere")  # would not be read
    read(str(tmp_path))
    for address in (tmp_path, tmp_path / "*.jsonl", tmp_path / "c.jsonl"):
        (tmp_path / "c.jsonl").symlink_to("gone.jsonl")
        with pytest.raises(NanochatError, match=r"c.jsonl links to gone.jsonl, which is not there: restore it, or remove"):
            read(str(address))
        (tmp_path / "c.jsonl").unlink()
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry]:  # as for a user other than root
        if str(path).rstrip("/").endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(NanochatError, match=r"closed cannot be read \(Permission denied\): let it be read, or move it away"):
        read(str(tmp_path))
    assert "may not enter" not in capsys.readouterr().out
    for pattern in ("**/*.jsonl", "*/*.jsonl", "**"):
        (tmp_path / "open").mkdir(exist_ok=True)
        write_documents(tmp_path / "open" / "c.jsonl", DOCUMENTS)
        read(str(tmp_path / pattern))
        assert f"not read, as this user may not enter them: {tmp_path / 'closed'}\n" in capsys.readouterr().out
    read(str(tmp_path / "*.jsonl"))
    assert "may not enter" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_how_much_text_there_is_is_known(tmp_path: Path, tokenizer: Tokenizer, suffix: str) -> None:
    write_documents(tmp_path / f"a{suffix}", DOCUMENTS)
    source = get_source(str(tmp_path))
    tokens = sum(len(tokenizer.encode(text)) for _, text in source.numbered("train"))
    assert source.holds(0.8 * tokens, tokenizer)
    assert not source.holds(1.5 * tokens, tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_shards_are_planned_from_a_part_of_the_input(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdefghij klmnop ", k=2000)) for _ in range(1000)]
    if name == "a.parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=100)
    else:
        lines = [text + "\n\n" if name == "a.txt" else json.dumps({"text": text}) + "\n" for text in texts]
        with pa.output_stream(str(tmp_path / name), compression="detect") as stream:
            stream.write("".join(lines).encode())
    truth = sum(map(len, tokenizer.encode(texts)))
    inputs = list_inputs(str(tmp_path))
    for sample_bytes in (1_000_000, 10**9):
        assert estimate_tokens(str(tmp_path), inputs, None, tokenizer, sample_bytes) == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize(
    "row", ['{"messages": []}', '{"conversations": [{"from": "human", "value": "Hi"}]}', '[{"role": "user"}]']
)
def test_conversations_are_sent_to_fine_tuning(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(row, encoding="utf-8")
    with pytest.raises(NanochatError, match=r"a\.jsonl, line 1, .*: conversations go to chat_sft --tasks FILE"):
        list(get_source(str(tmp_path / "a.jsonl")).documents("train"))


def test_a_download_without_a_network_soon_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of thousands of shards; one that fails now and then does not end it."""
    tried: list[str] = []

    def fail(repository: object, name: str, directory: Path) -> str | None:
        tried.append(name)
        time.sleep(0.02)
        return None if name.endswith("05.parquet") else f"{name}: no network"

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(hub_shards, "_download_one", fail)
    with pytest.raises(NanochatError, match=r"8 shards of climbmix in a row .*first: shard_00006.*: check the network"):
        hub_shards.download("climbmix", -1, workers=2)
    assert len(tried) < 3000

"""Sources: splits, files of every kind, bad files, downloads."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import builtin_corpus, dataset, hub_shards
from nanochat.builtin_corpus import clean, first_sentence
from nanochat.common import NanochatError, get_base_dir
from nanochat.dataset import get_source
from nanochat.hub_shards import HubRepository
from nanochat.prep_input import list_inputs
from tests.helpers import DOCUMENTS, write_documents
from tests.hub_server import HubServer, ask_hub, serve_folder


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_file_named_for_validation_is_the_validation_split(tmp_path: Path, suffix: str) -> None:
    write_documents(tmp_path / f"a{suffix}", DOCUMENTS[:50])
    write_documents(tmp_path / f"b{suffix}", DOCUMENTS[50:90])
    write_documents(tmp_path / f"shard_val{suffix}", DOCUMENTS[90:])
    source = get_source(str(tmp_path))
    assert list(source.documents("train")) == DOCUMENTS[:90]
    assert list(source.documents("val")) == DOCUMENTS[90:]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("x", "y/deep"):
        write_documents(tmp_path / folder / "a.jsonl", DOCUMENTS)
    write_documents(tmp_path / "y" / "b.jsonl", DOCUMENTS)
    for path in (tmp_path, tmp_path / "**" / "*.jsonl"):
        assert list(get_source(str(path)).describe()["files"]) == ["x/a.jsonl", "y/b.jsonl", "y/deep/a.jsonl"]


def test_what_is_linked_is_read_and_what_is_there_is_no_glob(tmp_path: Path) -> None:
    far, folder = tmp_path / "far", tmp_path / "data [v2]"
    write_documents(far / "deep" / "a.jsonl", DOCUMENTS)
    write_documents(far / "b.jsonl", DOCUMENTS)
    folder.mkdir()
    (folder / "b [1].jsonl").symlink_to(far / "b.jsonl")
    (folder / "linked").symlink_to(far / "deep")
    (folder / "newest").symlink_to(folder / "linked")
    (far / "deep" / "circle").symlink_to(folder)
    assert list(get_source(str(folder)).describe()["files"]) == ["b [1].jsonl", "linked/a.jsonl"]
    assert list(list_inputs(str(folder))) == [str(folder / "b [1].jsonl"), str(folder / "linked" / "a.jsonl")]
    assert list(get_source(str(folder / "b [1].jsonl")).describe()["files"]) == ["b [1].jsonl"]


@pytest.mark.parametrize("value", ['{"en": "Hi"}', '["a"]', "false", "3"])
def test_what_is_no_text_is_not_trained_on(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n{"text": ' + value + "}\n", encoding="utf-8")
    with pytest.raises(NanochatError, match=r"a\.jsonl, line 3, holds no text in text"):
        list(get_source(str(tmp_path)).documents("train"))


def test_without_one_a_hash_splits_and_nothing_is_in_both(tmp_path: Path) -> None:
    write_documents(tmp_path / "all.jsonl", DOCUMENTS)
    source = get_source(str(tmp_path / "*.jsonl"))
    train, val = list(source.documents("train")), list(source.documents("val"))
    assert val
    assert sorted(train + val) == sorted(DOCUMENTS)
    assert not set(train) & set(val)
    write_documents(tmp_path / "all.jsonl", DOCUMENTS[::-1])  # the order of the file does not matter
    assert set(get_source(str(tmp_path)).documents("val")) == set(val)


def test_a_mark_at_the_beginning_of_a_file_is_no_text(tmp_path: Path) -> None:
    """As Windows' editors and old books have one."""
    for name, content in (("a.txt", "one text"), ("b.jsonl", json.dumps({"text": "another"}))):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    found = {*get_source(str(tmp_path)).documents("train"), *get_source(str(tmp_path)).documents("val")}
    assert found == {"one text", "another"}


FINGERPRINT = "0123abcd"
TOKENS = [np.arange(i % 7, dtype=np.int32) * 1000 + i for i in range(100)]  # every seventh is empty


def _write_tokens(path: Path, documents: list[np.ndarray], kind: pa.DataType, fingerprint: str | None = FINGERPRINT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"nanochat.tokenizer": fingerprint} if fingerprint else None
    schema = pa.schema([("tokens", kind)], metadata=metadata)
    column = pa.array([d.tolist() for d in documents], kind)
    pq.write_table(pa.table({"tokens": column}, schema=schema), path, row_group_size=7)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("by_hash", [True, False])
def test_numbers_do_not_depend_on_where_reading_begins(tmp_path: Path, suffix: str, by_hash: bool) -> None:
    with_blanks = [" \n" if i % 9 == 0 else d for i, d in enumerate(DOCUMENTS)]
    for i in range(4):
        write_documents(tmp_path / f"a{i}{suffix}", with_blanks[i * 25 : i * 25 + 25])
    if not by_hash:
        write_documents(tmp_path / f"val{suffix}", DOCUMENTS[:3])
    source = get_source(str(tmp_path))
    everything = list(source.numbered("train"))
    assert all(text == with_blanks[number] and text.strip() for number, text in everything)
    if by_hash:
        everything = sorted(everything + list(source.numbered("val")))
    assert [number for number, _ in everything] == [i for i in range(100) if i % 9]
    for start in range(0, 102, 3):
        for split in ("train", "val"):
            expected = [pair for pair in source.numbered(split) if pair[0] >= start]
            assert list(get_source(str(tmp_path)).numbered(split, start)) == expected


def test_numbers_of_a_text_file(tmp_path: Path) -> None:
    write_documents(tmp_path / "book.txt", DOCUMENTS)
    write_documents(tmp_path / "val.txt", DOCUMENTS[:1])
    source = get_source(str(tmp_path))
    everything = list(source.numbered("train"))
    assert list(source.numbered("train", 3)) == everything[3:]


def test_what_comes_before_is_not_read(tmp_path: Path) -> None:
    """A damaged row group before the start is passed over, as is a whole damaged file with a good footer."""
    for name in ("a", "b"):
        write_documents(tmp_path / f"{name}.parquet", DOCUMENTS[:50])
    write_documents(tmp_path / "val.parquet", DOCUMENTS[:3])
    for name, groups in (("a", 8), ("b", 2)):
        path = tmp_path / f"{name}.parquet"
        data = bytearray(path.read_bytes())
        end = pq.read_metadata(path).row_group(groups - 1).column(0)
        end = end.dictionary_page_offset or end.data_page_offset
        data[4:end] = bytes(end - 4)
        path.write_bytes(data)
    source = get_source(str(tmp_path))
    assert [number for number, _ in source.numbered("train", 64)] == list(range(64, 100))
    with pytest.raises(NanochatError, match=r"a\.parquet cannot be read"):
        list(source.numbered("train"))


@pytest.mark.parametrize("kind", [pa.list_(pa.uint16()), pa.list_(pa.int32()), pa.large_list(pa.uint32())])
@pytest.mark.parametrize("by_hash", [True, False])
def test_tokens(tmp_path: Path, kind: pa.DataType, by_hash: bool) -> None:
    _write_tokens(tmp_path / "a.parquet", TOKENS[:60], kind)
    _write_tokens(tmp_path / "b.parquet", TOKENS[60:], kind)
    if not by_hash:
        _write_tokens(tmp_path / "val.parquet", TOKENS[:3], kind)
    source = get_source(str(tmp_path))
    assert source.tokenizer_fingerprint == FINGERPRINT
    for start in (0, 5, 13, 60, 61, 99):
        found = list(source.numbered("train", start)) + (list(source.numbered("val", start)) if by_hash else [])
        assert sorted(number for number, _ in found) == [i for i in range(start, 100) if i % 7]
        for number, ids in found:
            assert ids.dtype == np.int32
            assert np.array_equal(ids, TOKENS[number])
    with pytest.raises(NanochatError, match="hold tokens, and this command needs text"):
        next(source.documents("train"))


def test_kinds_are_not_mixed(tmp_path: Path) -> None:
    kind = pa.list_(pa.uint16())
    write_documents(tmp_path / "texts" / "a.jsonl", DOCUMENTS)
    assert get_source(str(tmp_path / "texts")).tokenizer_fingerprint is None
    _write_tokens(tmp_path / "texts" / "val.parquet", TOKENS, kind)
    with pytest.raises(NanochatError, match=r"val\.parquet holds tokens .* holds texts"):
        _ = get_source(str(tmp_path / "texts")).tokenizer_fingerprint
    _write_tokens(tmp_path / "two" / "a.parquet", TOKENS, kind)
    _write_tokens(tmp_path / "two" / "b.parquet", TOKENS, kind, "another")
    _write_tokens(tmp_path / "two" / "val.parquet", TOKENS, kind)
    with pytest.raises(NanochatError, match=r"b\.parquet holds tokens of the tokenizer another"):
        list(get_source(str(tmp_path / "two")).numbered("train"))
    _write_tokens(tmp_path / "c.parquet", TOKENS, kind, None)
    with pytest.raises(NanochatError, match=r"which tokenizer.*nanochat\.tokenizer.*scripts\.data_prep"):
        _ = get_source(str(tmp_path / "c.parquet")).tokenizer_fingerprint


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_shard_that_vanishes_or_shrinks_is_named(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b", "val"):
        write_documents(tmp_path / f"{name}{suffix}", DOCUMENTS[:20])
    path = tmp_path / f"b{suffix}"
    whole = path.read_bytes()
    source = get_source(str(tmp_path))
    reading = source.numbered("train")
    assert next(reading)[0] == 0
    path.unlink()
    with pytest.raises(NanochatError, match=rf"b\{suffix} is gone"):
        list(reading)
    path.write_bytes(whole)
    reading = source.numbered("train")
    next(reading)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(NanochatError, match=rf"b\{suffix} has \d+ bytes, and had {len(whole)}"):
        list(reading)


def test_a_file_cut_between_two_lines_while_it_is_read_is_named(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", DOCUMENTS * 100)
    write_documents(tmp_path / "val.jsonl", DOCUMENTS[:1])
    reading = get_source(str(tmp_path)).numbered("train")
    next(reading)
    write_documents(tmp_path / "a.jsonl", DOCUMENTS * 50)
    with pytest.raises(NanochatError, match=r"a\.jsonl has"):
        list(reading)


def test_bad_data_is_named(tmp_path: Path) -> None:
    for nothing in (str(tmp_path / "nothing"), "~nobody.here/nothing"):
        with pytest.raises(NanochatError, match="neither builtin"):
            get_source(nothing)
    with pytest.raises(NanochatError, match="is a folder without files"):
        get_source(str(tmp_path))
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(NanochatError, match="holds no"):
        get_source(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(NanochatError, match=r"empty\.txt is empty"):
        get_source(str(tmp_path))
    (tmp_path / "empty.txt").unlink()
    write_documents(tmp_path / "a.parquet", DOCUMENTS)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(NanochatError, match=r"b\.parquet cannot be read"):
        list(get_source(str(tmp_path)).documents("train"))
    (tmp_path / "b.parquet").unlink()
    pq.write_table(pa.table({"words": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(NanochatError, match="no column text"):
        list(get_source(str(tmp_path / "c.parquet")).documents("train"))
    (tmp_path / "d.jsonl").write_text('{"text": "good"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(NanochatError, match="line 2"):
        list(get_source(str(tmp_path / "d.jsonl")).documents("train"))
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(NanochatError, match=r"e\.txt is not UTF-8 .*: convert it"):
        list(get_source(str(tmp_path / "e.txt")).documents("train"))
    with pytest.raises(NanochatError, match=r"image\.png is no \.txt, .* file: convert it"):
        get_source(str(tmp_path / "image.png"))


def test_half_a_surrogate_pair_becomes_text_that_utf8_can_hold(tmp_path: Path) -> None:
    lines = ['{"text": "a \\ud83d cat"}', '{"text": "a \\ud83d\\ude42 dog"}']  # half a pair, and a whole one
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_documents(tmp_path / "val.jsonl", DOCUMENTS[:1])
    assert list(get_source(str(tmp_path)).documents("train")) == ["a \ufffd cat", "a \U0001f642 dog"]


@pytest.mark.parametrize("column", [[1, 2], [["a"], ["b"]], [b"a", b"b"]])
def test_a_column_that_holds_no_text_is_named(tmp_path: Path, column: list) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(NanochatError, match=r"a\.parquet: column text holds .*, not text: write it as strings"):
        list(get_source(str(tmp_path)).documents("train"))


@pytest.mark.parametrize("name", ["text", "tokens"])
def test_two_columns_of_one_name_are_named(tmp_path: Path, name: str) -> None:
    columns = [pa.array(["a"]), pa.array(["b"])] if name == "text" else [pa.array([[1]]), pa.array([[2]])]
    pq.write_table(pa.Table.from_arrays(columns, names=[name, name]), tmp_path / "a.parquet")
    reason = "has 2 columns text: rename all but one" if name == "text" else "has no column text"
    with pytest.raises(NanochatError, match=rf"a\.parquet {reason}"):
        list(get_source(str(tmp_path)).documents("train"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_text_of_every_arrow_type_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", None, "b"], kind)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "b.parquet")
    write_documents(tmp_path / "val.parquet", DOCUMENTS[:1])
    assert list(get_source(str(tmp_path)).documents("train")) == ["a", "b"]


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000])
def test_a_line_beyond_what_json_can_read_is_named(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{{"text": {value}}}\n', encoding="utf-8")
    with pytest.raises(NanochatError, match=r"a\.jsonl, line 2, cannot be read \(.*\): fix or remove it") as error:
        list(get_source(str(tmp_path)).documents("train"))
    assert len(str(error.value)) < 300


def test_real_pretraining_data(real_data: Path) -> None:
    source = get_source(str(real_data / "pretrain"))
    assert [path.name for path in source.val_files] == ["shard_val.parquet"]
    assert sum(1 for _ in source.documents("val")) == 162


# ----------------------------------------------------------------------------- the builtin corpus


def test_cleaning_keeps_prose_and_drops_the_rest() -> None:
    docstring = """Return the larger of the two values that were given to this function.

        It is used by the scheduler, and should not be called from any other place in the program.

        >>> larger(1, 2)
        2

        :param a: the first value of the two
        ======  =====
        a       b
        """
    text = clean(docstring)
    assert text.startswith("Return the larger")
    assert "scheduler" in text
    assert ">>>" not in text
    assert "param" not in text
    assert clean("x = 1") == ""


def test_first_sentence() -> None:
    assert first_sentence("Return a copy of the list.\n\nMore.") == "Return a copy of the list."
    assert first_sentence("f(x) -> y. Strange.") == ""


@pytest.mark.slow
@pytest.mark.whole_corpus
def test_harvest_is_stable_and_split(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole standard library; installed packages, which are the more the more is installed, are read alike."""
    paths = sysconfig.get_paths()
    nowhere = dict.fromkeys(("purelib", "platlib"), str(base_dir / "nowhere"))
    monkeypatch.setattr(builtin_corpus, "sysconfig", SimpleNamespace(get_paths=lambda: paths | nowhere))
    source = get_source("builtin")
    train, val = set(source.documents("train")), set(source.documents("val"))
    assert sum(map(len, train)) > 500_000
    assert val
    assert not train & val
    before = (source.directory / "manifest.json").read_bytes()
    get_source("builtin")
    assert (source.directory / "manifest.json").read_bytes() == before  # cached


def test_a_damaged_harvest_is_made_anew() -> None:
    source = get_source("builtin")
    record, train = source.describe(), set(source.documents("train"))
    for damaged in ("{", "[]", "{}", '{"files": 1}', '{"files": {}, "harvest_version": 1}'):
        (source.directory / "manifest.json").write_text(damaged, encoding="utf-8")
        assert get_source("builtin").describe() == record
    (source.directory / "train.parquet").write_bytes(b"damaged")
    assert set(get_source("builtin").documents("train")) == train


def test_of_several_that_want_a_harvest_one_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, collect = [], builtin_corpus._collect
    monkeypatch.setattr(builtin_corpus, "_collect", lambda: made.append(1) or collect())
    list(ThreadPoolExecutor(3).map(get_source, ["builtin"] * 3))  # as ranks do
    assert len(made) == 1


# ----------------------------------------------------------------------------- downloading


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HubServer]]:
    """A local server in the hub's layout with three shards, and the data set "local" that lives there."""
    for i in range(3):
        write_documents(tmp_path / "made" / f"shard_{i:05d}.parquet", DOCUMENTS[i * 30 : i * 30 + 30])
    monkeypatch.setitem(hub_shards.HUB_REPOSITORIES, "local", HubRepository("someone/texts", 3))
    monkeypatch.setitem(dataset.SOURCES, "local", dataset.HubSource)
    with serve_folder(tmp_path / "made") as server:
        ask_hub(monkeypatch, server.address)
        yield server


def test_download_then_read(hub: type[HubServer]) -> None:
    with pytest.raises(NanochatError, match=r"python -m nanochat\.dataset --data local"):
        get_source("local")
    hub_shards.download("local", 2)
    source = get_source("local")
    assert list(source.documents("train")) == DOCUMENTS[:60]
    assert list(source.documents("val")) == DOCUMENTS[60:90]  # the last shard, pinned by name
    hub.requests.clear()
    hub_shards.download("local", 2)
    assert not hub.requests  # nothing is fetched twice


def test_download_goes_on_after_a_cut(hub: type[HubServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))  # between its tries
    hub.cut = 500
    with pytest.raises(NanochatError, match="run the same command again, it goes on"):
        hub_shards.download("local", 1)
    hub.cut = None
    hub_shards.download("local", 1)
    assert list(get_source("local").documents("train")) == DOCUMENTS[:30]


def test_failed_download_is_an_error_and_leaves_nothing(hub: type[HubServer]) -> None:
    (hub.root / "shard_00001.parquet").unlink()
    with pytest.raises(NanochatError, match="1 of 3 shards"):
        hub_shards.download("local", 2)
    assert len(list(get_source("local").documents("train"))) == 30  # what came is whole
    (hub.root / "shard_00001.parquet").write_bytes(b"not parquet")
    with pytest.raises(NanochatError, match="not a parquet file"):
        hub_shards.download("local", 2)
    assert not (get_base_dir() / "data" / "local" / "shard_00001.parquet").exists()


def test_validation_shard_is_needed(hub: type[HubServer]) -> None:
    hub_shards.download("local", 2)
    (get_base_dir() / "data" / "local" / "shard_00002.parquet").unlink()
    with pytest.raises(NanochatError, match=r"shard_00002\.parquet is missing"):
        get_source("local")


def test_shards_of_the_public_nanochat_are_read_where_they_lie(
    hub: type[HubServer], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hub_shards.HUB_REPOSITORIES, "climbmix", HubRepository("someone/texts", 3, "base_data_climbmix"))
    assert dataset.default_source_name() == "builtin"
    public = base_dir / "base_data_climbmix"
    public.mkdir()
    for name in ("shard_00000.parquet", "shard_00002.parquet"):
        shutil.copy(hub.root / name, public)
    assert dataset.default_source_name() == "climbmix"
    source = get_source("climbmix")
    assert list(source.documents("train")) == DOCUMENTS[:30] and list(source.documents("val")) == DOCUMENTS[60:90]
    hub_shards.download("climbmix", 2)  # only what is missing, to the others
    fetched = [Path(request).name for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert fetched == ["shard_00001.parquet"]
    assert list(get_source("climbmix").documents("train")) == DOCUMENTS[:60] and not (base_dir / "data").exists()
    (base_dir / "data" / "climbmix").mkdir(parents=True)
    for name in ("shard_00001.parquet", "shard_00002.parquet"):
        (public / name).rename(base_dir / "data" / "climbmix" / name)
    assert list(get_source("climbmix").documents("train")) == DOCUMENTS[30:60]  # ours, where both are


def test_a_download_that_fails_without_a_word_is_an_error(hub: type[HubServer], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*arguments: object, **settings: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(NanochatError, match="shard_00000.parquet: TimeoutError"):
        hub_shards.download("local", 1)
    with pytest.raises(NanochatError, match="--num-workers 0 is too small: choose 1 or more"):
        hub_shards.download("local", 1, workers=0)


def test_a_few_documents_have_one_for_validation(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", DOCUMENTS[:3])
    assert len(list(get_source(str(tmp_path)).documents("val"))) >= 1

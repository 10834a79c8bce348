"""Remote sources give the documents of the same local folder, through a cache of limited size."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from nanochat.common import NanochatError
from nanochat.dataset import get_source
from nanochat.shard_cache import Shard, ShardCache, get_shard_cache
from tests.helpers import DOCUMENTS, file_names, wait_for, write_documents
from tests.hub_server import HubServer, ask_hub, serve_folder

pytestmark = pytest.mark.usefixtures("no_waits")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four training shards, in two folders, and one for validation."""
    folder = tmp_path / "shards"
    for i, name in enumerate(["one/a.parquet", "one/b.parquet", "one-more/c.parquet", "one-more/d.jsonl", "val.parquet"]):
        write_documents(folder / name, DOCUMENTS[i * 20 : i * 20 + 20])
    return folder


def _numbered(address: str, start: int = 0) -> dict[str, list]:
    source = get_source(address)
    return {split: list(source.numbered(split, start)) for split in ("train", "val")}


def _size(directory: Path) -> int:
    """Of files that were there together: a thread that evicts one and fetches another must not have both counted."""
    while True:
        before, size = set(directory.glob("*.*")), 0
        for path in before:
            with contextlib.suppress(FileNotFoundError):  # renamed or evicted meanwhile
                size += path.stat().st_size
        if set(directory.glob("*.*")) == before:
            return size


# ----------------------------------------------------------------------------- sources in memory://


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(folder), "/texts", recursive=True)
    yield "memory://texts"
    filesystem.rm("/texts", recursive=True)


@pytest.mark.parametrize("start", [0, 17, 20, 45, 66, 99])
def test_the_documents_are_those_of_the_local_folder(folder: Path, memory: str, start: int) -> None:
    assert _numbered(memory, start) == _numbered(str(folder), start)
    assert _numbered(f"file://{folder}", start) == _numbered(str(folder), start)


def test_a_file_a_folder_or_a_glob(folder: Path, memory: str) -> None:
    for pattern in ("one/a.parquet", "one", "**/*.parquet", "one*/*", "one/*.parquet"):
        assert _numbered(f"{memory}/{pattern}") == _numbered(f"{folder}/{pattern}")
    sizes = {path.name: path.stat().st_size for path in (folder / "one").iterdir()}
    described = get_source(f"{memory}/one").describe()
    assert {Path(name).name: size for name, size in described["files"].items()} == sizes


def test_what_comes_before_is_not_fetched(memory: str) -> None:
    source = get_source(memory)
    list(source.numbered("train", 45))
    assert not any(name.startswith(("a-", "val-")) for name in file_names(get_shard_cache().directory))


def test_bad_addresses_are_named(memory: str) -> None:
    filesystem = fsspec.filesystem("memory")
    with pytest.raises(NanochatError, match=r"nothing cannot be read \(it is not there\)"):
        get_source(f"{memory}/nothing")
    with pytest.raises(NanochatError, match="neither builtin"):
        get_source(f"{memory}/nothing*")
    filesystem.pipe("/texts/other/image.png", b"x")
    with pytest.raises(NanochatError, match="holds no"):
        get_source(f"{memory}/other")
    filesystem.pipe("/texts/other/a.jsonl", b"")
    with pytest.raises(NanochatError, match=r"a\.jsonl is empty"):
        get_source(f"{memory}/other")
    filesystem.pipe("/texts/other/a.parquet", b"not parquet")
    with pytest.raises(NanochatError, match=r"memory://.*other/a\.parquet cannot be read"):
        list(get_source(f"{memory}/other/a.parquet").documents("train"))
    with pytest.raises(NanochatError, match=r"nowhere://x cannot be read .*not known"):
        get_source("nowhere://x")


@pytest.mark.parametrize("address", ["s3://bucket/a.parquet", "gs://bucket/a.parquet"])
def test_a_missing_package_is_named(address: str) -> None:
    package = {"s3": "s3fs", "gs": "gcsfs"}[address[:2]]
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(NanochatError, match=rf"{package} is not installed\): pip install {package}"):
            get_source(address)
    else:
        pytest.skip(f"{package} is installed")


def test_a_changed_file_is_fetched_anew(folder: Path, memory: str) -> None:
    before = _numbered(memory)
    data = folder / "one-more" / "d.jsonl"
    data.write_text(data.read_text().replace(".", "!"))  # of the same size
    fsspec.filesystem("memory").put_file(str(data), "/texts/one-more/d.jsonl")
    assert _numbered(memory) == _numbered(str(folder)) != before


def test_a_file_that_vanishes_or_shrinks_is_named(memory: str) -> None:
    filesystem = fsspec.filesystem("memory")
    source = get_source(f"{memory}/one-more")
    whole = filesystem.cat_file("/texts/one-more/c.parquet")
    filesystem.pipe("/texts/one-more/c.parquet", whole[:-100])
    with pytest.raises(NanochatError, match=r"c\.parquet cannot be read"):
        list(source.documents("train"))
    filesystem.rm("/texts/one-more/c.parquet")
    with pytest.raises(NanochatError, match=r"c\.parquet cannot be read \(it is not there\)"):
        list(source.documents("train"))


def test_the_cache_stays_under_its_limit_while_all_is_read(folder: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    limit = 3 * max(sizes)
    assert sum(sizes) > limit
    monkeypatch.setenv("NANOCHAT_CACHE_GB", str(limit / 1e9))
    directory, seen, source = get_shard_cache().directory, [], get_source(memory)
    for split in ("train", "val"):
        for pair in source.numbered(split):
            seen.append(pair)
            assert _size(directory) <= limit
    assert seen == [pair for pairs in _numbered(str(folder)).values() for pair in pairs]


def test_eviction_while_another_reads_loses_nothing(folder: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three readers, each at another place, in a cache that holds one shard or so: all read all."""
    size = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    monkeypatch.setenv("NANOCHAT_CACHE_GB", str(1.5 * size / 1e9))
    expected = _numbered(str(folder))["train"]
    readers = [get_source(memory).numbered("train", start) for start in (0, 25, 50)]
    found = [[], [], []]
    while any(len(part) < len(expected) - start for part, start in zip(found, (0, 25, 50), strict=True)):
        for reader, part in zip(readers, found, strict=True):
            part.extend(pair for pair in [next(reader, None)] if pair)
    assert found == [expected[start:] for start in (0, 25, 50)]


def test_room_that_others_are_filling_is_waited_for(folder: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    monkeypatch.setenv("NANOCHAT_CACHE_GB", str(1.5 * size / 1e9))
    reading = get_source(memory).numbered("train")
    others = get_shard_cache().directory / f"other-{0:016x}.parquet.{size}.{0:08x}.tmp"
    others.touch()
    threading.Timer(0.5, others.unlink).start()
    assert list(reading) == _numbered(str(folder))["train"]


def test_a_shard_evicted_between_fetch_and_open_is_fetched_again(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, evictions = ShardCache.fetch, []

    def fetch_and_evict(self: ShardCache, shard: Shard) -> Path:
        path = fetch(self, shard)
        if shard.entry not in evictions:
            evictions.append(shard.entry)
            path.unlink()
        return path

    expected = _numbered(memory)
    monkeypatch.setattr(ShardCache, "fetch", fetch_and_evict)
    assert _numbered(memory) == expected
    assert len(evictions) == 5


def test_the_next_shards_come_while_one_is_read(memory: str) -> None:
    reading = get_source(memory).numbered("train")
    next(reading)
    directory = get_shard_cache().directory
    wait_for(
        lambda: [name[0] for name in file_names(directory) if not name.endswith(".tmp")] == ["a", "b", "c"], "three shards"
    )
    reading.close()


def test_a_source_can_be_pickled(memory: str) -> None:
    source = get_source(memory)
    assert list(pickle.loads(pickle.dumps(source)).numbered("train")) == list(source.numbered("train"))


# ----------------------------------------------------------------------------- web servers and the hub


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HubServer]]:
    with serve_folder(folder) as server:
        ask_hub(monkeypatch, server.address)
        yield server


def _is_whole(request: str) -> bool:
    return request.startswith("GET") and "bytes=" not in request


def test_a_file_on_a_web_server(folder: Path, server: type[HubServer]) -> None:
    pytest.importorskip("aiohttp")
    for query in ("", "?download=true"):
        address = f"{server.address}/files/one/a.parquet{query}"
        assert _numbered(address) == _numbered(str(folder / "one" / "a.parquet"))
        assert len(list(filter(_is_whole, server.requests))) == 1
        server.requests.clear()
    with pytest.raises(NanochatError, match="it is not there"):
        get_source(f"{server.address}/files/none.parquet")
    with pytest.raises(NanochatError, match="log in"):
        get_source(f"{server.address}/closed/a.parquet")
    server.cut = 600
    (folder / "one" / "a.parquet").write_bytes(os.urandom(3000))
    with pytest.raises(NanochatError, match=r"a\.parquet cannot be read .*check the network"):
        list(get_source(f"{server.address}/files/one/a.parquet").documents("train"))
    assert all(name.startswith("a-") and not name.endswith(".tmp") for name in file_names(get_shard_cache().directory))


def test_no_server_is_one_sentence() -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(NanochatError, match=r"http://127\.0\.0\.1:9/a\.parquet cannot be read .*: check the network"):
        get_source("http://127.0.0.1:9/a.parquet")


@pytest.mark.parametrize("pattern", ["", "/**/*.parquet", "/one-more", "/one/a.parquet"])
def test_a_data_set_on_the_hub(folder: Path, server: type[HubServer], pattern: str) -> None:
    assert _numbered(f"hf://datasets/someone/texts{pattern}") == _numbered(f"{folder}{pattern}")
    first = [request for request in server.requests if _is_whole(request) and "/resolve/" in request]
    assert len(first) == len(set(first))
    assert _numbered(f"hf://datasets/someone/texts{pattern}", 50) == _numbered(f"{folder}{pattern}", 50)
    assert [request for request in server.requests if _is_whole(request) and "/resolve/" in request] == first


def test_on_the_hub_too_a_changed_file_is_fetched_anew(folder: Path, server: type[HubServer]) -> None:
    before = _numbered("hf://datasets/someone/texts")
    data = folder / "one-more" / "d.jsonl"
    data.write_text(data.read_text().replace(".", "!"))
    assert _numbered("hf://datasets/someone/texts") == _numbered(str(folder)) != before


def test_what_the_hub_lacks_is_named(server: type[HubServer]) -> None:
    for address in ("hf://datasets/someone/nothing", "hf://datasets/someone/texts/nothing"):
        with pytest.raises(NanochatError, match=rf"{address} cannot be read \(it is not there\)"):
            get_source(address)


READ = """
import sys
from nanochat.dataset import get_source
print(sum(len(text) for text in get_source(sys.argv[1]).documents("train")))
"""


def test_processes_fetch_a_shard_once(folder: Path, server: type[HubServer]) -> None:
    pytest.importorskip("aiohttp")
    shutil.rmtree(folder / "one-more")
    command = [sys.executable, "-c", READ, "hf://datasets/someone/texts"]
    environment = {**os.environ, "HF_ENDPOINT": server.address}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [int(output) for output in outputs] == [sum(map(len, DOCUMENTS[:40]))] * 2
    whole = [request for request in server.requests if _is_whole(request) and "/resolve/" in request]
    assert sorted(Path(request).name for request in whole) == ["a.parquet", "b.parquet"]

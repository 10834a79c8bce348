"""The cache of remote shards: shared, bounded and never half full."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat import shard_cache
from nanochat.common import NanochatError
from nanochat.shard_cache import Shard, ShardCache, get_shard_cache
from tests.helpers import file_names, wait_for

pytestmark = pytest.mark.usefixtures("no_waits")


class _Far:
    """As much of a file system as the cache uses. `cut`: bytes after which a file ends, `failures`: errors to raise first."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.files = {name: os.urandom(size) for name, size in sizes.items()}
        self.gets: list[str] = []
        self.cut: dict[str, int] = {}
        self.failures: list[Exception] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def get_file(self, path: str, to: str) -> None:
        self.gets.append(path)
        self.go_on.wait(10)
        if self.failures:
            Path(to).write_bytes(b"part")
            raise self.failures.pop(0)
        Path(to).write_bytes(self.files[path][: self.cut.get(path)])

    def shards(self) -> list[Shard]:
        return [Shard(f"far://{name}", self, name, len(data), "1") for name, data in self.files.items()]


def test_a_shard_is_fetched_once(tmp_path: Path) -> None:
    far = _Far({"a.parquet": 100})
    (shard,) = far.shards()
    for _ in range(2):
        cache = ShardCache(tmp_path, 1000)
        assert cache.fetch(shard).read_bytes() == far.files["a.parquet"]
    assert far.gets == ["a.parquet"]
    assert cache.fetch(shard).name.startswith("a-")
    cache.fetch(shard).write_bytes(b"damaged")  # of another length: not what was fetched
    assert cache.fetch(shard).read_bytes() == far.files["a.parquet"]


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    far = _Far({f"{i}.parquet": 100 for i in range(5)})
    cache, shards = ShardCache(tmp_path, 350), far.shards()
    for shard in shards[:3]:
        cache.fetch(shard)
    cache.fetch(shards[0])
    cache.fetch(shards[3])
    assert [shard in cache for shard in shards] == [True, False, True, True, False]
    assert len(file_names(tmp_path)) == 3


@pytest.mark.parametrize("clock", [lambda i: 0, lambda i: 4e9, lambda i: -i])
def test_clocks_that_jump_break_nothing(tmp_path: Path, clock) -> None:
    far = _Far({f"{i}.parquet": 100 for i in range(6)})
    cache = ShardCache(tmp_path, 250)
    for i, shard in enumerate(far.shards() * 2):
        path = cache.fetch(shard)
        assert path.read_bytes() == far.files[shard.path]
        os.utime(path, (clock(i), clock(i)))
        assert len(file_names(tmp_path)) <= 2


def test_a_shard_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match=r"far://a\.parquet .*NANOCHAT_CACHE_GB"):
        ShardCache(tmp_path, 99).fetch(_Far({"a.parquet": 100}).shards()[0])
    assert file_names(tmp_path) == []


def test_the_limit_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_shard_cache().limit_bytes == 50e9
    monkeypatch.setenv("NANOCHAT_CACHE_GB", "0.5")
    assert get_shard_cache().limit_bytes == 5e8
    for value in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("NANOCHAT_CACHE_GB", value)
        with pytest.raises(NanochatError, match="NANOCHAT_CACHE_GB="):
            get_shard_cache()


def test_a_cut_download_leaves_no_entry(tmp_path: Path) -> None:
    far = _Far({"a.parquet": 100})
    far.cut["a.parquet"] = 50
    cache, (shard,) = ShardCache(tmp_path, 1000), far.shards()
    with pytest.raises(NanochatError, match=r"far://a\.parquet .*50 bytes arrived, but 100 were listed"):
        cache.fetch(shard)
    assert file_names(tmp_path) == []
    assert len(far.gets) == 3
    far.cut.clear()
    assert cache.fetch(shard).read_bytes() == far.files["a.parquet"]


def test_what_may_pass_is_tried_again_and_what_may_not_is_not(tmp_path: Path) -> None:
    far = _Far({"a.parquet": 100})
    cache, (shard,) = ShardCache(tmp_path, 1000), far.shards()
    for error, reason in ((FileNotFoundError("a"), "not there"), (PermissionError("Forbidden"), r"Forbidden.*hf auth login")):
        far.failures, far.gets = [error], []
        with pytest.raises(NanochatError, match=rf"far://a\.parquet cannot be read .*{reason}"):
            cache.fetch(shard)
        assert len(far.gets) == 1
        assert file_names(tmp_path) == []
    far.failures, far.gets = [ConnectionError("reset"), TimeoutError()], []
    assert cache.fetch(shard).read_bytes() == far.files["a.parquet"]
    assert len(far.gets) == 3


def test_prefetch_is_done_before_it_is_asked_for(tmp_path: Path) -> None:
    far = _Far({f"{i}.parquet": 100 for i in range(3)})
    cache, shards = ShardCache(tmp_path, 1000), far.shards()
    cache.prefetch(shards[1:])
    wait_for(lambda: all(shard in cache for shard in shards[1:]), "the next shards")
    assert shards[0] not in cache
    for shard in shards[1:]:
        cache.fetch(shard)
    assert len(far.gets) == 2


def test_asking_for_what_is_on_its_way_waits_for_it(tmp_path: Path) -> None:
    far = _Far({"a.parquet": 100})
    cache, (shard,) = ShardCache(tmp_path, 1000), far.shards()
    far.go_on.clear()
    cache.prefetch([shard])
    cache.prefetch([shard])
    wait_for(lambda: far.gets, "a download to begin")
    threading.Timer(0.2, far.go_on.set).start()
    assert cache.fetch(shard).read_bytes() == far.files["a.parquet"]
    assert len(far.gets) == 1


def test_a_failed_prefetch_shows_only_when_asked_for(tmp_path: Path) -> None:
    far = _Far({"a.parquet": 100})
    cache, (shard,) = ShardCache(tmp_path, 1000), far.shards()
    far.failures = [FileNotFoundError("a")] * 2
    cache.prefetch([shard])
    wait_for(lambda: len(far.failures) == 1 and not any(t.is_alive() for t in cache._prefetches.values()), "the failure")
    with pytest.raises(NanochatError, match="not there"):
        cache.fetch(shard)
    assert cache.fetch(shard).exists()  # it is back


def test_prefetch_never_takes_the_room_of_what_is_read(tmp_path: Path) -> None:
    far = _Far({f"{i}.parquet": 100 for i in range(6)})
    cache, shards = ShardCache(tmp_path, 250), far.shards()
    for i, shard in enumerate(shards):
        path = cache.fetch(shard)
        cache.prefetch(shards[i + 1 : i + 3])
        for thread in list(cache._prefetches.values()):
            thread.join()
        assert path.exists()
        assert len(file_names(tmp_path)) <= 2
    assert len(far.gets) == 6  # no prefetched shard was evicted before it was read


def test_a_shard_that_gets_its_name_while_another_counts_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = _Far({"a.parquet": 100, "b.parquet": 100})
    cache, (a, b) = ShardCache(tmp_path, 150), far.shards()
    far.go_on.clear()
    cache.prefetch([a])
    wait_for(lambda: far.gets, "a download to begin")
    (download,) = cache._prefetches.values()
    list_folder = Path.iterdir

    def list_slowly(folder: Path) -> Iterator[Path]:
        found = list(list_folder(folder))
        far.go_on.set()
        download.join(0.3)
        return iter(found)

    monkeypatch.setattr(cache, "_remove_temporary", lambda entry: None)  # it lists the folder, too
    monkeypatch.setattr(Path, "iterdir", list_slowly)
    cache.fetch(b)
    assert file_names(tmp_path) == [b.entry]


def test_leftovers_of_killed_downloads_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    far = _Far({"a.parquet": 100, "b.parquet": 100})
    cache, (a, b) = ShardCache(tmp_path, 1000), far.shards()
    far.go_on.clear()
    cache.prefetch([a])
    wait_for(lambda: far.gets, "a download to begin")
    alive = file_names(tmp_path)
    assert len(alive) == 1
    (tmp_path / f"{b.entry}.100.01234567.tmp").write_bytes(b"half")
    ShardCache(tmp_path, 1000)
    assert file_names(tmp_path) == alive
    far.go_on.set()
    assert cache.fetch(a).read_bytes() == far.files["a.parquet"]


HANG = """
import sys, time
from pathlib import Path
from nanochat.shard_cache import Shard, ShardCache
class Far:
    def get_file(self, path, to):
        Path(to).write_bytes(b"half")
        print("here", flush=True)
        time.sleep(60)
ShardCache(Path(sys.argv[1]), 1000).fetch(Shard("far://a.parquet", Far(), "a.parquet", 100, "1"))
"""


def test_a_process_that_is_killed_holds_up_nobody(tmp_path: Path) -> None:
    far = _Far({"a.parquet": 100})
    process = subprocess.Popen([sys.executable, "-c", HANG, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    cache = ShardCache(tmp_path, 1000)
    assert len(file_names(tmp_path)) == 1  # the living keep theirs
    process.kill()
    process.wait()
    process.stdout.close()
    assert cache.fetch(far.shards()[0]).read_bytes() == far.files["a.parquet"]
    assert len(file_names(tmp_path)) == 1


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not() -> None:
    busy, gone = (type("Answer", (Exception,), {"status": status})() for status in (429, 410))
    assert not shard_cache._is_final(busy) and shard_cache._is_final(gone)

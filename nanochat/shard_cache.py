"""Fetches shards of remote data sets to the local disk and keeps the most recently used. Used by document_files.py.

Readers read whole local files. In steady state they never wait for the network, since the next shard is fetched meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem

from nanochat.common import NanochatError, first_line, get_base_dir
from nanochat.files import replace

RETRY_WAITS_S = (1.0, 4.0, 15.0)  # between attempts; permanent errors are not retried
DEFAULT_LIMIT_GB = 50.0
ROOM_WAIT_S = 60.0  # for downloads of other processes, which cannot be evicted before they end
OPEN_ATTEMPTS = 5

T = TypeVar("T")


def plain_path(path: str) -> PurePosixPath:
    """A path without the query of a web address (https://host/a.parquet?download=true)."""
    return PurePosixPath(path.split("?")[0] if path.startswith(("http://", "https://")) else path)


@dataclass(frozen=True)
class Shard:
    """A remote file as it was listed. `version` is any property from the server that changes with the content."""

    url: str
    filesystem: AbstractFileSystem
    path: str  # within the file system
    size: int  # bytes
    version: str

    @property
    def name(self) -> PurePosixPath:
        return plain_path(self.path)

    @property
    def entry(self) -> str:
        """Its file name in the cache: readable, and different for another URL or content."""
        path = self.name
        readable = re.sub(r"[^A-Za-z0-9._]+", "-", path.stem)[-60:]
        key = hashlib.blake2b(f"{self.url}\n{self.size}\n{self.version}".encode(), digest_size=8).hexdigest()
        return f"{readable}-{key}{path.suffix}"


class ShardCache:
    """Whole shards in a folder of limited size, which any number of processes may share.

    One process at a time fetches a shard, under a lock that ends with the process, to a temporary name; a complete shard
    gets its own name. The least recently used are evicted. An evicted shard that is open elsewhere lives until it is closed.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory, self.limit_bytes = directory, limit_bytes
        (directory / "locks").mkdir(parents=True, exist_ok=True)
        self._prefetches: dict[str, threading.Thread] = {}  # by entry
        self._reading = ""  # the entry that was asked for last
        self._remove_leftovers()

    def __contains__(self, shard: Shard) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / shard.entry).stat().st_size == shard.size
        return False

    def fetch(self, shard: Shard) -> Path:
        """Where the shard is on this disk, fetched if it was not. Raises NanochatError naming URL, reason and way out."""
        prefetch = self._prefetches.pop(shard.entry, None)
        if prefetch is not None:
            prefetch.join()  # if it failed, this tries again, and fails for the one who asked
        self._reading = shard.entry
        return self._fetch(shard, keep=set())

    def open_shard(self, shard: Shard) -> BinaryIO:
        """The shard, opened for reading: eviction can no longer take it away."""
        for _ in range(OPEN_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):  # evicted since it was fetched
                return open(self.fetch(shard), "rb")
        raise NanochatError(f"{shard.url} was evicted from the cache before it could be read: raise NANOCHAT_CACHE_GB")

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Fetch shards in the background. A failure is reported when the shard is requested."""
        wanted = {shard.entry: shard for shard in shards}
        keep = {self._reading, *wanted}  # a prefetch must not evict these
        underway = {e: thread for e, thread in list(self._prefetches.items()) if e in wanted or thread.is_alive()}
        for entry, shard in wanted.items():
            if entry not in underway and shard not in self:
                underway[entry] = threading.Thread(target=self._prefetch, args=(shard, keep), daemon=True)
                underway[entry].start()
        self._prefetches = underway

    def _prefetch(self, shard: Shard, keep: set[str]) -> None:
        with contextlib.suppress(NanochatError, OSError):
            self._fetch(shard, keep)

    # ------------------------------------------------------------------------- fetching

    def _fetch(self, shard: Shard, keep: set[str]) -> Path:
        path = self.directory / shard.entry
        with self._lock(shard.entry):
            if shard in self:
                os.utime(path)
                return path
            self._remove_temporary(shard.entry)
            try:
                retry(lambda: self._download(shard, path, keep))
            except Exception as error:
                raise remote_error(shard.url, error) from error
        return path

    def _download(self, shard: Shard, path: Path, keep: set[str]) -> None:
        # The final size is in the name, so that other processes count it when they make room.
        temporary = self.directory / f"{shard.entry}.{shard.size}.{secrets.token_hex(4)}.tmp"
        deadline = time.monotonic() + ROOM_WAIT_S
        try:
            while True:
                with self._lock("room"):
                    if self._make_room(shard, keep, can_wait=time.monotonic() < deadline):
                        temporary.touch()
                        break
                time.sleep(0.05)
            shard.filesystem.get_file(shard.path, str(temporary))
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
            if size != shard.size:
                raise OSError(f"{size} bytes arrived, but {shard.size} were listed: it was truncated, or has changed")
            with self._lock("room"):  # renamed while another lists the folder, it could be counted under neither name
                replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _lock(self, name: str, timeout_s: float = -1) -> FileLock:
        if name != "room":
            name = name.rpartition("-")[2][:2]  # of the hash: at most 256 lock files, which are never removed
        return FileLock(self.directory / "locks" / f"{name}.lock", timeout=timeout_s)

    # ------------------------------------------------------------------------- room

    def _make_room(self, shard: Shard, keep: set[str], can_wait: bool) -> bool:
        """Evict the least recently used until the shard fits. Raises NanochatError if it cannot.

        can_wait: return False if it will fit once other processes' downloads, which cannot be evicted yet, are done.
        """
        files = [(status.st_mtime_ns, path, size) for path, status, size in self._files()]
        room = self.limit_bytes - sum(size for _, _, size in files)
        for _, path, size in sorted(files):  # a clock that jumped changes the order, no more
            if room >= shard.size:
                return True
            if path.suffix != ".tmp" and path.name not in keep:
                with contextlib.suppress(PermissionError):  # on Windows, one that is open stays
                    path.unlink(missing_ok=True)
                    room += size
        underway = sum(size for _, path, size in files if path.suffix == ".tmp")
        if room < shard.size <= room + underway and can_wait:
            return False
        if room < shard.size:
            raise NanochatError(
                f"{shard.url} ({shard.size / 1e9:.3g} GB) finds no room in a cache of {self.limit_bytes / 1e9:.3g} GB: raise "
                "NANOCHAT_CACHE_GB to three shards for each process that reads at the same time"
            )
        return True

    def _files(self) -> Iterator[tuple[Path, os.stat_result, int]]:
        """(path, status, bytes it takes or will take) of every shard, including those being fetched."""
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.is_file():
                    declared = re.search(r"\.(\d+)\.[0-9a-f]{8}\.tmp$", path.name)
                    yield path, status, int(declared[1]) if declared else status.st_size

    def _remove_leftovers(self) -> None:
        """Remove files of killed downloads: their lock is free."""
        for path, _, _ in list(self._files()):
            if underway := re.fullmatch(r"(.+-[0-9a-f]{16}\.\w+)\.\d+\.[0-9a-f]{8}\.tmp", path.name):
                with contextlib.suppress(Timeout), self._lock(underway[1], timeout_s=0):
                    path.unlink(missing_ok=True)

    def _remove_temporary(self, entry: str) -> None:
        """Remove what a killed process left of this entry, whose lock we hold."""
        for path, _, _ in list(self._files()):
            if path.name.startswith(f"{entry}.") and path.suffix == ".tmp":
                path.unlink(missing_ok=True)


def get_shard_cache() -> ShardCache:
    """This process's cache, in <base dir>/data/cache, with a size of NANOCHAT_CACHE_GB (default 50)."""
    value = os.environ.get("NANOCHAT_CACHE_GB") or str(DEFAULT_LIMIT_GB)
    try:
        limit_gb = float(value)
        if not 0 < limit_gb < float("inf"):
            raise ValueError
    except ValueError:
        raise NanochatError(f"NANOCHAT_CACHE_GB={value!r} is not a size in GB: give a number, for example 50") from None
    return _cache_at(get_base_dir() / "data" / "cache", int(limit_gb * 1e9))


_cache_at = functools.cache(ShardCache)


# ----------------------------------------------------------------------------- errors


def retry(action: Callable[[], T]) -> T:
    """The action's result; temporary failures are retried."""
    for wait_s in RETRY_WAITS_S:
        try:
            return action()
        except Exception as error:
            if _is_final(error):
                raise
            time.sleep(wait_s)
    return action()


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, requests, httpx or huggingface_hub."""
    found = (getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None))
    return next((status for status in found if isinstance(status, int)), None)


def _unwrap(error: Exception) -> Exception:
    """The real cause: fsspec's web file system raises FileNotFoundError for every failure of server or network."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and not hasattr(cause, "response"):
        return error if _status(cause) == 404 else cause
    return error


def _is_final(error: Exception) -> bool:
    error = _unwrap(error)
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    kinds = (NanochatError, FileNotFoundError, PermissionError, ImportError, ValueError, TypeError, NotImplementedError)
    return no_space or isinstance(error, kinds) or "credentials" in str(error).lower()


def remote_error(url: str, error: Exception) -> NanochatError:
    """One sentence for a failure of a remote address, with the way out."""
    if isinstance(error, NanochatError):
        return error
    error = _unwrap(error)
    reason = first_line(error)
    status = _status(error)
    way_out = "check the network and run the same command again"
    if isinstance(error, ImportError):
        package = getattr(error.__cause__, "name", None) or error.name or "the package for it"
        reason, way_out = f"{package} is not installed", f"pip install {package}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"the disk is full ({get_base_dir()})"
        way_out = "free some space, lower NANOCHAT_CACHE_GB or set NANOCHAT_BASE_DIR to a folder on a larger disk"
    elif isinstance(error, PermissionError) and error.filename:
        way_out = "choose another folder, for example with NANOCHAT_BASE_DIR"
    elif status in (401, 403) or isinstance(error, PermissionError) or "credentials" in reason.lower():
        way_out = "log in to its host (hf auth login, or the variables of its cloud, such as AWS_ACCESS_KEY_ID)"
    elif status == 404 or isinstance(error, FileNotFoundError):
        reason, way_out = "it is not there", "check the address, and log in if it is not public (for example hf auth login)"
    elif isinstance(error, (ValueError, NotImplementedError)):
        way_out = "check the address"
    return NanochatError(f"{url} cannot be read ({reason}): {way_out}")

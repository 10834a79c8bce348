"""What files an address leads to: a file, a folder or a glob, here or at an fsspec address (hf://, s3://, https://, ...).

Used by dataset.py, prep_input.py and scripts/data_prep. Files are named by their paths relative to the folder; hidden ones do
not count.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NoReturn

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from nanochat.common import NanochatError, print0, some_of
from nanochat.document_files import READERS, DocumentFile, RemoteFile
from nanochat.shard_cache import Shard, remote_error, retry

# Properties of a file that change when its content does, as various file systems call them.
VERSION_KEYS = (
    "ETag", "etag", "blob_id", "md5Hash", "md5", "content_md5", "Content-MD5", "generation", "version_id",
    "LastModified", "Last-Modified", "last_modified", "mtime", "modified", "updated", "created",
    "CRC", "sha", "modify", "modificationTime",
)  # fmt: skip

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # in which data_prep reads files, and training does not
# Kinds of files that often hold text and are not read unless READERS has them, apart from those that other programs keep
# beside data.
UNREAD = {
    ".json", ".ndjson", ".csv", ".tsv", ".arrow", ".html", ".htm", ".xml", ".pdf", ".docx", ".epub",
    ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z",
}  # fmt: skip
OF_PROGRAMS = {"settings.json", "manifest.json", "state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}

Listing = dict[PurePath, Callable[[], DocumentFile]]  # path relative to the given folder: how to make the file


def is_remote(address: str) -> bool:
    return "://" in address and not address.startswith("file://")


def hint_at_hub(address: str) -> str:
    """What follows the name of something that is not there, if that looks like a data set of the Hugging Face hub."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", address)
    return f" (a data set of the hub is given as hf://datasets/{address}/**/*.parquet)" if is_name else ""


def filesystem_of(address: str) -> AbstractFileSystem:
    """The file system of an address; "::", which chains those of remote ones, may be part of a local path."""
    return url_to_fs(address)[0] if is_remote(address) else LocalFileSystem()


def list_local(path: str) -> Listing:
    """The files at a path, below a folder, or matching a glob, following links; named by their relative path.

    Raises NanochatError for a folder that cannot be read, and for a link to nothing that is named like a text.
    """
    expanded = _local_path(path)
    if expanded.is_dir():
        root, found = expanded, _walk(expanded)
    elif expanded.exists():  # even if its name looks like a glob
        root, found = expanded.parent, iter([expanded])
    else:
        root = Path(*_before_magic(expanded))
        found = map(Path, glob.glob(str(expanded), recursive=True))
        if closed := _closed_folders(expanded):
            print0(f"not read, as this user may not enter them: {some_of(closed, 3)}")
    once: dict[str, Path] = {}  # each file once, preferably by its own name instead of a link's
    for path_found in sorted(filter(_is_file, found), key=lambda file: (file.is_symlink(), file)):
        once.setdefault(os.path.realpath(path_found), path_found)
    names = {file.relative_to(root): file for file in once.values()}
    return {name: functools.partial(DocumentFile, file, name.as_posix()) for name, file in names.items()}


def finds_below(path: str, folder: Path, name: str) -> bool:
    """Whether `list_local` of a path would find a file of that name if it lay in the folder, a real path."""
    expanded = _local_path(path)
    if expanded.exists():
        return folder.is_relative_to(os.path.realpath(expanded))
    before = tuple(_before_magic(expanded))
    root = os.path.realpath(Path(*before))
    return folder.is_relative_to(root) and _matches((folder / name).relative_to(root).parts, expanded.parts[len(before) :])


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a glob; ** stands for any number of folders."""
    if pattern[:1] == ("**",):
        return any(_matches(parts[n:], pattern[1:]) for n in range(len(parts) + 1))
    if not parts or not pattern:
        return parts == pattern
    return fnmatch.fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def without_scheme(path: str) -> str:
    """A local path without file://, which on Windows stands before /C:/..."""
    return re.sub(r"^/(?=[A-Za-z]:)", "", path.removeprefix("file://"))


def _local_path(path: str) -> Path:
    return Path(os.path.expanduser(without_scheme(path)))


def _is_file(path: Path) -> bool:
    try:
        leads_nowhere = path.is_symlink() and not path.exists()
        if leads_nowhere and path.suffix.lower() in (*READERS, *COMPRESSIONS):
            raise NanochatError(f"{path} links to {os.readlink(path)}, which is not there: restore it, or remove the link")
        return path.is_file()
    except OSError as error:
        _raise_unreadable(error)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise NanochatError(f"{error.filename} cannot be read ({error.strerror}): let it be read, or move it away") from error


def _before_magic(path: PurePath) -> Iterator[str]:
    """The parts of a glob's folder."""
    return itertools.takewhile(lambda part: not glob.has_magic(part), path.parts[:-1])


def _closed_folders(pattern: Path) -> list[str]:
    """Folders that a glob comes to and cannot list: it leaves them out without a word."""
    closed, listed = set(), len(pattern.parts) + (pattern.name == "**")
    for end in range(len(list(_before_magic(pattern))), listed):
        for folder in glob.glob(f"{Path(*pattern.parts[:end])}/", recursive=True):
            try:
                os.scandir(folder).close()
            except OSError:
                closed.add(folder.rstrip("/"))
    return sorted(closed)


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder, including linked folders, but no folder twice and nothing hidden."""
    visited = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if name.startswith(".") or real in visited:
                folders.remove(name)
            else:
                visited.add(real)
        folders.sort()
        yield from (Path(parent, name) for name in names if not name.startswith("."))


VAL = "val(id|idation)?"  # names of the validation split


def is_of_split(split: str, path: PurePath) -> bool:
    """Whether the name of a file, or of a folder it was found in, names the split (a regular expression)."""
    names = (*path.parent.parts, path.stem)
    return any(re.search(rf"(^|[^a-z]){split}([^a-z]|$)", name.lower()) for name in names)


def without_strangers(paths: list[PurePath]) -> list[PurePath]:
    """The files, by relative path, without those not meant for training, such as a test split or README.md. Reports them."""
    has_train = any(is_of_split("train", path) for path in paths)
    has_rows = any(path.suffix.lower() not in (".md", ".txt") for path in paths)

    def is_stranger(path: PurePath) -> bool:
        of_test = has_train and is_of_split("test", path) and not is_of_split("train", path)
        return of_test or (has_rows and path.name.lower() == "readme.md")

    if left_out := [path.as_posix() for path in paths if is_stranger(path)]:
        print0(f"not read, as no text to learn from: {some_of(left_out, 3)}")
    return [path for path in paths if not is_stranger(path)]


def report_unread(paths: Iterable[PurePath]) -> None:
    """Say which of the files at an address are left out although they may hold text."""
    kinds = UNREAD.difference(READERS)
    unread = [path.as_posix() for path in sorted(paths) if path.suffix.lower() in kinds and path.name not in OF_PROGRAMS]
    if unread:
        print0(f"not read, being of another kind: {some_of(unread, 3)}; convert to .jsonl or .parquet what is to be learned")


def list_remote(address: str) -> Listing:
    """The files at an fsspec address, like `list_local`. Raises NanochatError if it cannot be listed."""
    try:
        filesystem, path = url_to_fs(address, **_filesystem_options(address))
        infos = retry(lambda: _list_filesystem(filesystem, path))
    except Exception as error:
        raise remote_error(address, error) from error
    chained = "".join(address.partition("::")[1:])  # zip://a.parquet::s3://bucket/file.zip: the path does not tell which zip
    shards = [Shard(filesystem.unstrip_protocol(n) + chained, filesystem, n, **_properties(info)) for n, info in infos.items()]
    root = PurePosixPath(path)
    if list(infos) == [path] or glob.has_magic(path):
        root = PurePosixPath(*_before_magic(root))
    below = {shard: shard.name.relative_to(root) if shard.name.is_relative_to(root) else shard.name for shard in shards}
    return {name: functools.partial(_remote_file, shard) for shard, name in below.items()}


def _filesystem_options(address: str) -> dict[str, Any]:
    """Options of `url_to_fs` for file systems whose defaults do not suit large files."""
    if address.startswith("hf://"):
        from huggingface_hub.utils import disable_progress_bars

        for name in ("http_get", "xet_get"):  # progress bars of several threads and ranks would clutter the training log
            disable_progress_bars(f"huggingface_hub.{name}")
    if address.startswith(("http://", "https://")):
        with contextlib.suppress(ImportError):  # url_to_fs says so
            from aiohttp import ClientTimeout

            return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
    return {}


def _list_filesystem(filesystem: AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    filesystem.invalidate_cache()
    is_web = path.startswith(("http://", "https://"))
    if any(character in path for character in ("*[" if is_web else "*?[")):
        found, root = filesystem.glob(path, detail=True), str(PurePosixPath(*_before_magic(PurePosixPath(path))))
        if "/." not in path.removeprefix(root):  # else hidden ones are meant
            found = _without_hidden(found, root)
    elif (is_web and path.endswith("/")) or (info := filesystem.info(path))["type"] == "directory":
        found = _without_hidden(filesystem.find(path, detail=True), path)
    else:
        found = {info["name"]: info}
    return {name: info for name, info in found.items() if info["type"] == "file"}


def _without_hidden(infos: dict[str, dict[str, Any]], root: str) -> dict[str, dict[str, Any]]:
    return {name: info for name, info in infos.items() if "/." not in f"/{name.removeprefix(root)}"}


def _properties(info: dict[str, Any]) -> dict[str, Any]:
    """Size and version of a Shard; size -1 if the listing does not tell."""
    size = info.get("size")
    return {"size": -1 if size is None else size, "version": str([info[key] for key in VERSION_KEYS if info.get(key)])}


def _remote_file(shard: Shard) -> RemoteFile:
    """Raises NanochatError if the server does not tell the size: a truncated file could not be recognized."""
    if shard.size < 0:  # as in the listing of a web server
        try:
            info = retry(lambda: shard.filesystem.info(shard.path))
        except Exception as error:
            raise remote_error(shard.url, error) from error
        shard = replace(shard, **_properties(info))
    if shard.size < 0:
        raise NanochatError(f"{shard.url}: its server does not say how large it is: download it and give its path")
    return RemoteFile(shard)

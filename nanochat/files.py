"""Writes files that survive a crash, locks folders, reads JSON that may be damaged. Used wherever files are written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanochat.common import DISK_FULL, NanochatError, as_unicode

PIECES, PIECE_BYTES = 16, 1 << 12  # of a large file's sample
SMALL_BYTES = 1 << 20
BUSY_TRIES = 10 if os.name == "nt" else 0  # to rename what another process may hold open


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object. Raises NanochatError if it is missing, truncated or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError, RecursionError) as error:  # the last: deep nesting
        raise NanochatError(f"{path} cannot be read ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, {} if there is none. Raises NanochatError if it is damaged."""
    try:
        return read_json_object(path) if path.exists() else {}
    except NanochatError as error:
        raise NanochatError(f"{error}: restore or remove it") from error


def sha256_of(path: Path) -> str:
    """The hash of a file's content. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_of_sample(path: Path) -> str:
    """A hash of a small file, or of pieces spread over a large one: cheap, and another for most edits. Raises OSError."""
    digest, size = hashlib.blake2b(digest_size=8), path.stat().st_size
    with open(path, "rb") as file:
        if size <= SMALL_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for n in range(PIECES):
            file.seek((size - PIECE_BYTES) * n // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write. At the end of the block it is renamed to `path`; if the block fails, it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            is_nameless = error.filename is None and error.errno in DISK_FULL  # met while writing, not while opening
            if is_nameless or str(error.filename) == str(temporary):
                error.filename, error.filename2 = str(path), None  # a message names the file that was meant
        raise


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Write a file so that readers see the old content or the new, never a part, even after a crash at any point.

    It gets the mode that open() would give it, so that others may read it if the umask lets them.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with written_whole(Path(path)) as temporary, open(temporary, "xb") as file:
        file.write(data)


def replace(source: Path, target: Path) -> None:
    """os.replace, which on Windows waits half a second for a reader or a virus scanner to let go of a file.

    Also renames a directory, to a name that is free; one of its files may be held, too.
    """
    for _ in range(BUSY_TRIES):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.05)
    os.replace(source, target)


def replace_directory(temporary: Path, target: Path) -> None:
    """Rename a directory to `target`, replacing an existing one. A crash leaves the old one complete as `.NAME.old`."""
    if not target.exists():
        replace(temporary, target)
        return
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    replace(target, old)
    replace(temporary, target)
    shutil.rmtree(old)


def short_name(name: str) -> str:
    """What tables show of a text's name: only the last part of a path."""
    return Path(name).name if os.path.isabs(name) else name


def share_mode(example: Path) -> None:
    """Give a file's mode to everything beside and below it: safetensors makes files that only their owner can read."""
    for path in example.parent.rglob("*"):
        if path.is_file():
            with contextlib.suppress(OSError):  # a file system without modes
                shutil.copymode(example, path)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left behind while writing a file. No process may be writing it now."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file that `append_json_lines` wrote, [] if there is none; a line that a crash cut short is skipped."""
    values = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return values


def not_utf8(path: object, error: UnicodeDecodeError) -> NanochatError:
    """The error for a file that is not UTF-8."""
    return NanochatError(f"{path} is not UTF-8 ({error}): convert it, as iconv -f latin1 -t utf-8 does, or remove it")


def read_jsonl(
    path: Path,
    check: Callable[[Any], object] = lambda row: None,
    kind: str = "row of this task",
    way_out: str = "fix or remove it",
) -> list[Any]:
    """The values of a JSONL file, each of a kind. Raises NanochatError naming file and line, also where `check` raises.

    Lone surrogates become U+FFFD: no page and no file could hold them.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines(): U+2028 may stand in a string
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except OSError as error:  # only why: it would name the path again
        raise NanochatError(f"{path} cannot be read ({error.strerror}): check the path, or give another file") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append(json.loads(as_unicode(json.dumps(row, ensure_ascii=False))) if "\\ud" in line.lower() else row)
            check(rows[-1])
        except json.JSONDecodeError as error:
            reason = f"{error.msg}, column {error.colno}"
            raise NanochatError(f"{path}, line {number}, is not JSON ({reason}): {way_out}") from error
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise NanochatError(f"{path}, line {number}, is not a {kind} ({reason}): {way_out}") from error
    return rows


def append_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Append a line for each value, starting a new line after one that a crash cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(json.dumps(value) + "\n" for value in values).encode("utf-8"))


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file, more than once if this process asks again. The system releases it when the process ends.

    On a file system without locks the file itself is the lock, and a killed process leaves it behind. Raises NanochatError,
    which begins with `busy`, if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0, is_singleton=True)  # reentrant within this process
    try:
        lock.acquire()
    except Timeout:
        raise NanochatError(f"{busy}; if none lives on any machine, remove {path}") from None
    try:
        yield
    finally:
        lock.release()

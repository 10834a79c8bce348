"""The base of the library: paths, errors, commands, and which of a job's processes this one is.

Everything else imports from here. It needs no PyTorch, whose import takes seconds that commands which only read and write
should not wait for; devices.py has what does.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

logger = logging.getLogger("nanochat")
EX_SOFTWARE = 70  # sysexits.h: a bug in the program
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DEFAULT_BASE_DIR = "~/.cache/nanochat"
LESS_MEMORY = (  # names no flags, because they differ between commands
    "choose fewer rows at a time, a shorter context or a smaller model; python -m nanochat.memory says what training needs"
)
SET_BY_TORCHRUN = "unset RANK, LOCAL_RANK and WORLD_SIZE, or start with torchrun, which sets them all"
OURS = ("nanochat", "scripts", "tasks")  # our packages
IN_DEVICES = ("autodetect_device_type", "compute_init", "compute_cleanup")  # which the public guide imports from here


def __getattr__(name: str) -> Any:
    if name not in IN_DEVICES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanochat import devices  # only now: it imports PyTorch

    return getattr(devices, name)


class NanochatError(Exception):
    """A failure that the user can fix: one sentence with the value, the limit and the way out."""


# ----------------------------------------------------------------------------- paths and files


def get_base_dir() -> Path:
    """The folder under which everything is written: NANOCHAT_BASE_DIR, else ~/.cache/nanochat. Created if missing.

    Raises NanochatError if no home folder is known, or if there can be no such folder.
    """
    path = os.environ.get("NANOCHAT_BASE_DIR") or DEFAULT_BASE_DIR
    try:
        base_dir = Path(path).expanduser()
    except RuntimeError as error:  # neither HOME nor an entry of passwd, as in some containers
        raise NanochatError(f"there is no home folder for {path}: set NANOCHAT_BASE_DIR to a folder") from error
    try:
        base_dir.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # below /proc, or on a drive that is not there
        raise NanochatError(f"no folder can be made at {base_dir}: set NANOCHAT_BASE_DIR to another") from error
    return base_dir


def as_unicode(text: str) -> str:
    """Replace lone surrogates, which JSON allows and UTF-8 does not, by U+FFFD, as the tokenizer does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def find_test_data() -> Path | None:
    """The folder of real texts and tasks for tests and benchmarks, or None if it does not exist.

    NANOCHAT_TEST_DATA names it; the default is `../shared/data` beside the checkout.
    """
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    path = Path(os.environ.get("NANOCHAT_TEST_DATA") or default).expanduser()
    return path if path.is_dir() else None


# ----------------------------------------------------------------------------- commands


def run_command(main: Callable[[list[str] | None], int]) -> int:
    """Run a script's `main` as a command. A failure prints one sentence on stderr and gives a non-zero exit code.

    1: a failure that the user can fix. 70: an unexpected one, whose trace is kept in a file. `--debug` anywhere on the
    command line (or NANOCHAT_DEBUG=1) shows the trace as well.
    """
    global _is_command
    _is_command = True
    debug = "--debug" in sys.argv or os.environ.get("NANOCHAT_DEBUG") == "1"
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows pipe's code page lacks most characters
            with contextlib.suppress(io.UnsupportedOperation):  # a stream that was read from already cannot be changed
                stream.reconfigure(errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: each warning came twice
    logger.setLevel(logging.INFO)
    try:
        code = main(argv)
    except KeyboardInterrupt:
        complain("interrupted")
        code = 130
    except BrokenPipeError:  # the reader of our output (head, less) has closed it: not an error
        sys.stderr.close()
        code = 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        sentence = describe_error(error)
        complain(f"error: {sentence or describe_unexpected(error)}")
        code = 1 if sentence else EX_SOFTWARE
    if "torch" in sys.modules:  # whoever has not imported it has no group to leave
        from nanochat.devices import compute_cleanup

        compute_cleanup(code)
    return code


_is_command = False  # True: this process was started as one of our commands


def seconds_since_start() -> float:
    """Seconds since this command was started; 0 if a script's `main` was called from other code."""
    return time.time() - psutil.Process().create_time() if _is_command else 0.0


def describe_error(error: BaseException) -> str | None:
    """One sentence for a failure, with the way out if we know it; None for an unexpected one."""
    if isinstance(error, NanochatError):
        return str(error)
    if isinstance(error, OSError):
        return _describe_os_error(error)
    if "torch" in sys.modules:
        from nanochat.devices import describe_device_error

        if sentence := describe_device_error(error):
            return sentence
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in first_line(error):
        return f"this machine ran out of memory: {LESS_MEMORY}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "nanochat").partition(".")[0] not in OURS:
        return f"the package {error.name} is not installed: run bash runs/setup.sh, with the name of its extra"
    return None


def _describe_os_error(error: OSError) -> str:
    place = error.filename or os.environ.get("NANOCHAT_BASE_DIR") or DEFAULT_BASE_DIR
    if error.errno in DISK_FULL:
        return f"the disk is full ({place}): free some space or choose a larger disk, for example with NANOCHAT_BASE_DIR"
    if error.errno == errno.ENOLCK:  # NFS without its lock service
        return f"the file system of {place} locks no files: mount it with locks, or choose another with NANOCHAT_BASE_DIR"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"{place} is on a read-only file system" if error.errno == errno.EROFS else f"no permission for {place}"
        return f"{what}: choose another folder, for example with NANOCHAT_BASE_DIR"
    if error.errno in (errno.EEXIST, errno.ENOTDIR) and error.filename:
        return f"{place} is a file, or below one, and must be a folder: choose another with NANOCHAT_BASE_DIR"
    if error.filename:
        return f"{error.filename}: {error.strerror}: check the path"
    return str(error).strip().partition("\n")[0]


def describe_unexpected(error: Exception) -> str:
    """One sentence for a bug of ours; writes its trace into the base directory's logs."""
    lines = str(error).strip().splitlines()
    sentence = f"unexpected {type(error).__name__}{f' ({lines[0][:200]})' if lines else ''}"
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    trace = "".join(traceback.format_exception(error))
    versions = f"{Path(sys.argv[0]).name}, Python {sys.version.split()[0]}, PyTorch {version('torch')}"  # no flags: secrets
    try:
        path = get_base_dir() / "logs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{versions}\n\n{trace}", encoding="utf-8")
    except (OSError, NanochatError):  # there is no place to write it
        return f"{sentence}: run again with --debug and report what it shows\n{trace}"
    return f"{sentence}: this is a bug in nanochat: please report it and attach {path} (--debug shows the same)"


def some_of(names: Sequence[str], most: int = 1) -> str:
    """The first `most` names and how many more there are: "a, b and 3 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def print0(*args: object, **kwargs: Any) -> None:
    """Print on rank 0 only."""
    if get_dist_info().rank == 0:
        print(*args, **kwargs)


# ----------------------------------------------------------------------------- processes


def is_ddp_requested() -> bool:
    """True under torchrun (it sets RANK, LOCAL_RANK and WORLD_SIZE), whether or not the group is up yet."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


class DistInfo(NamedTuple):
    """Which of a job's processes this one is; outside torchrun, the only one."""

    ddp: bool = False
    rank: int = 0
    local_rank: int = 0  # on this machine
    world_size: int = 1


def get_dist_info() -> DistInfo:
    """What torchrun's variables say."""
    if not is_ddp_requested():
        return DistInfo()
    return DistInfo(True, *map(number_from_torchrun, ("RANK", "LOCAL_RANK", "WORLD_SIZE")))


def number_from_torchrun(name: str) -> int:
    """An environment variable that torchrun sets, 0 where it did not. Raises NanochatError if it is no such number."""
    text = os.environ.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= 65535):  # the highest port
        raise NanochatError(f"{name}={text[:50]!r} is no whole number from 0 to 65535: {SET_BY_TORCHRUN}")
    return int(text)


def complain(text: str) -> None:
    """Print to stderr; if that is closed, print nothing: it is no reason to stop."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)

"""The base of the library: device, compute dtype, process group, paths, errors, logging.

Everything else imports from here; of nanochat's own modules, this one imports only cpu and heartbeat.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import psutil
import torch
import torch.distributed as dist

from nanochat.cpu import keep_freed_memory, multiplies_bfloat16, usable_cores
from nanochat.heartbeat import RESTART, Heartbeat, fresh_store

T = TypeVar("T")
logger = logging.getLogger("nanochat")
EX_SOFTWARE = 70  # sysexits.h: a bug in the program
DEFAULT_BASE_DIR = "~/.cache/nanochat"
LESS_MEMORY = (  # names no flags, because they differ between commands
    "choose fewer rows at a time, a shorter context or a smaller model; python -m nanochat.memory says what training needs"
)
SET_BY_TORCHRUN = "unset RANK, LOCAL_RANK and WORLD_SIZE, or start with torchrun, which sets them all"
OURS = ("nanochat", "scripts", "tasks")  # our packages


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
    if code and in_process_group() and dist.get_world_size() > 1:
        _leave_at_once(code)
    compute_cleanup()
    return code


def _leave_at_once(code: int) -> NoReturn:
    """End a rank that failed; torchrun then ends the others.

    Leaving NCCL's process group properly would wait for running collectives, in which the others wait for this rank.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or without a reader
            stream.flush()
    os._exit(code)


_is_command = False  # True: this process was started as one of our commands


def seconds_since_start() -> float:
    """Seconds since this command was started; 0 if a script's `main` was called from other code."""
    return time.time() - psutil.Process().create_time() if _is_command else 0.0


def is_lost_connection(error: Exception) -> bool:
    """True for what gloo and NCCL raise when the other side has left: neither has an error class only for that."""
    signs = ["Connection closed by peer", "Connection reset by peer", "Socket Timeout"]
    if isinstance(error, dist.DistBackendError):
        signs += ["remote process exited", "ncclRemoteError", "Broken pipe", "imeout", "aborted"]
    elif isinstance(error, dist.DistError):
        return True
    elif dist.is_initialized():
        signs.append("gloo")
    else:
        return False
    return any(sign in str(error) for sign in signs)


def describe_error(error: BaseException) -> str | None:
    """One sentence for a failure, with the way out if we know it; None for an unexpected one."""
    if isinstance(error, NanochatError):
        return str(error)
    if isinstance(error, OSError):
        return _describe_os_error(error)
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError) or text.startswith("MPS backend out of memory"):
        return f"the device ran out of memory: {LESS_MEMORY} ({text})"
    if isinstance(error, RuntimeError) and is_lost_connection(error):
        return f"another process of this job has gone: {RESTART}"
    if isinstance(error, dist.DistBackendError):
        reason = str(error).strip().rpartition("Last error:")[2].strip().partition("\n")[0] or first_line(error)
        return f"the GPUs of this job cannot talk to each other ({reason}): NCCL_DEBUG=INFO tells more"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"this machine ran out of memory: {LESS_MEMORY}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "nanochat").partition(".")[0] not in OURS:
        return f"the package {error.name} is not installed: run bash runs/setup.sh, with the name of its extra"
    return None


def _describe_os_error(error: OSError) -> str:
    place = error.filename or os.environ.get("NANOCHAT_BASE_DIR") or DEFAULT_BASE_DIR
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({place}): free some space or set NANOCHAT_BASE_DIR to a folder on a larger disk"
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
    versions = f"{Path(sys.argv[0]).name}, Python {sys.version.split()[0]}, PyTorch {torch.__version__}"  # no flags: secrets
    try:
        path = get_base_dir() / "logs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{versions}\n\n{trace}", encoding="utf-8")
    except (OSError, NanochatError):  # there is no place to write it
        return f"{sentence}: run again with --debug and report what it shows\n{trace}"
    return f"{sentence}: this is a bug in nanochat: please report it and attach {path} (--debug shows the same)"


def print0(*args: object, **kwargs: Any) -> None:
    """Print on rank 0 only."""
    if number_from_torchrun("RANK") == 0:
        print(*args, **kwargs)


# ----------------------------------------------------------------------------- processes and devices


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


def number_from_torchrun(name: str, most: int = 65535) -> int:
    """An environment variable that torchrun sets, 0 where it did not. Raises NanochatError if it is no such number."""
    text = os.environ.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= most):
        raise NanochatError(f"{name}={text[:50]!r} is no whole number from 0 to {most}: {SET_BY_TORCHRUN}")
    return int(text)


def _check_meeting_point(rank: int, world_size: int) -> None:
    """Raises NanochatError if the environment does not say where the ranks meet, and which of how many this one is."""
    if rank >= world_size:
        raise NanochatError(f"RANK={rank} is not below WORLD_SIZE={world_size}: {SET_BY_TORCHRUN}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise NanochatError(f"RANK, LOCAL_RANK and WORLD_SIZE are set, but not {name}: {SET_BY_TORCHRUN}")
    number_from_torchrun("MASTER_PORT")


def autodetect_device_type() -> str:
    """ "cuda", "mps" or "cpu": the best one that works here."""
    if torch.cuda.is_available():
        return "cuda"
    # MPS has no collectives; in virtual machines it claims to be available but cannot allocate memory.
    if torch.backends.mps.is_available() and not is_ddp_requested():
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="mps")
            return "mps"
    return "cpu"


def compute_init(device_type: str = "", seed: int = 42) -> tuple[bool, int, int, int, torch.device]:
    """Seed, choose the device and join the process group if torchrun started us.

    Returns (ddp, rank, local_rank, world_size, device). Raises NanochatError if `device_type` is not available.
    """
    keep_freed_memory()
    ddp, rank, local_rank, world_size = get_dist_info()
    if not device_type:
        device_type = autodetect_device_type()
        if device_type == "cpu" and has_nvidia_gpu():
            sentence = f"PyTorch {torch.__version__} cannot use this machine's NVIDIA GPU (nanochat doctor tells more)"
            if ddp:
                raise NanochatError(f"{sentence}: fix that, or use --device-type=cpu")
            complain(f"warning: {sentence}: continuing without it")
    if device_type not in ("cuda", "mps", "cpu"):
        raise NanochatError(f"unknown device type {device_type!r}: choose cuda, mps or cpu")
    available: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device_type != "cpu" and not available[device_type]():
        raise NanochatError(f"PyTorch sees no {device_type} device here: use --device-type=cpu")
    if ddp and device_type == "mps":
        raise NanochatError("processes cannot work together on mps: start one without torchrun, or use --device-type=cpu")
    if device_type == "cuda":
        _check_gpu(local_rank)

    if not -(2**63) <= seed < 2**63:
        raise NanochatError(f"--seed {seed} is out of range: choose a whole number of at most 18 digits")
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # tf32 where CUDA has it; no effect on CPU
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.manual_seed(seed)
        torch.cuda.set_device(device)
        if sys.platform == "win32" or "microsoft" in platform.release().lower():  # the latter: WSL
            # Otherwise the driver spills into the host's memory, which is far slower; PyTorch should say that it is full.
            free, total = torch.cuda.mem_get_info(device)
            torch.cuda.set_per_process_memory_fraction(0.95 * free / total, device)
    if ddp and not dist.is_initialized():
        _check_meeting_point(rank, world_size)
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"  # gloo too, for collectives on the host
        device_id = device if device_type == "cuda" else None
        timeout = timedelta(minutes=10)
        store = fresh_store(next(dist.rendezvous("env://", timeout=timeout))[0], rank, world_size, timeout.total_seconds())
        # The others wait while rank 0 writes a last checkpoint of many GB; the heartbeat tells them if it dies meanwhile.
        timeout = timedelta(hours=1)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id)
        if world_size > 1:
            _heartbeats.append(Heartbeat(store, rank, world_size))
        if device_type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(usable_cores())
    return ddp, rank, local_rank, world_size, device


def has_nvidia_gpu() -> bool:
    """Whether the driver sees a GPU that this process may use, even if PyTorch does not."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=5).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _check_gpu(index: int) -> None:
    """Raise NanochatError unless this GPU exists and this PyTorch has kernels for it."""
    if index >= torch.cuda.device_count():
        raise NanochatError(
            f"there is no GPU for process {index} of this machine, where PyTorch sees {torch.cuda.device_count()}: start one "
            "process for each (--nproc_per_node; for recipes NPROC)"
        )
    major, minor = torch.cuda.get_device_capability(index)
    built_for = [int(arch.partition("_")[2]) for arch in torch.cuda.get_arch_list() if arch.partition("_")[2].isdigit()]
    if built_for and 10 * major + minor < min(built_for):
        name, least = torch.cuda.get_device_name(index), min(built_for) / 10
        raise NanochatError(
            f"{name} has compute capability {major}.{minor}, and PyTorch {torch.__version__} is built for {least} and later: "
            "install a build for older GPUs, or use --device-type=cpu"
        )


def compute_cleanup() -> None:
    """Leave the process group, if there is one."""
    if in_process_group():
        if _heartbeats:
            _heartbeats.pop().stop()
        dist.destroy_process_group()


_heartbeats: list[Heartbeat] = []  # that of this process's group, if it is in one


def in_process_group() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def get_compute_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of activations: bfloat16 if this device multiplies it natively, else float32.

    NANOCHAT_DTYPE (bfloat16, float32, float16) overrides it.
    """
    names = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    override = os.environ.get("NANOCHAT_DTYPE")
    if override:
        if override not in names:
            raise NanochatError(f"NANOCHAT_DTYPE={override!r} is not a dtype: choose one of {', '.join(names)}")
        return names[override]
    device_type = torch.device(device).type
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device_type == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return torch.float32


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory of this process: on a GPU, all that was reserved there; otherwise that of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)  # "allocated" leaves out what recorded passes keep
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has no such module

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def complain(text: str) -> None:
    """Print to stderr; if that is closed, print nothing: it is no reason to stop."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on a device; the copy to a GPU is asynchronous."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work, so that a host clock measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

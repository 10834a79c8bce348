"""The device that computes, its dtype, and the process group that torchrun's ranks form.

Used by whatever computes. What needs no PyTorch is in common.py, so that commands which only read and write start at once.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import psutil
import torch
import torch.distributed as dist

from nanochat.common import (
    LESS_MEMORY,
    SET_BY_TORCHRUN,
    NanochatError,
    complain,
    first_line,
    get_dist_info,
    is_ddp_requested,
    number_from_torchrun,
)
from nanochat.cpu import keep_freed_memory, multiplies_bfloat16, usable_cores
from nanochat.heartbeat import RESTART, Heartbeat, fresh_store

# ----------------------------------------------------------------------------- devices


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


# ----------------------------------------------------------------------------- the process group

_heartbeats: list[Heartbeat] = []  # that of this process's group, if it is in one


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
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.manual_seed(seed)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32; on a CPU it would let matrix units round, too
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


def _check_meeting_point(rank: int, world_size: int) -> None:
    """Raises NanochatError if the environment does not say where the ranks meet, and which of how many this one is."""
    if rank >= world_size:
        raise NanochatError(f"RANK={rank} is not below WORLD_SIZE={world_size}: {SET_BY_TORCHRUN}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise NanochatError(f"RANK, LOCAL_RANK and WORLD_SIZE are set, but not {name}: {SET_BY_TORCHRUN}")
    number_from_torchrun("MASTER_PORT")


def in_process_group() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def compute_cleanup(code: int = 0) -> None:
    """Leave the process group, if there is one; code: what the process is about to exit with.

    A rank that fails ends here and now, and torchrun ends the others: leaving NCCL's process group properly would wait for
    running collectives, in which the others wait for this rank.
    """
    if not in_process_group():
        return
    if code and dist.get_world_size() > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or without a reader
                stream.flush()
        os._exit(code)
    if _heartbeats:
        _heartbeats.pop().stop()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------- errors


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has no memory left: PyTorch's own error, or what its MPS backend, CUDA, cuBLAS and Triton raise.

    Libraries take memory of their own when they are first called, and each kernel some when it is first launched.
    """
    signs = ("out of memory", "ALLOC_FAILED")
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return said or isinstance(error, torch.OutOfMemoryError)


def describe_device_error(error: BaseException) -> str | None:
    """One sentence for what PyTorch raises where a device or another process fails; None for all else."""
    text = first_line(error)
    if is_out_of_memory(error):
        return f"the device ran out of memory: {LESS_MEMORY} ({text})"
    if isinstance(error, RuntimeError) and is_lost_connection(error):
        return f"another process of this job has gone: {RESTART}"
    if isinstance(error, dist.DistBackendError):
        reason = str(error).strip().rpartition("Last error:")[2].strip().partition("\n")[0] or first_line(error)
        return f"the GPUs of this job cannot talk to each other ({reason}): NCCL_DEBUG=INFO tells more"
    return None

"""This machine's processor and memory: what it multiplies natively, how much is ours, and what freed memory is kept."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import sys
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # a container's limits
INSTRUCTIONS = {  # as PyTorch asks for them; older versions cannot ask for all
    "AVX2": "_is_avx2_supported", "AVX-512": "_is_avx512_supported", "AVX512-BF16": "_is_avx512_bf16_supported",
    "AMX": "_is_amx_tile_supported",
}  # fmt: skip


def has_instructions(name: str) -> bool:
    """Whether the processor has instructions of that name in INSTRUCTIONS."""
    import torch  # here, since commands without it use the rest of this module

    return bool(getattr(torch.cpu, INSTRUCTIONS[name], bool)())


def multiplies_bfloat16() -> bool:
    """Whether it has dot products of bfloat16; elsewhere they are emulated and slow."""
    return has_instructions("AVX512-BF16") or has_instructions("AMX")


def cpu_name() -> str:
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown"  # on ARM, Linux does not name it


def usable_cores() -> int:
    """Cores that this process may use: limited by affinity and container quota, and shared by this machine's ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()  # microseconds of a processor
        cores = min(cores, math.ceil(int(quota) / int(period)))
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores // max(1, int(ranks) if ranks.isdecimal() else 1))


def available_memory() -> int:
    """Bytes that processes may still take, of the machine's and of the container's."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        limit, used, stat = ((CGROUP / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat"))
        cached = sum(int(size) for size in re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE))  # given up at need
        available = min(available, max(0, int(limit) - int(used) + cached))
    return available


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back to the system after every step.

    A training step on a CPU frees and takes hundreds of large buffers; requesting their pages from the system again each
    time took up to half of the element-wise work. Only what is larger than 32 MB, which would leave holes that little
    fits into, comes from the system. Elsewhere (musl, macOS, Windows) there is nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    mallopt(mmap_threshold, 32 << 20)  # the highest that there is; set, it no longer follows what is freed
    mallopt(trim_threshold, 2**31 - 1)

"""Measures how fast this machine is. Used by everything that measures or plans."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from nanochat.cpu import has_instructions, multiplies_bfloat16
from nanochat.devices import synchronize

T = TypeVar("T")


@functools.lru_cache
def measure_matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Floating-point operations per second of a large matrix product on this device.

    The best of many rounds, since other work on the machine can only slow it down. A CPU with few cores gets small products,
    which are less likely to be disturbed; one with many cores needs a large one.
    """
    sizes = (8192,) if device.type == "cuda" else (1024, 2048)

    def rate(size: int) -> float:
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        a @ b
        return 2 * size**3 / _fastest(lambda: a @ b, device, seconds / len(sizes))

    best = 0.0
    for size in sizes:
        if best and 2 * size**3 / best > 10 * seconds:  # float16 on a CPU would take a minute
            break
        best = max(best, rate(size))
    _leave_no_trace(device)
    return best


def reference_rate(device: torch.device, dtype: torch.dtype) -> float:
    """What MFU is a share of: the matmul rate in this dtype or, where a CPU only emulates it, in float32.

    Emulated, a large product is no upper limit: smaller ones are several times as fast.
    """
    native = device.type != "cpu" or (dtype == torch.bfloat16 and multiplies_bfloat16())
    return measure_matmul_rate(device, dtype if native else torch.float32)


@functools.lru_cache
def measure_memory_rate(device: torch.device) -> float:
    """Bytes per second that this device reads from its main memory: the reference for MBU. The best of several rounds."""
    size = 256 << 20
    if device.type == "cuda":  # too much for its caches, and no more than half of what is free
        size = min(4 << 30, torch.cuda.mem_get_info(device)[0] // 2)
    x = torch.ones(size // 4, dtype=torch.float32, device=device)
    rate = x.nbytes / _fastest(x.sum, device, seconds=0.5)
    del x
    _leave_no_trace(device)
    return rate


def _leave_no_trace(device: torch.device) -> None:
    """Return to the GPU what measuring took: it must not look occupied afterwards, nor count as this process's peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _fastest(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest round, of as many as fit into `seconds` but at least one."""
    synchronize(device)
    deadline = time.perf_counter() + seconds
    fastest = seconds_of(work, device)
    while time.perf_counter() < deadline:
        fastest = min(fastest, seconds_of(work, device))
    return fastest


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes until the device has finished it."""
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def expected_mfu(device: torch.device, dtype: torch.dtype) -> float:
    """Roughly the share of a device's matmul rate that training reaches, for planning.

    dev/LOG.md: 54 to 71% on CPUs without AMX; 17 to 28% with it, where products are faster than memory can feed them.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and has_instructions("AMX"):
        return 0.25
    return {"cpu": 0.5, "cuda": 0.4, "mps": 0.3}[device.type]


def in_own_thread(work: Callable[[], T]) -> T:
    """Run `work` in a temporary thread and return its result.

    OpenMP keeps a team of threads for every thread that ever computed. Once these outnumber the cores it stops spinning for
    work: with a second team alive, small operations took six times as long. Use this for one-time work before another
    thread takes over.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()

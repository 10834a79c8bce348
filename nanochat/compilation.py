"""What this machine can compile, and how fast it multiplies and reads. Used by whatever compiles or measures."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from nanochat.common import first_line, logger, synchronize
from nanochat.cpu import has_instructions

T = TypeVar("T")


def can_compile(device: torch.device) -> str | None:
    """None where torch.compile works for this device, else one clause that says what is missing."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE is set"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or later"
        return _why_no_triton()
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")  # PyTorch's choice
        if not shutil.which(compiler):
            return f"no C++ compiler is installed ({compiler})"
        if sys.platform == "linux":
            # A compiler that builds PyTorch's kernels at all knows AVX2 and AVX512: trying takes 4 s at first, 0.7 s later
            os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
        return None
    return f"not supported on {device.type}"


def try_to_compile(device: torch.device) -> str | None:
    """As `can_compile`, but on a CPU a small kernel is built as well: a compiler may be there and lack what it needs."""
    return can_compile(device) or (_why_no_kernel() if device.type == "cpu" else None)


@functools.lru_cache
def _why_no_kernel() -> str | None:
    """None where the compiler builds a kernel that loads.

    It costs a second the first time, which the next kernel is then spared.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(64))
        return None
    except Exception as error:  # of the compiler's, the loader's or Python's
        reason = next((line for line in str(error).splitlines() if "error:" in line), first_line(error)).strip()[:200]
        return f"the C++ compiler builds no kernel ({reason}): on Linux it needs g++ and Python's headers (python3-dev)"


@functools.lru_cache
def _why_no_triton() -> str | None:
    """None where Triton runs; it builds a small library for its driver first."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
        return None
    except ImportError:
        return "Triton is not installed"
    except Exception as error:  # of its own, or the compiler's
        return f"Triton cannot build its driver ({first_line(error)[:200]}): install gcc and Python's headers (python3-dev)"


@functools.lru_cache
def measure_matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Floating-point operations a second of a large matrix product on this device: what MFU is a share of.

    The best of many rounds, since other work on the machine can only slow it down. A CPU of few cores takes small
    products, of which more fit between two disturbances; one of many needs a large one.
    """
    sizes = (8192,) if device.type == "cuda" else (1024, 2048)

    def rate(size: int) -> float:
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        a @ b
        return 2 * size**3 / _fastest(lambda: a @ b, device, seconds / len(sizes))

    return max(rate(size) for size in sizes)


@functools.lru_cache
def measure_memory_rate(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes a second that this device reads from its main memory: what MBU is a share of. The best of several rounds."""
    size = (4 << 30) if device.type == "cuda" else (256 << 20)
    x = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / _fastest(x.sum, device, seconds)


def _fastest(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the rounds that `seconds` allow, at least one."""
    synchronize(device)
    deadline = time.perf_counter() + seconds
    fastest = seconds_of(work, device)
    while time.perf_counter() < deadline:
        fastest = min(fastest, seconds_of(work, device))
    return fastest


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that some work takes, until the device is done with it."""
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def expected_mfu(device: torch.device, dtype: torch.dtype) -> float:
    """The share of a device's matmul rate that training makes use of, roughly, for plans.

    dev/LOG.md: 54 to 71% on CPUs without AMX. With it, 17 to 28%: products are faster there than memory can feed them.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and has_instructions("AMX"):
        return 0.25
    return {"cpu": 0.5, "cuda": 0.4, "mps": 0.3}[device.type]


def is_usable(kernel: str, probe: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]) -> bool:
    """Whether a kernel of ours runs here and gives what PyTorch gives; the log says why not. probe: makes pairs of the two."""
    try:
        for found, expected in probe():
            difference = ((found - expected).norm() / expected.norm()).item()
            if not difference < 0.02:
                raise RuntimeError(f"its result is off by {difference:.3g}")
    except Exception as error:  # whatever a compiler throws, PyTorch's own code serves
        logger.info("%s is not usable here: %s", kernel, first_line(error)[:200])
        return False
    return True


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream of a GPU that is not the default one, for what precedes the capture of a CUDA graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def in_own_thread(work: Callable[[], T]) -> T:
    """Do the work in a thread that ends with it, and return its result.

    OpenMP keeps a team of threads for every thread that ever computed, and stops spinning for work once there are more of
    them than cores: with a second team alive, small operations took six times as long. What is computed once, before
    another thread takes over, belongs here.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back to the system after every step.

    A training step on a CPU frees and takes hundreds of large buffers; fetching their pages anew from the system each
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

"""What this machine can compile. Used by everything that compiles."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import sys
from collections.abc import Iterator

import torch

from nanochat.common import first_line


def can_compile(device: torch.device) -> str | None:
    """None if torch.compile works for this device, else a clause that says what is missing."""
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
        if sys.platform == "linux" and platform.machine() == "x86_64":
            # A compiler that builds PyTorch's kernels at all knows AVX2 and AVX512: trying takes 4 s at first, 0.7 s later
            os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
        return None
    return f"not supported on {device.type}"


def try_to_compile(device: torch.device) -> str | None:
    """Like `can_compile`, but on a CPU also builds a small kernel: a compiler may be installed but lack what it needs."""
    return can_compile(device) or (_why_no_kernel() if device.type == "cpu" else None)


@functools.lru_cache
def _why_no_kernel() -> str | None:
    """None if the compiler builds a kernel that loads.

    The first time this takes a second, which the next kernel then saves.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(64))
        return None
    except Exception as error:  # of the compiler's, the loader's or Python's
        reason = next((line for line in str(error).splitlines() if "error:" in line), first_line(error)).strip()[:200]
        return f"the C++ compiler builds no kernel ({reason}): on Linux it needs g++ and Python's headers (python3-dev)"


@functools.lru_cache
def _why_no_triton() -> str | None:
    """None if Triton runs; it first builds a small library for its driver."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
        return None
    except ImportError:
        return "Triton is not installed"
    except Exception as error:  # of its own, or the compiler's
        return f"Triton cannot build its driver ({first_line(error)[:200]}): install gcc and Python's headers (python3-dev)"


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A non-default stream of a GPU, for the warm-up before a CUDA graph is captured."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)

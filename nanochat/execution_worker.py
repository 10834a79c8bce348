"""Runs one program and reports how it ended. Started by execution.py inside the isolation; uses only the standard library.

The worker starts before there is a program for it: it imports common modules, then writes a byte to the report pipe. The
request arrives on stdin as one JSON object, ended by the end of the file; an empty one means that the caller is gone. The
worker then sets limits, runs the program and writes the verdict to the report pipe. Each program gets a new process.

The program runs in this process and can change anything in it. The verdict is therefore signed with a key that arrives with
the request and is kept in no variable, and is sent without using anything that a program could easily replace. A program
written to search its own memory can still find the key: the signature stops honest mistakes and cheap tricks from counting
as success.
"""

import builtins
import contextlib
import hashlib
import importlib
import json
import os
import sys
import types
from typing import Any, TextIO

try:
    import ctypes
except ImportError:  # a Python built without it cannot install the system call filter, and fails when it has to
    ctypes = None  # type: ignore[assignment]

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

WARM = """
    abc bisect collections copy dataclasses datetime decimal enum fractions functools heapq itertools math operator random re
    statistics string time typing
""".split()  # modules that programs often import: imported ahead, so that no program waits for them
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38  # linux/prctl.h
SECCOMP_MODE_FILTER = 2
SIGKILL = 9
MAX_ERROR_CHARS = 300  # up to ten times that as a literal; the verdict still fits into PIPE_BUF, so one write sends it whole


def main() -> None:
    """Get ready, read a request, run it and report; does not return once a program has run."""
    report_fd = int(sys.argv.pop())
    for name in WARM:
        importlib.import_module(name)
    with contextlib.suppress(OSError):  # without isolation, this process already leads a session
        os.setsid()  # otherwise signals to its process group would reach the launcher, outside the namespaces
    if sys.platform == "linux" and ctypes:
        prctl(PR_SET_PDEATHSIG, SIGKILL)
        prctl(PR_SET_DUMPABLE, 0)  # where core_pattern is a pipe, a core file limit of 0 has no effect
    os.write(report_fd, b"+")
    content = sys.stdin.buffer.read()
    if not content:
        return
    request = json.loads(content)
    del content
    leave_only(report_fd)
    set_limits(request["memory_bytes"], request["cpu_s"], request["file_bytes"])
    if bpf := bytes.fromhex(request.pop("filter")):
        install_filter(bpf)
    sys.settrace = lambda function: None  # a tracer could make the caller jump to another line
    sys.setprofile = lambda function: None
    # The key goes straight from the request into a hash. While the program runs, this hash and `finish` are only on this
    # frame's stack, without a name.
    globals().pop("finish")(
        os.write,
        os._exit,
        hashlib.blake2b(key=bytes.fromhex(request.pop("key")), digest_size=32),
        run_program(request.pop("code"), sys.stdout, sys.stderr),
    )


def leave_only(report_fd: int) -> None:
    """Turn stdin into /dev/null and the report pipe into fd 3, close all other fds, and unset the launchers' variables."""
    for name in ("PWD", "OLDPWD"):
        os.environ.pop(name, None)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if report_fd != 3:
        os.dup2(report_fd, 3)
    os.closerange(4, 65536)


def set_limits(memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Limit for good what the program may use: no further processes or threads, and only so much memory, time and disk."""
    limits = {"AS": memory_bytes, "CPU": cpu_s, "FSIZE": file_bytes, "NOFILE": 64}
    for name, value in {**limits, "CORE": 0, "NPROC": 0, "MEMLOCK": 0, "MSGQUEUE": 0}.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        except (AttributeError, ValueError, OSError):
            if sys.platform == "linux":  # other systems lack some of them
                raise


def prctl(option: int, *arguments: Any) -> None:
    """Call prctl(2). Raises OSError if it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    padded = [a if isinstance(a, ctypes._Pointer) else ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(option, *padded):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def install_filter(bpf: bytes) -> None:
    """Install a seccomp filter, given as an array of struct sock_filter (8 bytes each)."""

    class SockFprog(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.pointer(SockFprog(len(bpf) // 8, bpf)))


def run_program(code: str, stdout: TextIO, stderr: TextIO) -> bytes:
    """Run a program as __main__; returns the verdict: b"ok", b"memory", or b"error " and an ASCII literal of the reason.

    Everything that may call the program's code happens here: turning its exception into text, and flushing its output. If
    that fails, so does the worker. No name looked up after the program could let it turn an error into b"ok".
    """
    module = types.ModuleType("__main__")
    vars(module)["__builtins__"] = builtins
    sys.modules["__main__"] = module  # dataclasses, pickle and typing look names up there
    try:
        exec(compile(code, "<program>", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        return b"memory"
    except BaseException as error:  # SystemExit too: the program did not get to its end
        return b"error " + f"{f'{type(error).__name__}: {error}'[:MAX_ERROR_CHARS]!a}".encode()
    finally:
        for stream in (stdout, stderr):
            try:  # noqa: SIM105 - contextlib is Python code, which the program may have replaced
                stream.flush()
            except Exception:  # the program closed the stream
                pass
    return b"ok"


def finish(write: Any, leave: Any, sign: Any, verdict: bytes) -> None:
    """Send the signed verdict and exit at once, without running the program's exit handlers and destructors."""
    sign.update(verdict)
    write(3, b"\n" + verdict + b" " + sign.hexdigest().encode() + b"\n")
    leave(0)


if __name__ == "__main__":
    main()

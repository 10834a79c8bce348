"""Runs one program and says how it ended. Started by execution.py, inside its isolation; the standard library only.

It is ready before it has a program: common modules are imported by then, and a byte on the report pipe says so. The
request comes over stdin, as one JSON object up to the end of the file; an empty one means that the caller is gone.
Then limits are set, the program runs, and the verdict goes to the report pipe. Nothing of the process is used twice.

The program lives in this process and may rewrite all of it. A verdict is therefore signed with a key that came with the
request and is kept in no variable, and nothing that a program may easily have replaced is used to send it. A program that
is written to find this key in its own memory can: this keeps honest mistakes and cheap tricks from counting as success.
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
except ImportError:  # a Python built without it cannot install the filter of system calls, and says so when it has to
    ctypes = None  # type: ignore[assignment]

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

WARM = """
    abc bisect collections copy dataclasses datetime decimal enum fractions functools heapq itertools math operator random re
    statistics string time typing
""".split()  # what programs often import: they need not wait for it
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38  # linux/prctl.h
SECCOMP_MODE_FILTER = 2
SIGKILL = 9
MAX_ERROR_CHARS = 300  # as a literal at most tenfold, so that a verdict fits into PIPE_BUF and is written at once


def main() -> None:
    """Be ready, take a request, run it, report; never returns from a program."""
    report_fd = int(sys.argv.pop())
    for name in WARM:
        importlib.import_module(name)
    with contextlib.suppress(OSError):  # without isolation it has a session already
        os.setsid()  # or signals to its process group would reach the launcher, outside of the namespaces
    if sys.platform == "linux" and ctypes:
        prctl(PR_SET_PDEATHSIG, SIGKILL)
        prctl(PR_SET_DUMPABLE, 0)  # a limit of 0 on core files does not keep them from a core_pattern that is a pipe
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
    sys.settrace = lambda function: None  # a tracer may make a caller jump to another line
    sys.setprofile = lambda function: None
    # The key goes from the request into the state of a hash. While the program runs, that and `finish` are on the stack
    # of this frame, and have no name.
    globals().pop("finish")(
        os.write,
        os._exit,
        hashlib.blake2b(key=bytes.fromhex(request.pop("key")), digest_size=32),
        run_program(request.pop("code"), sys.stdout, sys.stderr),
    )


def leave_only(report_fd: int) -> None:
    """stdin becomes /dev/null, the report pipe fd 3; all fds beyond are closed. The launchers' variables go."""
    for name in ("PWD", "OLDPWD"):
        os.environ.pop(name, None)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if report_fd != 3:
        os.dup2(report_fd, 3)
    os.closerange(4, 65536)


def set_limits(memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Set for good what the program may use: neither processes nor threads, and no memory outside of its own."""
    limits = {"AS": memory_bytes, "CPU": cpu_s, "FSIZE": file_bytes, "NOFILE": 64}
    for name, value in {**limits, "CORE": 0, "NPROC": 0, "MEMLOCK": 0, "MSGQUEUE": 0}.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        except (AttributeError, ValueError, OSError):
            if sys.platform == "linux":  # elsewhere some are unknown
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

    All that may call code of the program happens here: the text of its exception, and flushing what it printed. If that
    fails the worker fails, too. No name is looked up after the program from which it could make b"ok" out of an error.
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
            except Exception:  # it closed the stream
                pass
    return b"ok"


def finish(write: Any, leave: Any, sign: Any, verdict: bytes) -> None:
    """Send the signed verdict and end at once: no exit handler and no destructor of the program runs."""
    sign.update(verdict)
    write(3, b"\n" + verdict + b" " + sign.hexdigest().encode() + b"\n")
    leave(0)


if __name__ == "__main__":
    main()

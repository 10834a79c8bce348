"""Runs one program and says how it ended. Started by execution.py, inside its isolation; the standard library only.

It is ready before it has a program: common modules are imported by then, and a byte on the report pipe says so. The
request comes over stdin, as one JSON object up to the end of the file; an empty one means that the caller is gone.
Then limits are set, the program runs, and the verdict goes to the report pipe. Nothing of the process is used twice.

The program lives in this process and may rewrite all of it. A verdict is therefore signed with a key that came with the
request and is kept in no variable, and nothing that a program may have replaced is used to send it.
"""

import builtins
import hashlib
import importlib
import json
import os
import sys
import types
from typing import TextIO

try:
    import ctypes
except ImportError:  # a Python built without it cannot install the filter of system calls, and says so when it has to
    ctypes = None

try:
    import resource
except ImportError:  # not a Unix
    resource = None

WARM = """
    abc bisect collections copy dataclasses datetime decimal enum fractions functools heapq itertools math operator random re
    statistics string time typing
""".split()  # what programs often import: they need not wait for it
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38  # linux/prctl.h
SECCOMP_MODE_FILTER = 2
SIGKILL = 9
MAX_ERROR_CHARS = 300  # escaped at most tenfold, so that a verdict fits into PIPE_BUF and is written at once


def main() -> None:
    """Be ready, take a request, run it, report; never returns from a program."""
    report_fd = int(sys.argv.pop())
    for name in WARM:
        importlib.import_module(name)
    if sys.platform == "linux" and ctypes:
        prctl(PR_SET_PDEATHSIG, SIGKILL)
    os.write(report_fd, b"+")
    content = sys.stdin.buffer.read()
    if not content:
        return
    request = json.loads(content)
    del content
    leave_only(report_fd)
    set_limits(request["memory_bytes"], request["cpu_s"], request["file_bytes"])
    if request["filter"]:
        install_filter(bytes.fromhex(request["filter"]))
    # The key goes from the request into the state of a hash, and that is on the stack while the program runs.
    finish(
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


def prctl(option: int, *arguments: object) -> None:
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
    """Run a program as __main__; returns the verdict: b"ok", b"memory", or b"error " and an escaped sentence.

    All that may call code of the program happens here: the text of its exception, and flushing what it printed.
    """
    module = types.ModuleType("__main__")
    module.__builtins__ = builtins
    sys.modules["__main__"] = module  # dataclasses, pickle and typing look names up there
    settrace, setprofile = sys.settrace, sys.setprofile
    verdict = b"ok"
    try:
        exec(compile(code, "<program>", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        verdict = b"memory"
    except BaseException as error:  # SystemExit too: the program did not get to its end
        verdict = describe(error)
    settrace(None)
    setprofile(None)
    for stream in (stdout, stderr):
        try:  # noqa: SIM105 - contextlib is Python code, which the program may have replaced
            stream.flush()
        except BaseException:  # it closed the stream
            pass
    return verdict


def describe(error: BaseException) -> bytes:
    """b"error Name: message", escaped to ASCII without line breaks."""
    try:
        name, message = f"{type(error).__name__}", f"{error}"
        text = f"{name}: {message}" if message else name
        return b"error " + text[:MAX_ERROR_CHARS].encode("unicode_escape")
    except BaseException:  # its __str__ failed
        return b"error an exception without a readable text"


def finish(write, leave, sign, verdict: bytes) -> None:
    """Send the signed verdict and end at once: no exit handler and no destructor of the program runs."""
    sign.update(verdict)
    write(3, b"\n" + verdict + b" " + sign.hexdigest().encode() + b"\n")
    leave(0)


if __name__ == "__main__":
    main()

"""Runs model-written programs in isolation. Used by the tasks whose answers are programs
(tasks/humaneval.py); doctor.py asks what isolates here.

Each program gets its own process in new user, mount, process, network, IPC and UTS namespaces, made by bwrap or, if that is
missing, by unshare. It sees a read-only root with Python and three devices, a small writable folder in memory, no network, no
other process and nothing of our environment; limits and a filter of system calls keep it to one thread. When a program ends,
fails or exceeds a limit, all of this goes with it: nothing passes from one program to the next.

execution_worker.py is the side that runs inside. Processes are started ahead of time (Sandbox), so that a program need not
wait for Python. A child that must die with its parent dies with the *thread* that started it (prctl(2), PR_SET_PDEATHSIG),
so one thread starts all processes of a Sandbox.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import queue
import secrets
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import NanochatError, as_unicode, first_line
from nanochat.cpu import usable_cores

DEFAULT_MEMORY_BYTES = 256 * 1024**2  # address space, the interpreter's 30 MiB included
MAX_OUTPUT_BYTES = 64 * 1024  # of stdout, of stderr, and of what a program writes to the report pipe
DISK_BYTES = 16 * 1024**2  # of the work folder, which is memory
DISK_FILES = 4096
START_TIMEOUT_S = 60.0  # a worker is ready in 0.1 s; a machine that pages may need longer
EXIT_TIMEOUT_S = 2.0  # for a process that closed its pipes, or was killed, to be gone

WORKER = Path(__file__).with_name("execution_worker.py")
ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
DEVICES = ("null", "zero", "urandom")
DROP_PRIVILEGES = 'setpriv --no-new-privs --bounding-set=-all --inh-caps=-all --ambient-caps=-all "$@"'

# System calls that a program does not need: for more processes, other processes, the network, memory outside of the limit,
# namespaces and mounts, and calls that have often been a way into the kernel.
DENIED_CALLS = """
    fork vfork clone execve execveat unshare setns mount umount umount2 pivot_root chroot mount_setattr move_mount open_tree
    fsopen fsmount fsconfig fspick ptrace process_vm_readv process_vm_writev process_madvise pidfd_open pidfd_getfd
    pidfd_send_signal kcmp socket connect bind listen accept accept4 memfd_create memfd_secret shmget shmat msgget semget
    mq_open bpf keyctl add_key request_key perf_event_open io_uring_setup io_uring_enter io_uring_register io_setup userfaultfd
    kexec_load kexec_file_load init_module finit_module delete_module reboot personality acct quotactl swapon swapoff syslog
    settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname iopl ioperm modify_ldt fanotify_init
    inotify_init inotify_init1 name_to_handle_at open_by_handle_at lookup_dcookie mknod mknodat vhangup uselib ustat sysfs
    mbind migrate_pages move_pages set_mempolicy seccomp landlock_create_ruleset sync syncfs
""".split()


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended. success: it ran to its end without an exception; error: else why, in one line."""

    success: bool
    stdout: str
    stderr: str
    error: str | None = None
    timeout: bool = False
    memory_exceeded: bool = False


def execute_code(code: str, timeout: float = 5.0, maximum_memory_bytes: int = DEFAULT_MEMORY_BYTES) -> ExecutionResult:
    """Run one program for at most `timeout` seconds, in isolation unless NANOCHAT_UNSAFE_EXECUTION=1.

    Raises NanochatError if nothing can isolate it. For many programs a Sandbox is faster.
    """
    process = _Process(choose_launcher())
    try:
        return process.run(code, timeout, maximum_memory_bytes)
    finally:
        process.close()


class Sandbox:
    """A pool: `size` processes wait for a program while up to `size` others run one. Usable from many threads.

    Raises NanochatError if nothing can isolate programs, unless NANOCHAT_UNSAFE_EXECUTION=1. Close it, or use it in a `with`.
    """

    def __init__(self, size: int | None = None) -> None:
        size = size or usable_cores()  # more at once would run out of time
        self._launcher = choose_launcher()
        self._slots = threading.Semaphore(size)  # programs that may start
        self._wanted = threading.Semaphore(size)  # processes that may be started
        self._waiting: queue.Queue[_Process | Exception | None] = queue.Queue()  # None: closed
        self._closed = False
        self._starter = threading.Thread(target=self._start_processes, name="sandbox", daemon=True)
        self._starter.start()

    def _start_processes(self) -> None:
        while True:
            self._wanted.acquire()
            if self._closed:
                break
            try:
                self._waiting.put(_Process(self._launcher))
            except Exception as error:  # too many processes or files, no memory: the next caller gets it
                self._waiting.put(error)
        self._waiting.put(None)
        while (process := self._waiting.get()) is not None:
            if isinstance(process, _Process):
                process.close()
        self._waiting.put(None)

    def run(self, code: str, timeout_s: float = 5.0) -> ExecutionResult:
        """Run one program for at most `timeout_s` seconds, not counting the wait for its turn."""
        with self._slots:
            process = self._waiting.get()
            if process is None:
                self._waiting.put(None)
                raise NanochatError("this sandbox is closed: make another one")
            self._wanted.release()  # the next one starts while this one works
            if isinstance(process, NanochatError):
                raise process
            if isinstance(process, Exception):
                reason = first_line(process)
                raise NanochatError(f"no process for a program ({reason}): end others, or raise that limit") from process
            try:
                return process.run(code, timeout_s, DEFAULT_MEMORY_BYTES)
            finally:
                process.close()

    def close(self) -> None:
        """End all processes, those that run a program too: they die with the thread that started them."""
        self._closed = True
        self._wanted.release()
        self._starter.join()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Process:
    """A worker, for one program."""

    def __init__(self, launcher: Callable[[], list[str]]) -> None:
        """Start it, without waiting until it is ready. Raises OSError."""
        self._isolated, self._killed = launcher is not plain_command, False
        self._folder = None if self._isolated else tempfile.TemporaryDirectory(prefix="nanochat-", ignore_cleanup_errors=True)
        work = self._folder.name if self._folder else "/scratch"
        read_end, write_end = os.pipe()
        self._report = open(read_end, "rb", buffering=0)  # noqa: SIM115 - closed with the process
        try:
            self._process: Any = subprocess.Popen(  # its type calls the pipes optional
                [*launcher(), str(write_end)], pass_fds=[write_end], start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                cwd=work if self._folder else "/", env={**ENVIRONMENT, "HOME": work, "TMPDIR": work},
            )  # fmt: skip
        except BaseException:
            self._report.close()
            raise
        finally:
            os.close(write_end)

    def run(self, code: str, timeout_s: float, memory_bytes: int) -> ExecutionResult:
        """Run the program. Raises NanochatError if the process never got ready for one."""
        self._wait_until_ready()
        key = secrets.token_bytes(32)
        request: dict[str, Any] = {"code": code, "key": key.hex(), "filter": (build_filter() or b"").hex()}
        request |= {"memory_bytes": memory_bytes, "cpu_s": int(timeout_s) + 2, "file_bytes": DISK_BYTES}
        output = [bytearray(), bytearray(), bytearray()]  # stdout, stderr, report
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(BrokenPipeError):  # it died; its exit says how
            self._process.stdin.write(json.dumps(request).encode())
            self._process.stdin.close()
        error = self._gather(output, key, deadline)
        verdict = _find_verdict(output[2], key)
        exit_code = self._kill()
        stdout, stderr = (bytes(part[:MAX_OUTPUT_BYTES]).decode("utf-8", "replace") for part in output[:2])
        timed_out, memory = error == "timeout", error is None and verdict == "memory"
        if timed_out:
            error = f"timed out after {timeout_s:g} s"
        elif memory:
            error = f"memory limit of {memory_bytes / 1024**2:g} MiB"
        elif error is None and verdict != "ok":
            error = verdict or _describe_exit(exit_code)
        return ExecutionResult(error is None, stdout, stderr, error, timed_out, memory)

    def _wait_until_ready(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._report, selectors.EVENT_READ)
            began = bool(selector.select(START_TIMEOUT_S))
        if not began or self._report.read(1) != b"+":
            self._kill()
            reason = self._process.stderr.read(4096).decode("utf-8", "replace").strip().splitlines()
            raise NanochatError(reason[-1] if reason else f"no sign of life in {START_TIMEOUT_S:g} s")

    def _gather(self, output: list[bytearray], key: bytes, deadline: float) -> str | None:
        """Gather output until the verdict, the end or the deadline; returns "timeout" or the limit that was exceeded."""
        with selectors.DefaultSelector() as selector:
            for pipe, buffer in zip((self._process.stdout, self._process.stderr, self._report), output, strict=True):
                selector.register(pipe, selectors.EVENT_READ, buffer)
            while selector.get_map():
                finished = _find_verdict(output[2], key) is not None
                ready = selector.select(0 if finished else max(0.0, deadline - time.monotonic()))
                if not ready:  # a worker flushes before it reports, so what is not there then will not come
                    return None if finished else "timeout"
                for item, _ in ready:
                    content = os.read(item.fd, 65536)
                    if not content:
                        selector.unregister(item.fileobj)
                    item.data.extend(content)
                    if len(item.data) > MAX_OUTPUT_BYTES:
                        return f"output limit of {MAX_OUTPUT_BYTES // 1024} KiB"
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its pipes and stays
            self._process.wait(EXIT_TIMEOUT_S)
        return None

    def _kill(self) -> int:
        """End whatever is left, and reap it; returns the exit code, as subprocess gives it."""
        process = self._process
        if not self._killed:
            self._killed = True  # once: later its number may be another's
            if self._isolated and process.poll() is None:
                # The launcher's child is process 1 of the namespace: the kernel ends all others with it, and the launcher
                # reaps it. Killing the launcher first would leave a zombie where the machine's process 1 reaps none.
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
                    for child in children.split():
                        os.kill(int(child), signal.SIGKILL)
                    process.wait(EXIT_TIMEOUT_S)
            if not self._isolated or process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a zombie
                    os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def close(self) -> None:
        """Kill the process and remove what it leaves: pipes, its folder."""
        self._kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr, self._report):
            with contextlib.suppress(BrokenPipeError):  # part of a request was left to write
                pipe.close()
        if self._folder:
            with contextlib.suppress(RecursionError):  # folders a thousand deep
                self._folder.cleanup()


def _find_verdict(report: bytearray, key: bytes) -> str | None:
    """ "ok", "memory" or why the program failed; None unless the report's last line is complete and correctly signed."""
    if not report.endswith(b"\n"):
        return None
    verdict, _, signature = bytes(report).rstrip(b"\n").rpartition(b"\n")[2].rpartition(b" ")
    expected = hashlib.blake2b(verdict, key=key, digest_size=32).hexdigest().encode()
    if not secrets.compare_digest(signature, expected):
        return None
    reason = verdict.removeprefix(b"error ")
    if reason == verdict:
        return verdict.decode()
    return as_unicode(" ".join(reason[1:-1].decode("unicode_escape", "replace").removesuffix(": ").splitlines()))


def _describe_exit(exit_code: int) -> str:
    """A launcher exits with 128 + the signal that ended the worker; subprocess gives -signal for its own child."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    return f"ended with signal {number}" if number > 0 else f"ended before its end with exit code {exit_code}"


@functools.lru_cache(maxsize=1)
def build_filter() -> bytes | None:
    """The system call filter as a BPF program; None where libseccomp is missing.

    Without it, namespaces and limits still hold, but leave open shared memory and sockets to the host (AF_VSOCK).
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError, AttributeError):  # no package, no library, or one that lacks a function
        return None
    program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for code, names in ((errno.EPERM, DENIED_CALLS), (errno.ENOSYS, ["clone3"])):  # ENOSYS: the C library then tries clone
        for name in names:
            with contextlib.suppress(ValueError, OSError):  # unknown on this architecture, or newer than the library
                program.add_rule(pyseccomp.ERRNO(code), name)
    with tempfile.TemporaryFile() as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


# ----------------------------------------------------------------------------- launchers: commands that start a worker


def choose_launcher() -> Callable[[], list[str]]:
    if sys.platform == "win32":
        raise NanochatError("programs of a model run on Linux, or with --unsafe-execution on macOS: use WSL on Windows")
    return plain_command if os.environ.get("NANOCHAT_UNSAFE_EXECUTION") == "1" else find_launcher()


@functools.lru_cache(maxsize=1)
def find_launcher() -> Callable[[], list[str]]:
    """The first launcher that manages to start a worker here. Raises NanochatError that says what each lacks."""
    way_out = "or run programs without isolation with --unsafe-execution (NANOCHAT_UNSAFE_EXECUTION=1)"
    if sys.platform != "linux":
        raise NanochatError(f"programs of a model can be isolated only on Linux, not on {sys.platform}: use Linux, {way_out}")
    if os.geteuid() == 0 and not build_filter():  # RLIMIT_NPROC does not bind root
        raise NanochatError(
            "as root nothing limits the processes of a program without libseccomp: install libseccomp2 (and pip install "
            f"pyseccomp), run as another user, {way_out}"
        )
    reasons = []
    for name, launcher in LAUNCHERS.items():
        if (reason := why_unusable(name)) is None:
            return launcher
        reasons.append(f"{name}: {reason}")
    raise NanochatError(
        f"nothing isolates the programs of a model here ({'; '.join(reasons)}): install bubblewrap and allow user "
        f"namespaces, {way_out}"
    )


def why_unusable(name: str) -> str | None:
    """Why a launcher does not work on this machine; None if it does."""
    if shutil.which(name, path=ENVIRONMENT["PATH"]) is None:
        return "not installed"
    try:
        process = _Process(LAUNCHERS[name])
        try:
            return process.run("pass", START_TIMEOUT_S, DEFAULT_MEMORY_BYTES).error
        finally:
            process.close()
    except (NanochatError, OSError) as error:
        return str(error)


def python_command(worker: str) -> list[str]:
    """The base interpreter without a virtual environment's packages; the caller appends the report's fd."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", worker]


def plain_command() -> list[str]:
    """Starts a worker without isolation, under limits only."""
    return python_command(str(WORKER))


def root_layout() -> tuple[list[str], dict[str, str]]:
    """What Python needs: (folders to mount read-only at the same path, symbolic links as {path: target}).

    Raises NanochatError if mounting Python's files would expose the home folder.
    """
    folders, links = ["/usr"], {}
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.isdir(path):
            folders.append(path)
    for prefix in (Path(os.path.realpath(sys.executable)).parents[1], Path(os.path.realpath(sys.base_prefix))):
        if Path(os.path.expanduser("~")).is_relative_to(prefix):
            raise NanochatError(f"Python is installed in {prefix}, which holds the home folder: use another Python")
        if not any(prefix.is_relative_to(folder) for folder in folders):
            folders.append(str(prefix))
    return folders, links


def bwrap_command() -> list[str]:
    folders, links = root_layout()
    command = "bwrap --unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts --die-with-parent".split()
    for folder in folders:
        command += ["--ro-bind", folder, folder]
    for path, target in links.items():
        command += ["--symlink", target, path]
    for name in DEVICES:
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    command += ["--ro-bind", str(WORKER), "/sandbox/worker.py", "--size", str(DISK_BYTES), "--tmpfs", "/scratch"]
    command += ["--remount-ro", "/", "--chdir", "/scratch"]
    # What bwrap cannot do: limit the number of files, and mount devices so that not even their owner can change them.
    command += "--uid 0 --gid 0 --cap-drop ALL --cap-add CAP_SYS_ADMIN --cap-add CAP_SETPCAP sh -c".split()
    lines = ["set -e", f"mount -t tmpfs -o remount,nr_inodes={DISK_FILES},nosuid,nodev sandbox /scratch"]
    lines += ["for device in /dev/*; do mount -o remount,bind,ro,nosuid $device; done", f"exec {DROP_PRIVILEGES}"]
    return [*command, "\n".join(lines), "sh", *python_command("/sandbox/worker.py")]


def unshare_command() -> list[str]:
    """The same without bwrap: a shell, process 1 of the new namespaces, builds the root and starts the worker in it."""
    folders, links = root_layout()
    # /sys serves as the mount point: it always exists, and nothing below it is needed.
    lines = ["set -e", "mount -t tmpfs -o size=1m,mode=755 sandbox /sys", "cd /sys", "mkdir dev old proc sandbox scratch"]
    for folder in map(shlex.quote, folders):
        lines.append(f"mkdir -p .{folder}; mount --rbind {folder} .{folder}")
    for path, target in links.items():
        lines.append(f"ln -s {shlex.quote(target)} .{path}")
    for source, path in [(str(WORKER), "sandbox/worker.py"), *((f"/dev/{name}", f"dev/{name}") for name in DEVICES)]:
        lines.append(f": > {path}; mount --bind {shlex.quote(source)} {path}")
    lines += [
        # Remount each one: mounts below a read-only mount do not become read-only with it.
        "while read -r _ _ _ _ point _; do",
        "  case $point in /sys|/sys/*) ;; *) continue;; esac",
        '  point=$(printf %b "$point"); options=remount,bind,ro,nosuid',
        "  case $point in /sys/dev/*) ;; *) options=$options,nodev;; esac",
        '  [ ! -e "$point" ] || mount -o $options "$point"',  # the old /sys has mounts below it, now hidden
        "done < /proc/self/mountinfo",
        f"mount -t tmpfs -o size={DISK_BYTES},nr_inodes={DISK_FILES},mode=700,nosuid,nodev sandbox scratch",
        "mount --rbind /proc proc",  # for umount, which looks there
        "pivot_root . old; umount -l /old; umount -l /proc; cd /scratch",
        DROP_PRIVILEGES,
        "exit $?",  # after a last command, the shell would turn into it, and the worker into process 1
    ]
    unshare = "setpriv --pdeathsig KILL unshare --user --map-root-user --mount --pid --net --ipc --uts --kill-child".split()
    return [*unshare, "sh", "-c", "\n".join(lines), "sh", *python_command("/sandbox/worker.py")]


LAUNCHERS = {"bwrap": bwrap_command, "unshare": unshare_command}

"""Programs run in isolation: what they may do works, and what they may not is stopped, whichever way they try."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from nanochat import execution
from nanochat.common import NanochatError
from nanochat.execution import ExecutionResult, Sandbox, execute_code
from tasks import build_task
from tests.hostile_programs import FAILS, HANG_S, HOSTILE, MEMORY, OK, ORDINARY, PRELUDE, SECRET, TIMEOUT

if sys.platform != "linux":
    pytest.skip("isolation needs Linux", allow_module_level=True)


@pytest.fixture(scope="module")
def usable_launchers() -> list[str]:
    names = [name for name in execution.LAUNCHERS if execution.why_unusable(name) is None]
    if not names:
        pytest.skip("neither bwrap nor unshare can isolate here")
    return names


@pytest.fixture
def sandbox(usable_launchers: list[str]) -> Iterator[Sandbox]:
    with Sandbox(2) as sandbox:
        yield sandbox


@pytest.fixture
def adopted_children() -> Iterator[Callable[[], list[psutil.Process]]]:
    """Orphans below this process become its children: what a sandbox left behind can be told from others' processes."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    before = set(psutil.Process().children(recursive=True))

    def left() -> list[psutil.Process]:
        deadline = time.monotonic() + 20  # the kernel needs a moment to end a namespace
        while (children := set(psutil.Process().children(recursive=True)) - before) and time.monotonic() < deadline:
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):  # reaped, or another's child
                    if child.status() == psutil.STATUS_ZOMBIE:
                        os.waitpid(child.pid, os.WNOHANG)
            time.sleep(0.05)
        return list(children)

    yield left
    libc.prctl(36, 0, 0, 0, 0)


def state_of_this_process() -> tuple[object, ...]:
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return len(os.listdir("/proc/self/fd")), dict(os.environ), os.getcwd(), handlers, os.umask(os.umask(0o22))


def how_it_ended(result: ExecutionResult, expected: str) -> bool:
    if expected == OK:
        return result.success and result.error is None
    if result.success or not result.error or result.timeout != (expected == TIMEOUT):
        return False
    if expected in (MEMORY, TIMEOUT):
        return result.memory_exceeded == (expected == MEMORY)
    return expected == FAILS or (expected in result.error and not result.memory_exceeded)


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_hostile_programs(
    which: int, usable_launchers: list[str], adopted_children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if which >= len(usable_launchers):
        missing = {name: execution.why_unusable(name) for name in set(execution.LAUNCHERS) - set(usable_launchers)}
        pytest.skip(f"only one launcher is usable here: {missing}")
    if execution.build_filter() is None:
        pytest.skip("libseccomp is missing: the namespaces alone do not stop all of these")
    launcher = execution.LAUNCHERS[usable_launchers[which]]
    monkeypatch.setattr(execution, "find_launcher", lambda: launcher)
    monkeypatch.setenv(SECRET, "x")
    replacements = {"PARENT": str(os.getpid()), "OUTSIDE": str(tmp_path), "HOME/": f"{Path.home()}/", "SECRET": SECRET}
    worker = execution.WORKER.read_bytes()
    files = sorted(tmp_path.rglob("*"))
    before = state_of_this_process()
    wrong = []

    def run(row: tuple[str, str, str]) -> None:
        name, code, expected = row
        for mark, value in replacements.items():
            code = code.replace(mark, value)
        timeout_s = HANG_S if expected == TIMEOUT else 20.0
        began = time.monotonic()
        result = sandbox.run(code if "source" in name else PRELUDE + code, timeout_s)
        late = time.monotonic() - began > timeout_s + 20  # the wait for a turn and a process included
        if late or not how_it_ended(result, expected) or "ESCAPED" in result.stdout + result.stderr:
            wrong.append((name, expected, result.error, result.stdout[-300:], result.stderr[-300:], late))

    with Sandbox(4) as sandbox, ThreadPoolExecutor(4) as threads:
        list(threads.map(run, HOSTILE))
    assert not wrong, "\n".join(map(repr, wrong))
    assert adopted_children() == []
    assert state_of_this_process() == before
    assert execution.WORKER.read_bytes() == worker
    assert sorted(tmp_path.rglob("*")) == files


def test_ordinary_programs(sandbox: Sandbox) -> None:
    for code, printed in ORDINARY:
        result = sandbox.run(code, 20)
        assert (result.success, result.error, result.stdout) == (True, None, printed), (code, result)


def test_programs_start_afresh(sandbox: Sandbox) -> None:
    code = (
        "import builtins, math, os, sys\n"
        "state = (os.listdir('/scratch'), hasattr(builtins, 'mark'), math.pi, len(sys.modules), os.getcwd())\n"
        "print(state)\n"
        "open('/scratch/x', 'w'); builtins.mark = math.pi = 3; sys.modules['y'] = sys; os.chdir('/')"
    )
    assert len({sandbox.run(code, 20).stdout for _ in range(5)}) == 1


def test_many_threads_at_once(usable_launchers: list[str], adopted_children) -> None:
    with Sandbox(2) as sandbox, ThreadPoolExecutor(16) as threads:
        outputs = list(threads.map(lambda i: sandbox.run(f"print({i} ** 2)", 20).stdout, range(32)))
    assert outputs == [f"{i**2}\n" for i in range(32)]
    assert adopted_children() == []


def test_streams_and_limits_of_one_program(usable_launchers: list[str]) -> None:
    result = execute_code("import sys\nprint(1)\nprint(2, file=sys.stderr)\nraise ValueError('three\\nlines')", 20)
    assert result == ExecutionResult(False, "1\n", "2\n", "ValueError: three lines")
    assert execute_code("raise KeyError", 20).error == "KeyError"
    for text in ("'\\ud800' * 500", "'a\\r\\u2028b'"):
        error = execute_code(f"raise ValueError({text})", 20).error
        assert error is not None
        assert error.encode() and len(error.splitlines()) == 1
    assert execute_code("x = bytes(50 << 20)", 20, 128 << 20).success
    too_much = execute_code("x = bytes(128 << 20)", 20, 128 << 20)
    assert (too_much.error, too_much.memory_exceeded) == ("memory limit of 128 MiB", True)
    slow = execute_code("print('began', flush=True)\nwhile True: pass", 0.5)
    assert (slow.stdout, slow.error, slow.timeout) == ("began\n", "timed out after 0.5 s", True)


def test_closed_sandbox(usable_launchers: list[str], adopted_children) -> None:
    before = state_of_this_process()
    sandbox = Sandbox(2)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(sandbox.run, "while True: pass", 60)
        time.sleep(1)
        sandbox.close()
        sandbox.close()
        with contextlib.suppress(NanochatError):  # a slow machine had not begun with it
            assert not running.result(10).success
    for _ in range(2):
        with pytest.raises(NanochatError, match="closed"):
            sandbox.run("pass")
    assert adopted_children() == []
    assert state_of_this_process() == before


def test_whoever_asks_is_told_why_no_process_began(usable_launchers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    works = execution.find_launcher()
    trouble = iter([OSError("too many"), MemoryError(), ValueError("a\nb"), NanochatError("use another Python")])
    told = []

    def launcher() -> list[str]:
        if error := next(trouble, None):
            raise error
        return works()

    def ask() -> None:
        for _ in range(5):
            try:
                told.append(sandbox.run("print(1)", 20).stdout)
            except NanochatError as error:
                told.append(str(error))

    monkeypatch.setattr(execution, "choose_launcher", lambda: launcher)
    before = state_of_this_process()
    with Sandbox(1) as sandbox:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(60)
    reasons = ("too many", "MemoryError", "a")
    assert told[:3] == [f"no process for a program ({reason}): end others, or raise that limit" for reason in reasons]
    assert told[3:] == ["use another Python", "1\n"]
    assert state_of_this_process() == before


def test_no_more_programs_run_at_once_than_were_asked_for(usable_launchers: list[str]) -> None:
    """Each has its time to itself; those that wait for their turn lose none of it."""
    code = "import time\nprint(time.time())\ntime.sleep(0.3)\nprint(time.time())"
    with Sandbox(1) as sandbox, ThreadPoolExecutor(3) as threads:
        outputs = list(threads.map(lambda _: sandbox.run(code, 20).stdout, range(3)))
    times = sorted(tuple(map(float, output.split())) for output in outputs)
    assert all(end <= begin for (_, end), (begin, _) in zip(times, times[1:], strict=False))


PARENT_TO_KILL = """
import threading, time
import psutil
from nanochat import execution
sandbox = execution.Sandbox(2)
threading.Thread(target=sandbox.run, args=("while True: pass", 60)).start()
threading.Thread(target=sandbox.run, args=("import time; time.sleep(60)", 60)).start()
while len(psutil.Process().children(recursive=True)) < 4:
    time.sleep(0.1)
time.sleep(1)
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("unsafe", ["0", "1"])
def test_killed_parent_leaves_nothing(unsafe: str, usable_launchers: list[str], adopted_children, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT_TO_KILL],
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "TMPDIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "NANOCHAT_UNSAFE_EXECUTION": unsafe,
        },
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"started\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert adopted_children() == []


def test_unsafe_execution_has_limits_only(adopted_children, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(execution, "find_launcher", lambda: pytest.fail("no isolation was asked for"))
    monkeypatch.setenv("NANOCHAT_UNSAFE_EXECUTION", "1")
    monkeypatch.setenv(SECRET, "x")
    before = state_of_this_process()
    result = execute_code("import os\nprint(sorted(os.environ), os.getcwd() == os.environ['HOME'])\nopen('x', 'w')", 20)
    assert (result.stdout, result.error) == ("['HOME', 'LANG', 'PATH', 'TMPDIR'] True\n", None)
    assert execute_code("x = []\nwhile True: x.append('y' * 10**6)", 20).memory_exceeded
    assert execute_code("while True: pass", 0.5).timeout
    assert execute_code("import os\nos.closerange(0, 64)\nwhile True: pass", 0.5).error
    assert execute_code("import os\nos._exit(0)", 20).error == "ended before its end with exit code 0"
    assert execute_code("import os\nos.abort()", 20).error == "ended with signal 6"
    killed, kill = [], os.killpg
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda group, number: killed.append(group) or kill(group, number))
        assert execute_code("pass", 20).success
    assert len(killed) == 1  # once it is gone, its number may be another's
    with Sandbox(2) as sandbox:
        assert sandbox.run("print(1)", 20) == ExecutionResult(True, "1\n", "")
    assert adopted_children() == []
    assert list(tmp_path.iterdir()) == []
    assert state_of_this_process() == before


def test_falls_back_to_the_other_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "why_unusable", lambda name: "broken" if name == "bwrap" else None)
    assert execution.find_launcher.__wrapped__() is execution.unshare_command


def test_refuses_without_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    execution.find_launcher.cache_clear()
    monkeypatch.setitem(execution.ENVIRONMENT, "PATH", "/nonexistent")
    for run, unsafe in itertools.product((lambda: execute_code("print(1)"), Sandbox), ("", "0")):
        monkeypatch.setenv("NANOCHAT_UNSAFE_EXECUTION", unsafe)
        with pytest.raises(NanochatError, match="bwrap: not installed; unshare: not installed.*--unsafe-execution"):
            run()


def test_says_why_a_launcher_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        execution.LAUNCHERS, "unshare", lambda: ["sh", "-c", "echo trying >&2; echo no namespaces >&2; exit 1", "sh"]
    )
    assert execution.why_unusable("unshare") == "no namespaces"


def test_refuses_root_without_a_limit_on_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "build_filter", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(NanochatError, match="libseccomp2.*another user.*--unsafe-execution"):
        execution.find_launcher.__wrapped__()


def test_refuses_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NanochatError, match="only on Linux, not on darwin.*--unsafe-execution"):
        execution.find_launcher.__wrapped__()


def test_a_python_in_the_home_folder_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(os.path.realpath(sys.executable)).parent))
    with pytest.raises(NanochatError, match="holds the home folder"):
        execution.root_layout()


@pytest.mark.slow
def test_reference_solutions_pass(usable_launchers: list[str], real_data: Path) -> None:
    task = build_task("HumanEval", "test", real_data / "tasks")
    conversations = [task[i] for i in range(len(task))]
    with ThreadPoolExecutor(4) as threads:
        passed = list(threads.map(lambda c: task.evaluate(c, c["messages"][-1]["content"]), conversations))
    assert passed == [True] * 164


def test_judges_completions(usable_launchers: list[str], tmp_path: Path) -> None:
    row = {
        "prompt": "from typing import List\n\n\ndef add(a, b):\n    return a + b\n\n\n"
        "def total(xs: List[int]) -> int:\n    \"\"\" Sum. \"\"\"\n",
        "canonical_solution": "    return sum(xs)\n", "entry_point": "total",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
    }  # fmt: skip
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(row) + "\n")
    task = build_task("HumanEval", "test", tmp_path)
    conversation = task[0]
    right = "def total(xs: List[int]) -> int:\n    return sum(xs)\n"
    assert task.evaluate(conversation, right)
    assert task.evaluate(conversation, "    return sum(xs)\n")  # the function's first lines stand in the problem
    assert task.evaluate(conversation, "def total(xs: List[int]):\n    return add(*xs)\n")  # and a helper
    assert task.evaluate(conversation, f"Here it is:\n```python\n{right}```\nDone.")
    assert task.evaluate(conversation, conversation["messages"][-1]["content"])
    for wrong in ("", "I do not know.", right.replace("sum", "max"), "import os\nos._exit(0)", "def total(xs): ..."):
        assert not task.evaluate(conversation, wrong), wrong

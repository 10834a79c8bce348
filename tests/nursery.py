"""Programs without the wait for their imports: forked from a process that has imported torch and all of nanochat.

Importing torch takes two seconds of a core, and the tests start hundreds of processes. A forked program has the arguments,
environment, output and exit code that `python` would give it, and one thread.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SERVER = """
import gc, json, os, runpy, sys, traceback
import torch, torch.distributed.checkpoint, torch.distributed.fsdp
from nanochat import sharding
from nanochat.devices import get_compute_dtype
from nanochat.machine import measure_matmul_rate
from scripts import base_eval, base_train, chat_eval, chat_rl, chat_sft

for dtype in {get_compute_dtype("cpu"), torch.float32}:
    measure_matmul_rate(torch.device("cpu"), dtype)  # half a second, remembered by all that are forked
gc.collect()
gc.freeze()

def live(command, environment, log):
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    code = 0
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.modules.pop(command[1], None)  # it is run as __main__
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:
    what, *rest = json.loads(line)
    if what == "start":
        answer = os.fork() or live(*rest)
    else:
        pid, status = os.waitpid(rest[0], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    print(json.dumps(answer), flush=True)
"""


class Nursery:
    """The process that programs are forked from."""

    def __init__(self, directory: Path) -> None:
        command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        self._directory, self._born = directory, 0

    def ask(self, *request: Any) -> Any:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, *command: str, **environment: str) -> Life:
        """What `python COMMAND` would start, with those variables besides the ones set now. COMMAND: -m MODULE or a file."""
        self._born += 1
        log = self._directory / f"{self._born}.log"
        log.touch()
        return Life(self, self.ask("start", command, {**os.environ, "OMP_NUM_THREADS": "1", **environment}, str(log)), log)

    def run(self, *command: str, code: int = 0, **environment: str) -> str:
        """A whole life; returns what it printed."""
        life = self.start(*command, **environment)
        assert life.wait() == code, life.said()
        return life.said()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


class Life:
    """One run of a program."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self._nursery, self._pid, self._log = nursery, pid, log
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, minus the signal's number for one that was killed; None while it lives."""
        if self._code is None:
            self._code = self._nursery.ask("poll", self._pid)
        return self._code

    def wait(self, until: Callable[[], bool] = lambda: False, timeout_s: float = 60.0, pause_s: float = 0.004) -> int | None:
        """Until it has ended or something else is so; returns the exit code, or None while it lives."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and not until():
            assert time.monotonic() < deadline, self.said()
            time.sleep(pause_s)
        return self._code

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:  # it is not waited for before the next poll: the number is still its own
            os.kill(self._pid, number)

    def said(self) -> str:
        """What it has printed, errors included."""
        return self._log.read_text(encoding="utf-8")

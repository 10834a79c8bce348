"""Starts the commands as torchrun does, on several ranks and nodes. Used by test_distributed.py, test_lost_ranks.py and
test_rl.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from scripts import base_train

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.2"]
# Wide enough for rounding not to grow: in a model of 32 channels it makes 1e-4 of itself within 40 steps. Two thirds of the
# usual rates serve the same end: with all of them, losses around step 20, where they fall fastest, differ by 1.2e-4.
SMALL = [
    "--depth=2", "--aspect-ratio=64", "--head-dim=64", "--max-seq-len=128", "--total-batch-size=1024",
    "--device-batch-size=2", "--device-type=cpu", "--no-compile", "--eval-tokens=2048", "--sample-every=-1",
    "--keep-last=-1", "--matrix-lr=0.013", "--embedding-lr=0.2", "--unembedding-lr=0.005", "--scalar-lr=0.33",
]  # fmt: skip
WHOLE = "whole"  # the run that others are compared with
# scripts.chat_rl, with rewards by what an answer is, since a model that has learned nothing earns none.
REINFORCE = """
import sys
from nanochat.common import run_command
from nanochat.rl import RolloutLoader
from scripts import chat_rl
RolloutLoader._judge = lambda self, problem, answer: sum(answer.tokens) % 7 / 6
sys.exit(run_command(chat_rl.main))
"""

_started: list[subprocess.Popen] = []


def start(command: list[str]) -> subprocess.Popen:
    _started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return _started[-1]


def stop_all() -> None:
    """A test that fails must not leave processes that hold up the next."""
    while _started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (*psutil.Process(_started[-1].pid).children(recursive=True), _started[-1]):
                process.kill()
        _started.pop().communicate()


def launch(ranks: int, *command: str, restarts: int = 0) -> subprocess.Popen:
    return start([*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}", f"--max-restarts={restarts}", *command])


def node_command(number: int, endpoint: str, address: str, *command: str, restarts: int = 0) -> list[str]:
    """What one of two nodes starts, with one rank; endpoint: host:port of node 0, address: of this node."""
    return [
        *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--max-restarts={restarts}", "--rdzv_backend=c10d",
        f"--rdzv_id={endpoint}", f"--rdzv_endpoint={endpoint}", f"--rdzv_conf=is_host={number == 0}",
        f"--local-addr={address}", *command,
    ]  # fmt: skip


def run(ranks: int, *command: str) -> str:
    """Run a command on so many ranks to its end; returns what it printed."""
    process = launch(ranks, *command)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return output


def train(ranks: int, corpus: Path, tag: str, *flags: str) -> Path:
    arguments = [*SMALL, f"--data={corpus}", f"--model-tag={tag}", *flags]
    if ranks == 1:
        assert base_train.main(arguments) == 0
    else:
        run(ranks, "-m", "--", "scripts.base_train", *arguments)
    return Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs" / tag / "base"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

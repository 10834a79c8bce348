"""Starts commands on several ranks: by torchrun, where that is what is tested, otherwise forked with its variables set."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import torch.distributed as dist

from scripts import base_train
from tests.nursery import ROOT, Life, Nursery

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.2"]
# Wide enough for rounding not to grow: in a model of 32 channels it makes 1e-4 of itself within 40 steps. Two thirds of the
# usual rates serve the same end: with all of them, losses around step 20, where they fall fastest, differ by 1.2e-4.
SMALL = [
    "--depth=2", "--aspect-ratio=64", "--head-dim=64", "--max-seq-len=128", "--total-batch-size=1024",
    "--device-batch-size=2", "--device-type=cpu", "--no-compile", "--eval-tokens=2048", "--sample-every=-1",
    "--keep-last=-1", "--matrix-lr=0.013", "--embedding-lr=0.2", "--unembedding-lr=0.005", "--scalar-lr=0.33",
]  # fmt: skip
WHOLE = "whole"  # the run that others are compared with

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


def launch(ranks: int, *command: str) -> subprocess.Popen:
    return start([*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}", *command])


def node_command(number: int, endpoint: str, address: str, *command: str, restarts: int = 0) -> list[str]:
    """What one of two nodes starts, with one rank; endpoint: host:port of node 0, address: of this node."""
    return [
        *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--max-restarts={restarts}", "--rdzv_backend=c10d",
        f"--rdzv_id={endpoint}", f"--rdzv_endpoint={endpoint}", f"--rdzv_conf=is_host={number == 0}",
        f"--local-addr={address}", *command,
    ]  # fmt: skip


class Ranks:
    """Ranks on this machine, forked from the nursery."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._lives: list[Life] = []
        self._stores: list[dist.TCPStore] = []  # through which they meet; kept by the launcher, as torchrun's is

    def _start(self, ranks: int, command: tuple[str, ...]) -> list[Life]:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
        lives = [self._nursery.start(*command, RANK=str(i), LOCAL_RANK=str(i), **shared) for i in range(ranks)]
        self._lives += lives
        self._stores.append(store)
        return lives

    def run(self, ranks: int, *command: str, fails: bool = False) -> str:
        """Run a command (-m MODULE ... or a file) on so many ranks to its end; returns what they printed."""
        lives = self._start(ranks, command)
        codes = [life.wait(timeout_s=300, pause_s=0.02) for life in lives]
        said = "".join(life.said() for life in lives)
        assert all(code != 0 for code in codes) if fails else not any(codes), f"{codes}: {said[-3000:]}"
        return said

    def train(self, ranks: int, corpus: Path, tag: str, *flags: str) -> Path:
        """Train a small base model; returns the stage's directory."""
        arguments = [*SMALL, f"--data={corpus}", f"--model-tag={tag}", *flags]
        if ranks == 1:
            assert base_train.main(arguments) == 0
        else:
            self.run(ranks, "-m", "scripts.base_train", *arguments)
        return Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs" / tag / "base"

    def stop(self) -> None:
        """End those that a test has left when it failed."""
        for life in self._lives:
            life.send(signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

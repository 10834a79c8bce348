"""A rank, a node or a link that is lost ends the job with a reason, and what is started again goes on where it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from nanochat.common import NanochatError
from nanochat.heartbeat import Heartbeat, fresh_store
from nanochat.runs import list_steps
from tests.helpers import logged, wait_for
from tests.many_ranks import SMALL, WHOLE, Ranks, free_port, launch, node_command, start
from tests.nursery import ROOT

pytestmark = pytest.mark.usefixtures("many_ranks")


def _workers(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The training processes that a launcher has now."""
    found = []
    for process in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, which its launcher may not know yet
            if "scripts.base_train" in process.cmdline():
                found.append(process)
    return found


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_a_reason(many_ranks: Ranks, corpus: Path, base_dir: Path) -> None:
    """Soon, and what it saved is gone on from as if nothing had happened."""
    flags = [*SMALL, f"--data={corpus}", "--model-tag=killed", "--num-iterations=40", "--save-every=4", "--resume=auto"]
    expected = logged(many_ranks.train(1, corpus, WHOLE, "--num-iterations=40"))
    stage_dir = base_dir / "runs" / "killed" / "base"
    job = launch(2, "-m", "--", "scripts.base_train", *flags)
    wait_for(lambda: len(list_steps(stage_dir)) >= 2, "two checkpoints")
    killed_at = time.monotonic()
    _workers(job)[1].send_signal(signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert time.monotonic() - killed_at < 60
    assert "exitcode  : -9" in errors  # torchrun's own report names the rank
    assert "[rank0]:" not in errors  # no trace of ours
    many_ranks.run(2, "-m", "scripts.base_train", *flags)
    assert logged(stage_dir) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_one_node_of_two_restarts(many_ranks: Ranks, corpus: Path, base_dir: Path) -> None:
    """A process of it is killed: both nodes start theirs again, and the run ends as if nothing had happened."""
    expected = logged(many_ranks.train(1, corpus, WHOLE, "--num-iterations=40"))
    command = ["-m", "--", "scripts.base_train", *SMALL, f"--data={corpus}", "--num-iterations=40", "--save-every=4"]
    command += ["--model-tag=near", "--resume=auto"]
    stage_dir, endpoint = base_dir / "runs" / "near" / "base", f"127.0.0.1:{free_port()}"
    nodes = [start(node_command(i, endpoint, "127.0.0.1", *command, restarts=2)) for i in range(2)]
    wait_for(lambda: len(list_steps(stage_dir)) >= 2, "two checkpoints")
    first = [process for node in nodes for process in _workers(node)]
    first[1].send_signal(signal.SIGKILL)
    wait_for(lambda: all(set(_workers(node)) - set(first) for node in nodes), "new processes on both nodes")
    for node in nodes:
        _, errors = node.communicate(timeout=200)
        assert node.returncode == 0, errors[-3000:]
    assert logged(stage_dir) == pytest.approx(expected, abs=1e-4)


def _fail(many_ranks: Ranks, script: str, folder: Path, corpus: Path, *flags: str) -> str:
    """Train on two ranks by a script that does not end well; returns what they said."""
    (folder / "script.py").write_text(script, encoding="utf-8")
    return many_ranks.run(2, str(folder / "script.py"), *SMALL, f"--data={corpus}", "--num-iterations=9", *flags, fails=True)


DIVERGED = """
import torch
from nanochat import trainer
from scripts import base_train
from nanochat.common import get_dist_info, run_command
step = trainer.Trainer._train_step
def flip_a_bit(self):
    step(self)
    if self.step == 6 and self.rank == 1:
        with torch.no_grad():
            self.model.wte.weight.view(torch.int32)[7, 3] ^= 1
trainer.Trainer._train_step = flip_a_bit
raise SystemExit(run_command(base_train.main))
"""


@pytest.mark.slow
def test_ranks_that_differ_by_one_bit_stop(many_ranks: Ranks, corpus: Path, base_dir: Path, tmp_path: Path) -> None:
    """And the checkpoint of that moment is not written: the last good one is named.

    (A step later the optimizer's all-gather would have mended it.)
    """
    errors = _fail(many_ranks, DIVERGED, tmp_path, corpus, "--save-every=3", "--model-tag=flipped")
    assert "the ranks hold different parameters at step 6 (1, first wte.weight)" in errors
    assert "the last good checkpoint is step 3" in errors
    assert list_steps(base_dir / "runs" / "flipped" / "base") == [3]


EVALUATION_FAILS = """
from nanochat import loss_eval
from scripts import base_train
from nanochat.common import NanochatError, get_dist_info, run_command
sum_up = loss_eval._sum_up
def fail_on_rank_1(*arguments):
    if get_dist_info().rank == 1:
        raise NanochatError("the validation shard is gone")
    return sum_up(*arguments)
loss_eval._sum_up = fail_on_rank_1
raise SystemExit(run_command(base_train.main))
"""


@pytest.mark.slow
def test_an_evaluation_that_fails_on_one_rank_costs_no_training(
    many_ranks: Ranks, corpus: Path, base_dir: Path, tmp_path: Path
) -> None:
    """All ranks save the step at which it failed, though no checkpoint was due, and the job ends at once."""
    errors = _fail(many_ranks, EVALUATION_FAILS, tmp_path, corpus, "--eval-every=5", "--model-tag=unmeasured")
    assert "error: the validation shard is gone" in errors
    assert list_steps(base_dir / "runs" / "unmeasured" / "base") == [5]


LIMIT_S = 3.0  # so long a busy machine may keep a thread from beating


def _stores(count: int) -> list[dist.TCPStore]:
    port, timeout = free_port(), timedelta(seconds=5)
    return [dist.TCPStore("127.0.0.1", port, is_master=i == 0, wait_for_workers=False, timeout=timeout) for i in range(count)]


def _hearts(reasons: list[tuple[int, str]], stores: list[dist.TCPStore], ranks: range) -> list[Heartbeat]:
    def give_up(rank: int):
        return lambda reason: reasons.append((rank, reason))

    return [Heartbeat(stores[rank], rank, len(stores), give_up(rank), beat_s=0.05, limit_s=LIMIT_S) for rank in ranks]


@pytest.mark.slow
def test_heartbeat_notices_silence_and_only_that() -> None:
    reasons: list[tuple[int, str]] = []
    stores = _stores(3)
    hearts = _hearts(reasons, stores, range(3))
    time.sleep(LIMIT_S + 0.5)
    assert not reasons
    hearts[2].stop()  # leaves as it should
    time.sleep(LIMIT_S + 0.5)
    assert not reasons
    hearts[1]._stopped.set()  # dies
    wait_for(lambda: reasons, "the loss to be noticed", 30)
    assert [rank for rank, _ in reasons] == [0]
    assert "rank 1" in reasons[0][1]
    hearts[0].stop()


class CountingStore(dist.PrefixStore):
    """A store that records which requests are sent to it."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__("", store)
        self.requests: list[str] = []

    def clone(self) -> CountingStore:
        return self

    def add(self, key: str, amount: int) -> int:
        self.requests.append("add")
        return super().add(key, amount)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests.append("multi_get")
        return super().multi_get(keys)


def test_a_beat_is_two_requests_however_many_ranks_there_are() -> None:
    stores = [CountingStore(dist.HashStore()) for _ in range(2)]
    for store, world_size in zip(stores, (2, 500), strict=True):
        heart = Heartbeat(store, 0, world_size, give_up=pytest.fail, beat_s=0.01, limit_s=30)
        wait_for(lambda store=store: store.requests.count("multi_get") >= 3, "three beats", 30)
        heart.stop()
        beats = store.requests[world_size:-1]  # after the counters were made and before this rank says that it leaves
        assert beats == ["add", "multi_get"] * (len(beats) // 2)


def test_a_rank_that_dies_before_its_first_beat_is_missed() -> None:
    reasons: list[tuple[int, str]] = []
    stores = _stores(3)
    hearts = _hearts(reasons, stores, range(2))
    wait_for(lambda: len(reasons) == 2, "the loss to be noticed", 30)
    assert sorted(reasons) == [(rank, "nothing was heard of rank 2 for 3 s") for rank in range(2)]
    for heart in hearts:
        heart.stop()


@pytest.mark.parametrize("value", ["40s", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_of_seconds_is_refused_where_it_is_used(monkeypatch, value: str) -> None:
    monkeypatch.setenv("NANOCHAT_HEARTBEAT_S", value)
    with pytest.raises(NanochatError, match=f"NANOCHAT_HEARTBEAT_S is '{value}': set it to a number of seconds"):
        Heartbeat(_stores(1)[0], 0, 1)


def test_a_wrong_limit_disturbs_no_command_without_ranks(monkeypatch) -> None:
    monkeypatch.setenv("NANOCHAT_HEARTBEAT_S", "40s")
    subprocess.run([sys.executable, "-c", "import nanochat.heartbeat"], cwd=ROOT, check=True, timeout=120)


def test_the_limit_is_the_one_that_was_set(monkeypatch) -> None:
    for value, expected in (("2.5", 2.5), ("", 40.0)):
        monkeypatch.setenv("NANOCHAT_HEARTBEAT_S", value)
        heart = Heartbeat(_stores(1)[0], 0, 1, beat_s=0.05)
        heart.stop()
        assert heart.limit_s == expected


ENDS_AT_ONCE = """
import time, torch, torch.distributed as dist
from nanochat.heartbeat import Heartbeat
from nanochat.read_ahead import ReadAhead
store = dist.TCPStore("127.0.0.1", 0, 1, True)
heart = Heartbeat(store, 0, 1, beat_s=1e-5)
sums = ReadAhead((torch.arange(200_000).sum() for _ in iter(int, 1)), 2)
next(sums)
time.sleep(0.2)
heart.stop()
"""


def test_no_thread_outlives_the_interpreter() -> None:
    """One that did would abort the process when it came back from torch, though all its work was done."""
    ended = subprocess.run([sys.executable, "-c", ENDS_AT_ONCE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_attempt_shares_nothing_with_the_one_before() -> None:
    """Though the store still greets on behalf of dead processes; and whoever comes first."""
    stores = _stores(3)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        with ThreadPoolExecutor(3) as pool:
            waiting = {}
            for rank in order:
                waiting[rank] = pool.submit(fresh_store, stores[rank], rank, 3, 5.0)
                time.sleep(0.1)
            fresh = [waiting[rank].result() for rank in range(3)]
        assert not fresh[1].check(["address"])
        fresh[0].set("address", f"of {order}")
        assert fresh[1].get("address") == fresh[2].get("address") == f"of {order}".encode()
    with pytest.raises(TimeoutError, match="rank 1, 2 did not come"):
        fresh_store(stores[0], 0, 3, 0.3)


# ----------------------------------------------------------------------------- two machines


@contextlib.contextmanager
def _two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a virtual cable; yields their names. Addresses: 10.231.0.1 and 10.231.0.2."""
    names = [f"nano{os.getpid()}{side}" for side in "ab"]
    ip = shutil.which("ip")

    def set_up(*command: str) -> None:
        subprocess.run([ip, *command], check=True, capture_output=True)

    try:
        for name in names:
            set_up("netns", "add", name)
        set_up("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for i, name in enumerate(names, 1):
            set_up("-n", name, "addr", "add", f"10.231.0.{i}/24", "dev", "cable")
            set_up("-n", name, "link", "set", "lo", "up")
            set_up("-n", name, "link", "set", "cable", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_machines_and_a_cut_link(many_ranks: Ranks, corpus: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both nodes leave soon, saying why (within a minute by default, in which ranks may be silent for 40 s); started again
    they finish what one process would have."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    try:
        with _two_machines():
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable")
    monkeypatch.setenv("NANOCHAT_HEARTBEAT_S", "15")
    steps = 40
    expected = logged(many_ranks.train(1, corpus, WHOLE, f"--num-iterations={steps}"))
    command = ["-m", "--", "scripts.base_train", *SMALL, f"--data={corpus}", f"--num-iterations={steps}", "--save-every=4"]
    command += ["--model-tag=far", "--resume=auto"]
    stage_dir = base_dir / "runs" / "far" / "base"

    def start_nodes(names: tuple[str, str], port: int) -> list[subprocess.Popen]:
        return [
            start(["ip", "netns", "exec", name, *node_command(i, f"10.231.0.1:{port}", f"10.231.0.{i + 1}", *command)])
            for i, name in enumerate(names)
        ]

    with _two_machines() as nodes:
        jobs = start_nodes(nodes, 29500)
        wait_for(lambda: len(list_steps(stage_dir)) >= 2, "two checkpoints")
        subprocess.run(["ip", "-n", nodes[1], "link", "set", "cable", "down"], check=True)
        cut_at = time.monotonic()
        wait_for(lambda: not any(map(_workers, jobs)), "all processes to end")
        assert time.monotonic() - cut_at < 35
        for job in jobs:
            job.kill()  # torchrun itself waits for its own store for minutes
            assert "error: rank" in job.communicate()[1]
        subprocess.run(["ip", "-n", nodes[1], "link", "set", "cable", "up"], check=True)
        for job in start_nodes(nodes, 29501):
            _, errors = job.communicate(timeout=200)
            assert job.returncode == 0, errors[-3000:]
    assert logged(stage_dir) == pytest.approx(expected, abs=1e-4)

"""Many processes, one result: any number of ranks, whole or sharded, trains the same; a rank that is lost ends the job."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from nanochat.checkpoint_manager import list_steps, load_checkpoint, load_model
from nanochat.heartbeat import Heartbeat, fresh_store
from nanochat.report import read_metrics
from scripts import base_train
from tests.helpers import make_model

ROOT = Path(__file__).parent.parent
# Wide enough for rounding not to grow: in a model of 32 channels it makes 1e-4 of itself within 40 steps.
SMALL = [
    "--depth=2", "--aspect-ratio=64", "--head-dim=64", "--max-seq-len=128", "--total-batch-size=1024",
    "--device-batch-size=2", "--device-type=cpu", "--no-compile", "--eval-tokens=2048", "--sample-every=-1",
    "--keep-last=-1",
]  # fmt: skip
WHOLE, HANDED_OVER = "whole", "handed-over"


@pytest.fixture(autouse=True)
def _quiet_float32(tokenizer, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tokenizer.save(base_dir / "tokenizers" / "default")


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    """A test that fails must not leave processes that hold up the next."""
    yield
    while _started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (*psutil.Process(_started[-1].pid).children(recursive=True), _started[-1]):
                process.kill()
        _started.pop().communicate()


def _start(command: list[str]) -> subprocess.Popen:
    _started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return _started[-1]


def _launch(ranks: int, *command: str, restarts: int = 0) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    torchrun += [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    return _start([*torchrun, *command])


def _run(ranks: int, *command: str, restarts: int = 0) -> str:
    """Run a command on so many ranks to its end; returns what it printed."""
    process = _launch(ranks, *command, restarts=restarts)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return output


def _train(ranks: int, corpus: Path, tag: str, *flags: str) -> Path:
    arguments = [*SMALL, f"--data={corpus}", f"--model-tag={tag}", *flags]
    if ranks == 1:
        assert base_train.main(arguments) == 0
    else:
        _run(ranks, "-m", "--", "scripts.base_train", *arguments)
    return Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs" / tag / "base"


def _values(stage_dir: Path, name: str = "train/loss") -> list[float]:
    return [row[name] for row in read_metrics(stage_dir / "metrics.jsonl") if name in row]


def _forget(stage_dir: Path, after: int) -> None:
    """As if the run had been killed just after a step was saved."""
    for step in list_steps(stage_dir):
        if step > after:
            shutil.rmtree(stage_dir / f"step_{step:06d}")


@pytest.mark.slow
def test_one_two_and_four_ranks_follow_one_curve(corpus: Path) -> None:
    """To 1e-4 over 50 steps, and to the same bits per byte, with the same global batch."""
    one, *others = (_train(ranks, corpus, f"n{ranks}", "--num-iterations=50") for ranks in (1, 2, 4))
    assert len(_values(one)) == 50
    for stage_dir in others:
        assert _values(stage_dir) == pytest.approx(_values(one), abs=1e-4)
        assert _values(stage_dir, "val/bpb") == pytest.approx(_values(one, "val/bpb"), abs=1e-4)


@pytest.mark.slow
def test_checkpoints_move_to_other_numbers_of_ranks(corpus: Path) -> None:
    """2 -> 1 -> 4, and whole -> sharded -> whole, continue the curve of one process."""
    flags = ["--num-iterations=16", "--save-every=4"]
    expected = _values(_train(1, corpus, WHOLE, *flags))
    for ranks, steps, more in ((2, 4, []), (1, 8, []), (4, 12, ["--fsdp", "--activation-checkpointing"]), (2, 16, ["--fsdp"])):
        stage_dir = _train(ranks, corpus, HANDED_OVER, *flags, "--resume=auto", *more)
        assert _values(stage_dir) == pytest.approx(expected, abs=1e-4), f"up to step {steps}"
        _forget(stage_dir, steps)
    _forget(stage_dir, 12)  # which 4 ranks wrote in parts: one process goes on from it
    assert _values(_train(1, corpus, HANDED_OVER, *flags, "--resume=auto")) == pytest.approx(expected, abs=1e-4)
    whole = load_checkpoint(stage_dir.parent.parent / WHOLE / "base", 16, load_optimizer=True)
    found = load_checkpoint(stage_dir, 16, load_optimizer=True)
    for mine, theirs in zip(whole[:2], found[:2], strict=True):
        assert set(mine) == set(theirs)
        for name, tensor in mine.items():
            assert (theirs[name] - tensor).float().norm() <= 1e-2 * tensor.float().norm() + 1e-6, name


@pytest.mark.slow
def test_sharded_models_are_compiled_tuned_and_read_whole(corpus: Path, base_dir: Path) -> None:
    """--fsdp: compiled like the others, read by one process, the start of SFT; a lost file of a rank is named."""
    flags = ["--num-iterations=4"]
    whole, sharded = _train(1, corpus, WHOLE, *flags), _train(2, corpus, "sharded", *flags, "--fsdp")
    assert _values(sharded) == pytest.approx(_values(whole), abs=1e-4)
    model, expected = (load_model("base", "cpu", "eval", tag)[0] for tag in ("sharded", WHOLE))
    idx = torch.arange(100)[None]
    torch.testing.assert_close(model(idx), expected(idx), atol=1e-3, rtol=1e-3)
    sft = ["--tasks=Arithmetic:60,Identity:40", "--num-iterations=3", "--device-type=cpu", "--no-compile", "--eval-tokens=512"]
    for tag, ranks, more in ((WHOLE, 2, []), ("sharded", 2, ["--fsdp"])):
        _run(ranks, "-m", "--", "scripts.chat_sft", *sft, f"--model-tag={tag}", *more)
    runs = base_dir / "runs"
    assert _values(runs / "sharded" / "sft") == pytest.approx(_values(runs / WHOLE / "sft"), abs=1e-4)
    (sharded / "step_000004" / "sharded" / "__1_0.distcp").unlink()
    with pytest.raises(Exception, match=r"__1_0\.distcp is damaged \(missing"):
        load_model("base", "cpu", "eval", "sharded")


@pytest.mark.slow
def test_tuning_and_reinforcing_are_the_same_on_two_ranks(corpus: Path, base_dir: Path) -> None:
    _train(1, corpus, WHOLE, "--num-iterations=4")
    shutil.copytree(base_dir / "runs" / WHOLE, base_dir / "runs" / "two")
    machine = ["--device-type=cpu", "--no-compile"]
    sft = ["--tasks=Arithmetic:100,Identity:60", "--num-iterations=6", "--eval-tokens=512", *machine]
    rl = ["--task=Arithmetic", "--num-iterations=2", "--examples-per-step=4", "--num-samples=4", "--max-new-tokens=8"]
    rl += ["--eval-examples=4", "--eval-samples=2", "--objective=grpo", "--kl-weight=0.1", *machine]
    for ranks, tag in ((1, WHOLE), (2, "two")):
        _run(ranks, "-m", "--", "scripts.chat_sft", *sft, f"--model-tag={tag}")
        _run(ranks, "-m", "--", "scripts.chat_rl", *rl, f"--model-tag={tag}")
    for stage, names in (("sft", ("train/loss", "val/bpb")), ("rl", ("train/loss", "rl/answer_tokens", "val/pass@1"))):
        for name in names:
            one, two = (_values(base_dir / "runs" / tag / stage, name) for tag in (WHOLE, "two"))
            assert one
            assert two == pytest.approx(one, abs=1e-4), name


# ----------------------------------------------------------------------------- lost ranks


def _workers(launcher: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(launcher.pid).children() if "scripts.base_train" in p.cmdline()]


def _wait_for(condition, seconds: float = 90.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_a_restart_goes_on(corpus: Path, base_dir: Path) -> None:
    flags = ["-m", "--", "scripts.base_train", *SMALL, f"--data={corpus}", "--num-iterations=40", "--save-every=4"]
    expected = _values(_train(1, corpus, WHOLE, "--num-iterations=40"))
    stage_dir = base_dir / "runs" / "killed" / "base"
    for restarts in (0, 1):
        before = len(list_steps(stage_dir))
        job = _launch(2, *flags, "--model-tag=killed", "--resume=auto", restarts=restarts)
        _wait_for(lambda: len(list_steps(stage_dir)) >= before + 2)  # noqa: B023 - used at once
        killed_at = time.monotonic()
        _workers(job)[1].send_signal(signal.SIGKILL)
        _, errors = job.communicate(timeout=120)
        if restarts == 0:
            assert job.returncode != 0
            assert time.monotonic() - killed_at < 60
            assert "exitcode  : -9" in errors  # torchrun's own report names the rank
            assert "[rank0]:" not in errors  # no trace of ours
    assert job.returncode == 0, errors[-3000:]
    assert _values(stage_dir) == pytest.approx(expected, abs=1e-4)


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
def test_ranks_that_differ_by_one_bit_stop(corpus: Path, base_dir: Path, tmp_path: Path) -> None:
    """And the checkpoint of that moment is not written: the last good one is named.

    (A step later the optimizer's all-gather would have mended it.)
    """
    script = tmp_path / "diverged.py"
    script.write_text(DIVERGED, encoding="utf-8")
    flags = [*SMALL, f"--data={corpus}", "--num-iterations=9", "--save-every=3", "--model-tag=flipped"]
    job = _launch(2, str(script), *flags)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "the ranks hold different parameters at step 6 (1, first wte.weight)" in errors
    assert "the last good checkpoint is step 3" in errors
    assert list_steps(base_dir / "runs" / "flipped" / "base") == [3]


def _stores(count: int) -> list[dist.TCPStore]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    timeout = timedelta(seconds=5)
    return [dist.TCPStore("127.0.0.1", port, is_master=i == 0, wait_for_workers=False, timeout=timeout) for i in range(count)]


def _hearts(reasons: list[tuple[int, str]], stores: list[dist.TCPStore], ranks: range) -> list[Heartbeat]:
    def give_up(rank: int):
        return lambda reason: reasons.append((rank, reason))

    return [Heartbeat(stores[rank], rank, len(stores), give_up(rank), beat_s=0.05, limit_s=0.6) for rank in ranks]


def test_heartbeat_notices_silence_and_only_that() -> None:
    reasons: list[tuple[int, str]] = []
    stores = _stores(3)
    hearts = _hearts(reasons, stores, range(3))
    time.sleep(1.2)
    assert not reasons
    hearts[2].stop()  # leaves as it should
    time.sleep(1.2)
    assert not reasons
    hearts[1]._stopped.set()  # dies
    time.sleep(1.5)
    assert [rank for rank, _ in reasons] == [0]
    assert "rank 1" in reasons[0][1]
    hearts[0].stop()


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


def test_heartbeat_notices_a_rank_that_never_came() -> None:
    reasons: list[tuple[int, str]] = []
    stores = _stores(2)
    hearts = _hearts(reasons, stores, range(1))
    _wait_for(lambda: reasons, 5)
    assert reasons == [(0, "nothing was heard of rank 1 for 1 s")]
    hearts[0].stop()


# ----------------------------------------------------------------------------- two machines


@contextlib.contextmanager
def _two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a virtual cable; yields their names. Addresses: 10.231.0.1 and 10.231.0.2."""
    names = [f"nano{os.getpid()}{side}" for side in "ab"]
    ip = shutil.which("ip")

    def run(*command: str) -> None:
        subprocess.run([ip, *command], check=True, capture_output=True)

    try:
        for name in names:
            run("netns", "add", name)
        run("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for i, name in enumerate(names, 1):
            run("-n", name, "addr", "add", f"10.231.0.{i}/24", "dev", "cable")
            run("-n", name, "link", "set", "lo", "up")
            run("-n", name, "link", "set", "cable", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_machines_and_a_cut_link(corpus: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both nodes leave within a minute, saying why; started again they finish what one process would have."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    try:
        with _two_machines():
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable")
    steps = 40
    expected = _values(_train(1, corpus, WHOLE, f"--num-iterations={steps}"))
    flags = [*SMALL, f"--data={corpus}", f"--num-iterations={steps}", "--save-every=4", "--model-tag=far", "--resume=auto"]
    stage_dir = base_dir / "runs" / "far" / "base"

    def start(nodes: tuple[str, str], attempt: int) -> list[subprocess.Popen]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
        torchrun += [f"--rdzv_id=far{attempt}", f"--rdzv_endpoint=10.231.0.1:{29500 + attempt}"]
        addresses = [[f"--rdzv_conf=is_host={i == 1}", f"--local-addr=10.231.0.{i}"] for i in (1, 2)]
        return [
            _start(["ip", "netns", "exec", node, *torchrun, *address, "-m", "--", "scripts.base_train", *flags])
            for node, address in zip(nodes, addresses, strict=True)
        ]

    with _two_machines() as nodes:
        jobs = start(nodes, 0)
        _wait_for(lambda: len(list_steps(stage_dir)) >= 2)
        subprocess.run(["ip", "-n", nodes[1], "link", "set", "cable", "down"], check=True)
        cut_at = time.monotonic()
        _wait_for(lambda: not any(map(_lives, jobs)), 90)
        assert time.monotonic() - cut_at < 60
        for job in jobs:
            job.kill()  # torchrun itself waits for its own store for minutes
            assert "error: rank" in job.communicate()[1]
        subprocess.run(["ip", "-n", nodes[1], "link", "set", "cable", "up"], check=True)
        for job in start(nodes, 1):
            _, errors = job.communicate(timeout=200)
            assert job.returncode == 0, errors[-3000:]
    assert _values(stage_dir) == pytest.approx(expected, abs=1e-4)


def _lives(job: subprocess.Popen) -> bool:
    """Whether a training process of this launcher is still there."""
    children = psutil.Process(job.pid).children(recursive=True)
    return any(child.status() != psutil.STATUS_ZOMBIE and "--model-tag=far" in child.cmdline() for child in children)


# ----------------------------------------------------------------------------- one optimizer

SEVERAL_RANKS = """
import sys, torch, torch.distributed as dist
from tests.helpers import make_model
from tests.test_distributed import set_gradients
dist.init_process_group("gloo")
rank = dist.get_rank()
shares = {2: (0.5, 0.5), 3: (0.5, 0.25, 0.25)}[dist.get_world_size()]
model = make_model(n_layer=3, n_kv_head=1)
optimizer = model.setup_optimizer(weight_decay=0.1)
for step in range(4):
    set_gradients(model, step, shares[rank])
    optimizer.step(); optimizer.zero_grad()
state = optimizer.state_dict()
if rank == 0:
    torch.save({"model": model.state_dict(), "optimizer": state}, sys.argv[1])
dist.destroy_process_group()
"""


def set_gradients(model, step: int, share: float) -> None:
    """One rank's part of the same gradients. Shares are powers of two, so that their sum is exact: what differs then is
    the optimizer's doing, not rounding that Adam makes a whole step of."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * share


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_optimizer_is_the_same_on_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    """Shapes that do not divide by the ranks included; state as well as weights."""
    script, result = tmp_path / "ranks.py", tmp_path / "result.pt"
    script.write_text(SEVERAL_RANKS, encoding="utf-8")
    _run(ranks, str(script), str(result))
    model = make_model(n_layer=3, n_kv_head=1)
    optimizer = model.setup_optimizer(weight_decay=0.1)
    for step in range(4):
        set_gradients(model, step, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = torch.load(result, weights_only=True)
    for mine, theirs in ((model.state_dict(), found["model"]), (optimizer.state_dict(), found["optimizer"])):
        assert set(mine) == set(theirs)
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=1e-4, msg=name)

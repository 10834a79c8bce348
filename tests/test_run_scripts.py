"""The scripts of runs/, in a checkout whose programs only note how they were called."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import write_program
from tests.nursery import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the recipes are for Linux, macOS and WSL")

NOTE = 'echo "$(basename "$0")" "$@" >>"$CALLS"\n'


class Checkout:
    """A copy of runs/ with programs that stand in for python, torchrun and nvidia-smi."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, root / "calls"
        shutil.copytree(ROOT / "runs", root / "runs")
        (root / "runs" / "setup.sh").write_text("", encoding="utf-8")
        self.add(".venv/bin/activate", "")
        for name in ("python", "torchrun"):
            self.add(f".venv/bin/{name}", NOTE)
            self.add(f"programs/{name}", f'case "$2" in *device_count*) echo "${{GPUS:-2}}"; exit ;; esac\n{NOTE}')
        self.add("programs/nvidia-smi", "echo 'GPU 0: one'; echo 'GPU 1: another'\n")

    def add(self, name: str, body: str) -> None:
        write_program(self.root / name, body)

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **env: str | None) -> subprocess.CompletedProcess:
        """env: variables to be set, or with None to be missing."""
        before = {**os.environ, "PATH": f"{self.root / 'programs'}:{os.environ['PATH']}", "CALLS": str(self.calls)}
        known = {name: value for name, value in {**before, **env}.items() if value is not None}
        command = ["bash", str(self.root / "runs" / script), *arguments]
        self.calls.write_text("", encoding="utf-8")
        return subprocess.run(command, cwd=cwd, env=known, capture_output=True, text=True, timeout=60)

    def called(self, part: str) -> list[list[str]]:
        """The calls so far in which something is named so."""
        lines = [shlex.split(line) for line in self.calls.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if part in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


@pytest.mark.parametrize(("script", "launches"), [("speedrun.sh", 4), ("miniseries.sh", 2), ("scaling_laws.sh", 2)])
def test_what_torchrun_starts_has_time_to_save(checkout: Checkout, script: str, launches: int) -> None:
    """Its own limit, 30 seconds from the signal to the kill, is less than a step and a checkpoint may take."""
    done = checkout.run(script, NPROC="2", DEPTHS="2 3", BUDGETS="1e13", DEPTH="2")
    assert done.returncode == 0, done.stderr
    found = checkout.called("torchrun")
    assert len(found) == launches
    assert all("--shutdown-timeout=300" in call[: call.index("--")] for call in found)


def test_gpus_are_counted(checkout: Checkout) -> None:
    assert checkout.run("speedrun.sh", NPROC=None).returncode == 0
    assert all("--nproc_per_node=2" in call for call in checkout.called("torchrun"))


@pytest.mark.parametrize(("given", "count"), [({"NPROC": None}, 3), ({"NPROC": "5"}, 5)])
@pytest.mark.parametrize("script", ["speedrun.sh", "miniseries.sh", "cluster/train.sh"])
def test_the_public_recipes_name_for_the_number_of_processes_counts_too(
    checkout: Checkout, script: str, given: dict[str, str | None], count: int
) -> None:
    cluster = {"NNODES": "1", "NODE_RANK": "0", "RDZV_ENDPOINT": "127.0.0.1:29400", "RDZV_ID": "x", "VIRTUAL_ENV": "x"}
    assert checkout.run(script, DEPTHS="2", NPROC_PER_NODE="3", **given, **cluster).returncode == 0
    calls = checkout.called("torchrun")
    assert calls and all(f"--nproc_per_node={count}" in " ".join(call).replace("-per-", "_per_") for call in calls)


@pytest.mark.parametrize("smi", ["echo 'NVIDIA-SMI has failed: no driver'; exit 9\n", "exit 0\n", None])
def test_a_machine_without_a_gpu_is_told_so(checkout: Checkout, smi: str | None) -> None:
    path = None
    if smi is None:  # a PATH on which there is no nvidia-smi
        (checkout.root / "few").mkdir()
        for name in filter(shutil.which, ("bash", "dirname", "grep", "hostname", "wc")):
            (checkout.root / "few" / name).symlink_to(shutil.which(name))
        path = str(checkout.root / "few")
    else:
        checkout.add("programs/nvidia-smi", smi)
    cluster = {name: "1" for name in ("NNODES", "NODE_RANK", "RDZV_ENDPOINT", "RDZV_ID")}
    for script, code in (("speedrun.sh", 1), ("cluster/train.sh", 2)):
        env = {"NPROC": None, "GPUS": "0", **cluster, **({"PATH": path} if path else {})}
        done = checkout.run(script, **env)
        assert done.returncode == code
        assert "error: " in done.stderr and "set NPROC" in done.stderr
        assert not checkout.called("torchrun")


def test_a_gpu_that_pytorch_cannot_use_is_not_counted(checkout: Checkout) -> None:
    """As with an old driver: its eight ranks would train on the processor."""
    done = checkout.run("speedrun.sh", NPROC=None, GPUS="0")
    assert done.returncode == 1 and "PyTorch cannot use the GPU" in done.stderr
    assert not checkout.called("nanochat.dataset")


@pytest.mark.parametrize("script", ["runcpu.sh", "miniseries.sh", "scaling_laws.sh"])
def test_a_path_counts_from_where_the_caller_is(checkout: Checkout, tmp_path: Path, script: str) -> None:
    here = tmp_path / "some where"
    (here / "texts").mkdir(parents=True)
    (here / "texts" / "a.jsonl").touch()
    (here / "builtin").mkdir()
    expected = {
        "texts": f"{here}/texts", "texts/*.jsonl": f"{here}/texts/*.jsonl", f"{here}/texts": f"{here}/texts",
        "builtin": "builtin", "s3://bucket/x": "s3://bucket/x", "nowhere": "nowhere",
    }  # fmt: skip
    for given, data in expected.items():
        done = checkout.run(script, given, cwd=here, DEPTHS="2", BUDGETS="1e13", NPROC=None)
        assert done.returncode == 0, done.stderr
        calls = checkout.calls.read_text(encoding="utf-8").splitlines()
        assert [f" --data={data} " in call for call in calls if "base_train" in call] == [True], given


@pytest.mark.parametrize("script", ["miniseries.sh", "scaling_laws.sh"])
def test_series_read_what_commands_read_by_themselves(checkout: Checkout, script: str) -> None:
    assert checkout.run(script, DEPTHS="2", BUDGETS="1e13", NPROC=None).returncode == 0
    (training,) = checkout.called("scripts.base_train")
    assert "" not in training and not any(word.startswith("--data") for word in training)


def test_a_run_on_a_laptop_keeps_its_tokenizer(checkout: Checkout, base_dir: Path, tmp_path: Path) -> None:
    """On the same text, which may have got new files; on another one it is trained, and base_train sees the difference."""
    run, trained = base_dir / "runs" / "cpu", base_dir / "tokenizers" / "cpu"

    def tokenizer_for(text: str) -> tuple[bool, list[str]]:
        (tmp_path / text).touch()
        assert checkout.run("runcpu.sh", text, cwd=tmp_path).returncode == 0
        (training,) = checkout.called("scripts.base_train")
        return bool(checkout.called("scripts.tok_train")), [word for word in training if word.startswith("--tokenizer")]

    assert tokenizer_for("tëxt") == (True, [f"--tokenizer={trained}"])
    (run / "base").mkdir(parents=True)
    (run / "tokenizer.json").touch()
    settings = json.dumps({"data": str(tmp_path / "tëxt")}, indent=2, ensure_ascii=False)
    (run / "base" / "settings.json").write_text(settings, encoding="utf-8")
    assert tokenizer_for("tëxt") == (False, [f"--tokenizer={run}"])
    assert tokenizer_for("texts") == (True, [f"--tokenizer={trained}"])


def test_the_speedrun_needs_no_home(checkout: Checkout) -> None:
    done = checkout.run("speedrun.sh", HOME=None, NANOCHAT_BASE_DIR=None, NPROC="1", MODEL_TAG="no-such-run")
    assert done.returncode == 0, done.stderr
    assert checkout.called("scripts.tok_train")


def test_the_speedrun_keeps_the_tokenizer_of_a_run_that_began(checkout: Checkout, base_dir: Path) -> None:
    for begun in (False, True):
        assert checkout.run("speedrun.sh", NPROC="1", DEPTH="4").returncode == 0
        assert checkout.called("scripts.base_train")
        assert bool(checkout.called("scripts.tok_train")) is not begun
        (base_dir / "runs" / "d4").mkdir(parents=True, exist_ok=True)
        (base_dir / "runs" / "d4" / "tokenizer.json").touch()

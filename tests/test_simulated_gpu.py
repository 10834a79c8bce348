"""On a GPU that is simulated, for machines without one: its code computes what a CPU's does, and waits only where it must.

The whole commands run, but uncompiled, and with PyTorch's operations in place of our kernels: see simulated_gpu.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.metrics import read_metrics
from tests.conftest import TINY_TRAINING, TINY_TUNING
from tests.nursery import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA of its own, which cannot be replaced"),
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++"),
]


@pytest.fixture(scope="session")
def simulated_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that gives PyTorch a GPU."""
    library, of_torch = tmp_path_factory.mktemp("gpu") / "simulated_gpu.so", Path(torch.__file__).parent
    subprocess.run(
        ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{of_torch}/include", ROOT / "tests" / "simulated_gpu.cpp",
         f"-L{of_torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{of_torch}/lib", "-o", library],
        check=True,
    )  # fmt: skip
    return library


def run(library: Path, module: str, *flags: str, dtype: str = "float32") -> tuple[str, list[list[str]]]:
    """What a command of ours prints on that GPU, and our functions that waited for it, from the innermost one, each time."""
    command = [sys.executable, str(ROOT / "tests" / "simulated_gpu.py"), str(library), module, *flags, "--device-type=cuda"]
    env = os.environ | {"NANOCHAT_DTYPE": dtype, "NANOCHAT_ATTENTION": "plain", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    output, _, waits = done.stdout.rstrip().rpartition("\n")
    return output, [functions for _, functions in json.loads(waits)]


def curve(stage: Path) -> list[float]:
    return [row["val/bpb"] for row in read_metrics(stage / "metrics.jsonl") if "val/bpb" in row]


def test_training_learns_what_it_learns_on_a_cpu_and_no_step_waits(simulated_gpu: Path, tiny_run: Path, corpus: Path) -> None:
    flags = ("--data", str(corpus), "--model-tag=gpu", "--save-every=3")
    _, waits = run(simulated_gpu, "scripts.base_train", *TINY_TRAINING, *flags)
    assert curve(tiny_run.parent / "gpu" / "base") == pytest.approx(curve(tiny_run / "base"), abs=2e-4)
    assert all("_log" in functions for functions in waits if "_train_step" in functions)


def test_tuning_and_reinforcing_run_as_on_a_cpu(simulated_gpu: Path, tiny_run: Path) -> None:
    shutil.move(tiny_run / "sft", tiny_run.parent / "sft of the cpu")
    run(simulated_gpu, "scripts.chat_sft", *TINY_TUNING)
    assert curve(tiny_run / "sft") == pytest.approx(curve(tiny_run.parent / "sft of the cpu"), abs=2e-4)
    output, _ = run(
        simulated_gpu, "scripts.chat_rl", "--model-tag=tiny", "--task=Arithmetic", "--num-iterations=2", "--no-compile",
        "--examples-per-step=2", "--num-samples=2", "--max-new-tokens=12", "--eval-examples=4", "--eval-samples=2",
        "--eval-every=2", "--kl-weight=0.1", dtype="bfloat16",
    )  # fmt: skip
    assert "is complete: 2 steps done" in output


def test_an_answer_waits_once_for_each_token(simulated_gpu: Path, tiny_run: Path) -> None:
    flags = ("--model-tag=tiny", "-p=Who are you?", "-m=40", "-t=0")
    output, waits = run(simulated_gpu, "scripts.chat_cli", *flags)
    on_a_cpu = subprocess.run(
        [sys.executable, "-m", "scripts.chat_cli", *flags, "--device-type=cpu"], cwd=ROOT, capture_output=True, text=True,
        encoding="utf-8", check=True,
    )  # fmt: skip
    assert output == on_a_cpu.stdout.rstrip()
    in_steps = [functions for functions in waits if "step" in functions]
    assert 1 < len(in_steps) <= 40 and all(functions[0] == "_sample" for functions in in_steps)

"""Benchmarks run to their end on small inputs, and their numbers belong together."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoint, core_eval, data_prep, dataloader, decode, passes, rl, serve, speedrun, train
from nanochat.gpt import GPT
from nanochat.scaling import config_for_depth
from nanochat.tokenizer import Tokenizer
from tests.conftest import TINY_TRAINING


def test_passes_of_any_shape_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    shape = ["--depth=1", "--head-dim=64", "--max-seq-len=64", "--vocab-size=300"]
    profile = tmp_path / "profile.txt"
    flags = ["--total-batch-size=256", "--device-batch-size=2", "--device-type=cpu", "--updates=1"]
    assert passes.main([*shape, *flags, f"--profile={profile}"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["rows"], result["passes"]) == (2, 2)
    flops = GPT(config_for_depth(1, 300, 64, head_dim=64)).estimate_flops()
    assert result["mfu"] == pytest.approx(result["tokens_per_s"] * flops / (1e9 * result["matmul_gflops"]), rel=0.1, abs=1e-4)
    assert "aten::mm" in profile.read_text(encoding="utf-8")


def result_of(capsys: pytest.CaptureFixture) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def texts(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text in place of the real one."""
    shutil.copytree(corpus, tmp_path / "data" / "pretrain")
    monkeypatch.setenv("NANOCHAT_TEST_DATA", str(tmp_path / "data"))


@pytest.mark.slow
def test_checkpoints_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "disk").mkdir()
    flags = ["--depth=1", "--rows=1", "--saves=2", "--save-every=5", "--no-compile", f"--dir={tmp_path / 'disk'}"]
    assert checkpoint.main(flags) == 0
    result = result_of(capsys)
    assert result["write_mb_per_s"] == pytest.approx(result["checkpoint_mb"] / result["write_s"], rel=0.1)
    assert min(result["step_ms"], result["snapshot_ms"]) > 0
    assert not any((tmp_path / "disk").iterdir())


@pytest.mark.slow
def test_decoding_is_timed(capsys: pytest.CaptureFixture) -> None:
    shape = ["--depth=1", "--max-seq-len=64", "--vocab-size=300"]
    assert decode.main([*shape, "--batch-sizes=1,2", "--prompt-tokens=8", "--new-tokens=4", "--no-compile"]) == 0
    assert "depth 1, width 64" in capsys.readouterr().out


@pytest.mark.slow
def test_loading_is_timed(texts: None, capsys: pytest.CaptureFixture) -> None:
    assert dataloader.main(["--seconds=0.1", "--vocab-size=300", "--rows=2", "--context=64"]) == 0
    result = result_of(capsys)
    assert result["ratio"] == pytest.approx(result["tokens_per_s"] / result["tiktoken_tokens_per_s"], abs=0.001)
    assert 0 <= result["share_of_step"] < 1 < result["tokens_per_s"]


@pytest.mark.slow
def test_preparation_is_timed(texts: None, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("datatrove", reason="data preparation needs bash runs/setup.sh data")
    assert data_prep.main(["--megabytes=0.01", "--vocab-size=300"]) == 0
    result = result_of(capsys)
    assert result["prep_1_dropped"] == result["prep_2_dropped"] == 0  # copies differ
    assert all(result[f"{name}_{tasks}_tokens_per_s"] > 0 for name in ("prep", "min_hash") for tasks in (1, 2))


@pytest.mark.slow
def test_training_is_timed(texts: None, capfd: pytest.CaptureFixture) -> None:
    assert train.main(["--steps=2", "--vocab-size=300", "--depth=1", "--no-compile", "--eval-tokens=512"]) == 0
    result = result_of(capfd)
    assert result["mfu"] == pytest.approx(result["train_gflops"] / result["matmul_gflops"], abs=1e-3)
    assert 0 < result["first_step_s"] <= result["first_compiled_step_s"] <= result["command_s"]
    assert 0 < result["val_bpb"] < 10


@pytest.mark.slow
def test_a_speedrun_reads_its_curve(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizers" / "default")
    flags = [*TINY_TRAINING[:-2], f"--data={corpus}", "--expand-at=0.5", "--eval-every=2"]
    curve = speedrun.run_seed(1, 1.0, flags, tmp_path)
    assert [point["tokens"] for point in curve] == [1024, 2048, 3072]
    assert 0 < curve[0]["seconds"] <= curve[1]["seconds"] <= curve[2]["seconds"]
    first, second, third = (point["flops"] for point in curve)
    assert third - second > second - first  # one block learns in the first three of six updates
    assert 0 < curve[-1]["bpb"] < 10


@pytest.mark.slow
def test_serving_is_timed(capsys: pytest.CaptureFixture) -> None:
    assert serve.main(["--clients=2", "--rounds=1", "--no-compile"]) == 0
    result = result_of(capsys)
    assert (result["requests"], result["failed"]) == (2, 0)
    assert result["share_of_engine"] == pytest.approx(result["http_tokens_per_s"] / result["engine_tokens_per_s"], abs=1e-3)
    assert 0 < result["ttft_ms_median"] <= result["ttft_ms_p99"]


@pytest.mark.slow
def test_core_is_timed_both_ways(real_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert core_eval.main(["--questions=1"]) == 0
    result = result_of(capsys)
    assert result["times_faster"] == pytest.approx(result["one_by_one_s"] / result["together_s"], rel=0.2)
    assert result["questions"] > 5 and result["largest_difference"] < 0.05


@pytest.mark.slow
def test_what_rewards_teach_is_measured(
    corpus: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Once more in the same folder trains nothing anew."""

    def run(module: str, *flags: str, base_dir: Path) -> None:
        assert importlib.import_module(module).main(list(flags)) == 0

    monkeypatch.setattr(rl, "run_module", run)
    small = "--depth=1 --aspect-ratio=16 --head-dim=16 --max-seq-len=128 --total-batch-size=512"
    ending = "--num-iterations=1 --eval-every=-1 --eval-tokens=128 --no-compile"
    monkeypatch.setattr(rl, "SOURCE", [f"--data={corpus}"])
    monkeypatch.setattr(rl, "BASE", f"{small} {ending} --sample-every=-1")
    monkeypatch.setattr(rl, "SFT", f"--tasks=Arithmetic:50 {ending}")
    rewards = "--task=Arithmetic --num-iterations=2 --examples-per-step=1 --num-samples=2 --eval-examples=2"
    monkeypatch.setattr(rl, "RL", f"{rewards} --max-new-tokens=8 --no-compile")
    results = []
    for _ in range(2):
        assert rl.main(["--seeds=1,2", f"--base-dir={base_dir}"]) == 0
        results.append({name: value for name, value in result_of(capsys).items() if name.startswith("seed")})
    assert results[0] == results[1] and len(results[0]) == 4
    assert all(0 <= value <= 1 for values in results[0].values() for value in values)
    assert (base_dir / "rl.png").stat().st_size > 1000

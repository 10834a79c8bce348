"""Benchmarks that need no text run anywhere, and their numbers belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import passes, speedrun
from nanochat.gpt import GPT
from nanochat.scaling import model_config
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
    flops = GPT(model_config(1, 300, 64, head_dim=64)).estimate_flops()
    assert result["mfu"] == pytest.approx(result["tokens_per_s"] * flops / (1e9 * result["matmul_gflops"]), rel=0.1, abs=1e-4)
    assert "aten::mm" in profile.read_text(encoding="utf-8")


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

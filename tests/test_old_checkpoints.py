"""What a nanochat has saved, later ones read: a run of each format that is read is kept in tests/fixtures.

format_2 was made in float32 by `base_train --data=/data/texts.jsonl --depth=2 --aspect-ratio=8 --head-dim=8
--max-seq-len=64 --total-batch-size=128 --num-iterations=4 --save-every=2 --set bigrams=1 --no-compile --model-tag=old`,
of which step 2 is kept, and `chat_sft --model-tag=old --model-step=2 --tasks=Arithmetic:20 --num-iterations=2
--save-every=1`, of which step 1 is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine
from nanochat.metrics import read_metrics
from nanochat.sampling import SamplingParams
from scripts import base_train

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def old_run(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run of format 2 in this test's base directory, float32 as then; returns the run's directory."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    shutil.copytree(FIXTURES / "format_2" / "runs", base_dir / "runs")
    return base_dir / "runs" / "old"


@pytest.fixture
def expected() -> dict[str, Any]:
    """What it gave when it was saved."""
    return json.loads((FIXTURES / "format_2" / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_an_old_model_computes_what_it_did(stage: str, old_run: Path, expected: dict[str, Any]) -> None:
    model, tokenizer, _ = load_model(stage, "cpu", "eval", "old")
    ids = tokenizer.encode("the red bird sees a dog")
    logits = model(torch.tensor([ids]))[0, -1, :8]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"][stage]), atol=1e-4, rtol=1e-4)
    (answer,) = Engine(model, tokenizer).complete([ids], SamplingParams(temperature=0, max_tokens=8))
    assert answer.tokens == expected["tokens"][stage]


def test_an_old_run_goes_on_as_it_would_have(old_run: Path, expected: dict[str, Any]) -> None:
    flags = [
        "--depth=2", "--aspect-ratio=8", "--head-dim=8", "--max-seq-len=64", "--set", "bigrams=1", "--num-iterations=4",
        "--eval-tokens=512", "--eval-every=-1", "--sample-every=-1", "--no-compile", "--device-type=cpu", "--model-tag=old",
    ]  # fmt: skip
    data = FIXTURES / "format_2" / "texts.jsonl"
    assert base_train.main([*flags, f"--data={data}", "--total-batch-size=128", "--resume=auto"]) == 0
    rows = read_metrics(old_run / "base" / "metrics.jsonl")
    losses = {str(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == pytest.approx(expected["losses"], rel=1e-4)
    assert rows[-1]["val/bpb"] == pytest.approx(expected["val/bpb"], rel=1e-3)

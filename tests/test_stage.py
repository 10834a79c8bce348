"""Opening a stage: what is gone on from, and what the flags and --set may say."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from nanochat import stage
from nanochat.checkpoint_manager import list_steps, save_checkpoint, set_aside
from nanochat.common import NanochatError
from nanochat.optim import OptimizerSettings
from nanochat.stage import add_rate_arguments, open_stage, parse_switches

STATE = {"a": torch.ones(2)}
STARTS = [("TORCHELASTIC_RESTART_COUNT", "resume"), ("SLURM_RESTART_COUNT", "resume_from_step")]


@pytest.fixture
def stage_dir(base_dir: Path) -> Path:
    """Of a run with the steps 100, 200 and 300."""
    directory = base_dir / "runs" / "r" / "base"
    for step in (100, 200, 300):
        save_checkpoint(directory, step, STATE, None, {})
    return directory


def _begin(stage_dir: Path, name: str, step: int) -> None:
    """What a command with --resume STEP leaves when it begins to train."""
    set_aside(stage_dir, step)
    settings = {"resume": "none", "resume_from_step": -1} | {name: str(step) if name == "resume" else step}
    (stage_dir / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize(("variable", "name"), STARTS)
def test_a_repeated_command_goes_on_from_what_it_saved(
    stage_dir: Path, variable: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the step of its flag once more: neither where there are later ones, nor where that one was pruned."""
    assert open_stage("base", "r", "d4", "100").resume_step == 100
    _begin(stage_dir, name, 100)
    for step in (150, 180):
        save_checkpoint(stage_dir, step, STATE, None, {})
    for count, expected in (("0", 100), ("", 100), ("1", 180)):
        monkeypatch.setenv(variable, count)
        assert open_stage("base", "r", "d4", "100").resume_step == expected
    (stage_dir / "step_000100").rename(stage_dir / "pruned")
    assert open_stage("base", "r", "d4", "100").resume_step == 180
    assert list_steps(stage_dir) == [150, 180]


@pytest.mark.parametrize(("variable", "name"), STARTS)
def test_a_command_that_never_began_is_repeated_as_it_is(
    stage_dir: Path, variable: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was to go back behind is still there."""
    monkeypatch.setenv(variable, "1")
    assert open_stage("base", "r", "d4", "100").resume_step == 100  # without settings
    _begin(stage_dir, name, 300)
    assert open_stage("base", "r", "d4", "100").resume_step == 100


def test_the_optimizers_own_rates_are_the_flags_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place says how fast is learned."""
    rates = {name: value * 2 for name, value in vars(OptimizerSettings()).items() if name.endswith("_lr")}
    for name, value in rates.items():
        monkeypatch.setattr(OptimizerSettings, name, value)
    parser = argparse.ArgumentParser()
    add_rate_arguments(parser.add_argument_group())
    assert vars(parser.parse_args([])) == rates


def test_set_leaves_to_flags_what_they_scale() -> None:
    for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay"):
        with pytest.raises(NanochatError, match=f"--set {name}=0.1: .* give --{name.replace('_', '-')} 0.1$"):
            parse_switches([f"{name}=0.1"], OptimizerSettings)
    others = [f.name for f in fields(OptimizerSettings) if f.name not in stage.OF_FLAGS]
    (found,) = parse_switches([f"{name}={getattr(OptimizerSettings, name)}" for name in others], OptimizerSettings)
    assert replace(OptimizerSettings(), **found) == OptimizerSettings() and set(found) == set(others)

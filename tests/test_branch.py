"""Runs that begin with the model of another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import load_model, read_meta
from nanochat.common import NanochatError
from nanochat.files import sha256_of
from nanochat.report import write_report
from nanochat.runs import list_steps
from scripts import base_train, chat_rl, chat_sft
from tests.conftest import TINY_TRAINING, TINY_TUNING

FROM = ["--from-run=tiny"]
TUNING = [flag for flag in TINY_TUNING if flag != "--model-tag=tiny"] + FROM
ON = [flag for flag in TINY_TRAINING if flag.startswith(("--total", "--device", "--no-", "--eval", "--sample"))] + FROM
REINFORCING = [*FROM, "--task=Arithmetic", "--num-iterations=1", "--examples-per-step=1", "--num-samples=2",
               "--max-new-tokens=4", "--eval-examples=1", "--eval-samples=1", "--device-type=cpu", "--no-compile"]  # fmt: skip


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def weights(stage: str, tag: str) -> dict[str, torch.Tensor]:
    return load_model(stage, "cpu", "eval", tag)[0].state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_stage_is_begun_again_in_a_run_of_its_own(stage: str, tiny_run: Path) -> None:
    """The other run stays as it was; the new one has all that it needs, and goes on by itself."""
    source, main, flags = {"sft": ("base", chat_sft.main, TUNING), "rl": ("sft", chat_rl.main, REINFORCING)}[stage]
    before = files_of(tiny_run)
    assert main(flags) == 0
    assert files_of(tiny_run) == before
    new = tiny_run.parent / "tiny-2"
    assert all(
        torch.equal(a, b) for a, b in zip(weights(source, "tiny").values(), weights(source, "tiny-2").values(), strict=True)
    )
    assert list_steps(new / source) == list_steps(tiny_run / source)[-1:] and list_steps(new / stage)
    assert "tiny-2" in write_report(new)[0].read_text(encoding="utf-8")
    steps = list_steps(new / stage)
    with pytest.raises(NanochatError, match="does not say which run goes on: add its --model-tag"):
        main([*flags, "--resume=auto"])
    tiny_run.rename(tiny_run.parent / "gone")
    assert main([*flags, "--model-tag=tiny-2", "--resume=auto"]) == 0
    assert list_steps(new / stage) == steps


def test_only_a_new_run_gets_another_model(tiny_run: Path) -> None:
    """One of the same name may be there for a second try, but no other model is taken for it."""
    assert chat_sft.main([*TUNING, "--model-tag=second"]) == 0
    for flags, sentence in (
        (["--model-tag=second"], "run 'second' already has sft checkpoints"),
        (["--model-tag=second", "--model-step=3"], "run 'second' has another base model than 'tiny': choose another"),
        (["--from-hf=somewhere"], "both name a model to start from"),
        (["--from-run=nobody"], "'nobody' has no base checkpoint"),
    ):  # fmt: skip
        with pytest.raises(NanochatError, match=sentence):
            chat_sft.main([*TUNING, *flags])
    assert sorted(path.name for path in tiny_run.parent.iterdir()) == ["second", "tiny"]


def test_a_base_model_is_trained_on(tiny_run: Path, corpus: Path) -> None:
    """From its weights, in its shape, with its tokenizer: at rates of 0 it stays what it was."""
    still = ["--matrix-lr=0", "--embedding-lr=0", "--unembedding-lr=0", "--scalar-lr=0", "--weight-decay=0"]
    on = [*ON, f"--data={corpus}", "--num-iterations=2", "--save-every=1"]
    assert base_train.main([*on, *still]) == 0
    assert same(weights("base", "tiny"), weights("base", "tiny-2"))
    settings = read_meta(tiny_run.parent / "tiny-2" / "base", 2)["settings"]
    assert (settings["depth"], settings["parent"], settings["switches"]) == (2, "base of tiny", ["bigrams=1"])
    assert json.loads((tiny_run / "base" / "settings.json").read_text(encoding="utf-8"))["num_iterations"] == 6
    assert base_train.main([*on, "--model-tag=tiny-2", "--resume=1", *still]) == 0  # the shape from what it saved itself
    for flags, sentence in (
        (["--depth=2"], "decides what the model is: leave out --depth"),
        (["--resume=auto"], "its --model-tag"),
    ):
        with pytest.raises(NanochatError, match=sentence):
            base_train.main([*on, *flags])

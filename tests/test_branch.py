"""Runs that begin with the model of another run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from nanochat import branch
from nanochat.checkpoint_manager import begin_checkpoint, find_run, finish_checkpoint, hash_of_weights, load_model, read_meta
from nanochat.common import NanochatError
from nanochat.files import sha256_of
from nanochat.report import write_report
from nanochat.runs import list_steps
from nanochat.stage import open_stage, open_start
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
    """The other run stays as it was; the new one has all that it needs, is the newest, and goes on by itself."""
    source, main, flags = {"sft": ("base", chat_sft.main, TUNING), "rl": ("sft", chat_rl.main, REINFORCING)}[stage]
    before = files_of(tiny_run)
    assert main(flags) == 0
    assert files_of(tiny_run) == before
    new = tiny_run.parent / "tiny-2"
    assert same(weights(source, "tiny"), weights(source, "tiny-2"))
    assert list_steps(new / source) == list_steps(tiny_run / source)[-1:] and list_steps(new / stage)
    assert (find_run(source), find_run(stage)) == ("tiny-2", "tiny-2")
    assert "tiny-2" in write_report(new)[0].read_text(encoding="utf-8")
    before = files_of(new / stage)
    tiny_run.rename(tiny_run.parent / "gone")
    for again in (["--model-tag=tiny-2", "--resume=auto"], ["--config", str(new / stage / "config.toml"), "--resume=auto"]):
        assert main([*flags, *again]) == 0
    after = files_of(new / stage)
    assert {name: after[name] for name in before if name.startswith("step")} == {
        name: hash for name, hash in before.items() if name.startswith("step")
    }


def test_a_stage_goes_on_from_the_kind_of_model_that_it_began_with(tiny_run: Path) -> None:
    """Also where the step is the same, or none is given."""
    stage = open_stage("sft", "tiny", "d2", "auto")
    for step in (None, -1, 6):
        assert open_start(stage, "base", step)[3] == 6
        with pytest.raises(NanochatError, match="run 'tiny' was started from base step 6, not sft"):
            open_start(stage, "sft", step)


def test_a_start_that_was_interrupted_keeps_its_model(tiny_run: Path) -> None:
    """Though the other run has trained further, or is gone, when the command is given again."""
    assert chat_sft.main([*TUNING, "--model-tag=second", "--model-step=3"]) == 0
    second = tiny_run.parent / "second"
    shutil.rmtree(second / "sft")
    tiny_run.rename(tiny_run.parent / "gone")
    assert chat_sft.main([*TUNING, "--model-tag=second", "--resume=auto"]) == 0
    assert not (second / "base" / "metrics.jsonl").exists()  # which goes on to step 6
    assert list_steps(second / "base") == [3] and read_meta(second / "sft", 4)["parent"]["step"] == 3


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--model-tag=tiny"], "give that another --model-tag"), (["--from-hf=somewhere"], "both name a model to start from"),
    (["--from-run=nobody"], "'nobody' has no base checkpoint"), (["--resume=auto"], "add the --model-tag of one"),
    (["--tasks=Arithmetics"], "unknown task"), (["--model-tag=new", "--resume=soon"], "neither auto nor none nor a step"),
    (["--model-tag=other"], "run 'other' has a model of its own"),
])  # fmt: skip
def test_a_refused_command_copies_nothing(flags: list[str], sentence: str, tiny_run: Path) -> None:
    shutil.copytree(tiny_run / "base", tiny_run.parent / "other" / "base")
    with pytest.raises(NanochatError, match=sentence):
        chat_sft.main([*TUNING, *flags])
    assert sorted(path.name for path in tiny_run.parent.iterdir()) == ["other", "tiny"]


def test_a_job_that_is_started_again_needs_its_tag(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for main, flags in ((chat_sft.main, TUNING), (base_train.main, ON)):
        with pytest.raises(NanochatError, match="which of its runs goes on: add the --model-tag of one"):
            main(flags)


def test_a_disk_without_links_gets_copies(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert chat_sft.main(TUNING) == 0
    assert same(weights("base", "tiny"), weights("base", "tiny-2"))


@pytest.mark.parametrize("shards", [[], ["sharded/0.distcp", "sharded/.metadata"]])
def test_a_copy_has_the_weights_of_its_original(tmp_path: Path, tiny_run: Path, shards: list[str]) -> None:
    """By their hash, with which results and references are compared, also where ranks have saved their shards."""
    base = tiny_run / "base"
    if shards:
        temporary = begin_checkpoint(base, 7)
        (temporary / "sharded").mkdir()
        for name in shards:
            (temporary / name).write_bytes(name.encode())
        finish_checkpoint(temporary, base, 7, read_meta(base, 6))
    step = list_steps(base)[-1]
    branch._copy(base, step, tmp_path)
    assert hash_of_weights(tmp_path / "base", step) == hash_of_weights(base, step) != hash_of_weights(base, 3)


def test_a_base_model_is_trained_on(tiny_run: Path, corpus: Path) -> None:
    """From its weights, in its shape, with its tokenizer: at rates of 0 it stays what it was."""
    still = ["--matrix-lr=0", "--embedding-lr=0", "--unembedding-lr=0", "--scalar-lr=0", "--weight-decay=0"]
    on = [*ON, f"--data={corpus}", "--num-iterations=2", "--save-every=1", *still]
    other = tiny_run.parent / "other.toml"
    other.write_text('depth = 1\nset = ["bigrams=2"]\ntokenizer = "nowhere"', encoding="utf-8")  # of another model
    assert base_train.main([*on, "--config", str(other)]) == 0
    assert same(weights("base", "tiny"), weights("base", "tiny-2"))
    new = tiny_run.parent / "tiny-2" / "base"
    settings = read_meta(new, 2)["settings"]
    assert (settings["depth"], settings["parent"], settings["switches"]) == (2, "base of tiny", ["bigrams=1"])
    for flag, sentence in (
        ("--depth=2", "leave out --depth"),
        ("--set=bigrams=1", "leave out --set"),
        ("--resume=auto", "add the"),
    ):
        with pytest.raises(NanochatError, match=sentence):
            base_train.main([*on, flag])
    tiny_run.rename(tiny_run.parent / "gone")
    for again in (
        [*on, "--model-tag=tiny-2"], ["--config", str(new / "config.toml")],
        [*TINY_TRAINING, f"--data={corpus}", "--num-iterations=2", "--save-every=1", "--model-tag=tiny-2"],
    ):  # fmt: skip
        assert base_train.main([*again, "--resume=1"]) == 0

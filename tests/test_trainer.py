"""Training: resume equals uninterrupted, N ranks equal one, accumulation changes nothing, bad runs stop clearly."""

from __future__ import annotations

import errno
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import nanochat.stage
from nanochat.checkpoint_manager import load_checkpoint, read_meta, read_tensors
from nanochat.common import NanochatError, get_base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.metrics import read_metrics
from nanochat.runs import list_steps
from nanochat.stage import open_stage, prepare_directory
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import Batch, Trainer, summed_loss
from scripts import base_train, chat_sft
from tests.conftest import TINY_TRAINING, TINY_TUNING
from tests.helpers import RandomBatches, logged, make_model, make_trainer

pytestmark = pytest.mark.usefixtures("tokenizer_in_place")


def _train(corpus: Path, tag: str, *flags: str) -> Path:
    assert base_train.main([*TINY_TRAINING, "--data", str(corpus), "--model-tag", tag, *flags]) == 0
    return Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs" / tag / "base"


def _weights(stage_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(stage_dir, step)[0]


def test_blocks_join_after_a_share_of_the_updates(corpus: Path) -> None:
    """Until then they stay as they were made; going on from before, at and after that step equals uninterrupted."""
    stage_dir = _train(corpus, "whole", "--expand-at=0.5", "--save-every=1", "--keep-last=-1")
    saved = {step: _weights(stage_dir, step) for step in range(1, 7)}
    first, last = "blocks.0.mlp.c_proj.weight", "blocks.1.mlp.c_proj.weight"
    assert not any(saved[step][first].any() for step in (1, 2, 3))
    assert all(saved[step][first].any() for step in (4, 5, 6))
    assert torch.equal(saved[1]["blocks.0.attn.c_q.weight"], saved[3]["blocks.0.attn.c_q.weight"])
    assert all(saved[step][last].any() for step in saved)
    losses, rows = logged(stage_dir), read_metrics(stage_dir / "metrics.jsonl")
    flops = [row["train/flops"] for row in rows if "train/loss" in row]
    costs = [after - before for before, after in zip([0, *flops], flops, strict=False)]
    model = GPT(GPTConfig(**read_meta(stage_dir, 6)["model_config"]))
    assert costs == [512 * model.estimate_flops(1)] * 3 + [512 * model.estimate_flops()] * 3
    for step in (2, 3, 4):
        _train(corpus, "whole", "--expand-at=0.5", f"--resume={step}", "--save-every=1", "--keep-last=-1")
        assert logged(stage_dir) == losses
        for name, tensor in _weights(stage_dir, 6).items():
            assert torch.equal(tensor, saved[6][name]), name


@pytest.mark.usefixtures("planned_pace")
@pytest.mark.parametrize("more", [["--target-minutes=0.003"], ["--target-flops=1e9"], ["--num-iterations=6"]])
def test_a_budget_decides_when_blocks_join(corpus: Path, more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes, few for this model, are spent on one block first; so many updates or FLOPs train all blocks."""
    monkeypatch.setattr(base_train, "flops_in", lambda model, minutes: 1e8)
    monkeypatch.setattr(base_train, "MOST_EPOCHS", 1e3)  # over a text of a few pages
    stage_dir = _train(corpus, "budget", "--num-iterations=-1", *more)
    settings = read_meta(stage_dir, list_steps(stage_dir)[-1])["settings"]
    assert settings["expand_at"] == (0.85 if settings["target_minutes"] > 0 else 0)
    done = [row["train/flops"] for row in read_metrics(stage_dir / "metrics.jsonl") if "train/flops" in row][-1]
    if settings["target_flops"] > 0:
        assert done == pytest.approx(settings["target_flops"], rel=0.2)
    monkeypatch.setattr(base_train, "MOST_EPOCHS", 1e-3)  # such a run would read its text too often
    stage_dir = _train(corpus, "repeated", "--num-iterations=-1", *more)
    assert read_meta(stage_dir, list_steps(stage_dir)[-1])["settings"]["expand_at"] == 0
    with pytest.raises(NanochatError, match="no updates for the other blocks"):
        _train(corpus, "never", "--expand-at=1")


def test_a_run_that_was_renamed_goes_on(corpus: Path, tiny_run: Path) -> None:
    losses = logged(tiny_run / "base")
    tiny_run.rename(tiny_run.parent / "renamed")
    assert logged(_train(corpus, "renamed", "--resume=3", "--save-every=3")) == losses


def test_a_logger_that_is_not_installed_leaves_no_run_behind(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.loggers.importlib.util.find_spec", lambda name: None)
    for flags in (["--run=mine"], ["--log-to=trackio"], ["--log-to=tensorboard"]):
        with pytest.raises(NanochatError, match="is not installed"):  # before this data is looked for, or anything measured
            _train(tmp_path / "nowhere", "unlogged", *flags)
    assert not (base_dir / "runs").exists()


def test_a_run_says_what_it_is_and_keeps(corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of checkpoints, where some will be removed and nobody has said how many, or where there is none for long."""
    monkeypatch.setattr("nanochat.stage.USUAL_SAVE_EVERY", 5)
    silent = ([], ["--save-every=2"], ["--save-every=1", "--keep-last=2"], ["--save-every=1", "--keep-last=-1"])
    for number, flags in enumerate((["--save-every=1"], *silent)):
        _train(corpus, f"run{number}", *flags)
        printed = capsys.readouterr().out
        assert f"pretraining run{number}: depth 2, " in printed
        assert ("the newest 3 checkpoints and the best are kept (--keep-last)" in printed) == (number == 0)
        assert "no checkpoint is saved before the end" not in printed
    _train(corpus, "unsaved", "--eval-every=-1")
    assert "before the end, for nothing is evaluated: --save-every 5 saves some" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "limits"),
    [("--matrix-lr=-1", "0 or more"), ("--weight-decay=-0.1", "0 or more"), ("--warmdown-ratio=3", "0 to 1"),
     ("--final-lr-frac=-0.1", "0 to 1")],
)  # fmt: skip
def test_rates_and_shares_out_of_range_are_refused(flag: str, limits: str, corpus: Path) -> None:
    with pytest.raises(NanochatError, match=f"{flag.replace('=', ' ')} is out of range: choose {limits}"):
        _train(corpus, "range", flag)


@pytest.mark.parametrize("flag", ["--resume=3", "--resume-from-step=3", "--resume=auto"])
def test_resume_equals_uninterrupted(corpus: Path, tiny_run: Path, flag: str) -> None:
    whole = _weights(tiny_run / "base", 6)
    losses = logged(tiny_run / "base")
    for path in (tiny_run / "base" / "step_000006").iterdir():
        path.unlink()
    (tiny_run / "base" / "step_000006").rmdir()
    stage_dir = _train(corpus, "tiny", flag, "--save-every=3")
    assert logged(stage_dir) == losses
    for name, tensor in _weights(stage_dir, 6).items():
        assert torch.equal(tensor, whole[name]), name


def test_another_way_on_from_an_earlier_step_leaves_nothing_in_between(
    corpus: Path, tiny_run: Path, capsys: pytest.CaptureFixture
) -> None:
    stage_dir, weights = tiny_run / "base", _weights(tiny_run / "base", 6)
    _train(corpus, "tiny", "--resume=3", "--matrix-lr=0.006", "--device-type=")
    printed = capsys.readouterr().out
    assert "going on with --matrix-lr 0.006: until now it was 0.0126" in printed
    assert "set aside in " in printed and "may be deleted: abandoned_step_000006_1" in printed
    assert list_steps(stage_dir) == [3, 6]
    shutil.rmtree(stage_dir / "step_000006")
    (stage_dir / "abandoned_step_000006_1").rename(stage_dir / "step_000006")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in _weights(stage_dir, 6).items())


def test_what_is_refused_sets_nothing_aside(corpus: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise NanochatError("no")

    monkeypatch.setattr("nanochat.dataloader.TokenLoader.load_state_dict", refuse)
    with pytest.raises(NanochatError, match="^no$"):
        _train(corpus, "tiny", "--resume=3")
    assert list_steps(tiny_run / "base") == [3, 6]


def test_a_new_text_is_read_behind_those_that_were_read(
    corpus: Path, base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Whatever its name: documents are found again by their numbers."""
    texts, stage_dir = tmp_path / "texts", base_dir / "runs" / "order" / "base"
    shutil.copytree(corpus, texts)
    _train(texts, "order", "--save-every=3")
    without = _weights(stage_dir, 6)
    for name in ("zzz.txt", "aaa.txt"):
        (texts / name).write_text("Words that nobody has read yet.\n\n" * 30, encoding="utf-8")
        _train(texts, "order", "--save-every=3", "--resume=3")
        assert all(torch.equal(tensor, without[name]) for name, tensor in _weights(stage_dir, 6).items())
    assert "aaa.txt and 1 more of" in capsys.readouterr().out


def test_the_speed_of_rows_that_tell_of_several_steps(tmp_path: Path) -> None:
    """Each is the tokens since the row before, or since training began, over the time since then."""
    make_trainer(tmp_path, log_every=2).train()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for before, row in zip([0.0, *(row["time_s"] for row in rows)], rows, strict=False):
        seconds, rounding = row["time_s"] - before, 2e-4
        assert seconds - rounding <= 2 * 32 / row["train/tok_per_s"] <= seconds + rounding


def test_sft_resume_equals_uninterrupted(tiny_run: Path) -> None:
    whole, losses = _weights(tiny_run / "sft", 4), logged(tiny_run / "sft")
    assert chat_sft.main([*TINY_TUNING, "--resume=2"]) == 0
    assert logged(tiny_run / "sft") == losses
    for name, tensor in _weights(tiny_run / "sft", 4).items():
        assert torch.equal(tensor, whole[name]), name
    for tasks, count in (("Arithmetic:60,Identity:30", 90), ("Arithmetic:50,Identity:50", 100)):
        with pytest.raises(NanochatError, match=rf"the mixture, {count} conversations, is not .* \(100\)"):
            chat_sft.main([*TINY_TUNING, f"--tasks={tasks}", "--resume=2"])


def test_a_stage_goes_on_when_its_base_has_gone_on(corpus: Path, tiny_run: Path) -> None:
    """With the same weights before it, or none any more; but not with others that are asked for."""
    flags = [*TINY_TUNING, "--resume=2"]
    whole = _weights(tiny_run / "sft", 4)
    shutil.copytree(tiny_run / "base" / "step_000006", tiny_run / "base" / "step_000012")
    assert chat_sft.main(flags) == 0
    shutil.rmtree(tiny_run / "base" / "step_000006")
    assert chat_sft.main(flags) == 0
    for name, tensor in _weights(tiny_run / "sft", 4).items():
        assert torch.equal(tensor, whole[name]), name
    with pytest.raises(NanochatError, match="from base step 6, not base step 12"):
        chat_sft.main([*flags, "--model-step=12"])
    shutil.rmtree(tiny_run / "base")
    assert chat_sft.main(flags) == 0


def test_a_new_base_does_not_take_the_tokenizer_of_later_stages(corpus: Path, tiny_run: Path) -> None:
    shutil.rmtree(tiny_run / "base")
    for flags in ([], ["--resume=auto"]):
        with pytest.raises(NanochatError, match="has sft checkpoints, whose tokenizer"):
            _train(corpus, "tiny", *flags)


def test_a_switch_of_momentum_reaches_the_schedule(corpus: Path) -> None:
    """A run with another peak is another run."""
    losses = [logged(_train(corpus, tag, "--set", f"muon_momentum={peak}")) for tag, peak in (("a", 0.95), ("b", 0.86))]
    assert losses[0] == logged(_train(corpus, "c"))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.EIO, "x"), OSError(errno.ENOSPC, "x")])
def test_output_that_cannot_be_written_ends_no_training(error: OSError, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe without a reader, a terminal that is gone, a full disk: from the third step on."""
    reads = itertools.count()

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            if "pretraining: step" in text and next(reads) > 1:
                raise error
            return super().write(text)

        def fileno(self) -> int:
            raise OSError("no file")

    monkeypatch.setattr("nanochat.progress.LINE_S", 0.0)
    monkeypatch.setattr("nanochat.progress.sys.stdout", output := Output())
    stage_dir = _train(corpus, "mute", "--save-every=3", "--num-iterations=6")
    assert list_steps(stage_dir) == [3, 6]
    assert "step 1/6" in output.getvalue()


def test_a_second_ctrl_c_during_an_evaluation_loses_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(base_train, "evaluate_bpb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _train(corpus, "twice", "--eval-every=3", "--save-every=0", "--num-iterations=6")
    assert list_steps(get_base_dir() / "runs" / "twice" / "base") == [3]


def test_a_resumed_run_keeps_the_batch_that_was_chosen_for_it(corpus: Path) -> None:
    """Here three rows at a time; without that flag it would be another."""
    flags = ["--total-batch-size=-1", "--num-iterations=2", "--save-every=1"]
    stage_dir = _train(corpus, "rows", *flags, "--device-batch-size=3")
    chosen = read_meta(stage_dir, 2)["settings"]["total_batch_size"]
    assert chosen % 384 == 0
    _train(corpus, "rows", *flags, "--resume=1")
    assert read_meta(stage_dir, 2)["settings"]["total_batch_size"] == chosen


def test_sft_fits_the_batch_of_its_base_to_another_context(tiny_run: Path) -> None:
    shutil.copytree(tiny_run, tiny_run.parent / "odd", ignore=shutil.ignore_patterns("sft"))
    flags = ["--num-iterations=1", "--no-compile", "--device-type=cpu", "--model-tag=odd", "--max-seq-len=100"]
    for tasks, batch in (("Arithmetic:2000", 400), ("Arithmetic:60,Identity:40", 100)):  # of few conversations a row
        assert chat_sft.main([*flags, f"--tasks={tasks}"]) == 0
        assert read_meta(tiny_run.parent / "odd" / "sft", 1)["settings"]["total_batch_size"] == batch
        shutil.rmtree(tiny_run.parent / "odd" / "sft")


def test_a_resumed_run_reads_the_text_that_it_began_with(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no --data was given, and since then other text has become the default."""
    monkeypatch.setattr(base_train, "default_source_name", lambda: str(corpus))
    flags = [*TINY_TRAINING, "--model-tag=own", "--save-every=3"]
    assert base_train.main([*flags, "--num-iterations=3"]) == 0
    monkeypatch.setattr(base_train, "default_source_name", lambda: "climbmix")
    assert base_train.main([*flags, "--num-iterations=3", "--resume=auto"]) == 0


def test_ctrl_c_in_the_last_evaluation_ends_what_comes_after_it(tmp_path: Path) -> None:
    """All is trained and saved; but a recipe is not to go on with its next command."""
    trainer = make_trainer(tmp_path, num_iterations=2)
    trainer.evaluations = [(-1, lambda: signal.raise_signal(signal.SIGINT) or {"val/bpb": 1.0})]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert list_steps(tmp_path) == [2]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["val/bpb"] == 1.0


def test_accumulation_changes_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of four rows is the same update as four of one row: rows are drawn alike. Unlike ones: test_passes.py."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    one, four = _train(corpus, "one", "--device-batch-size=4"), _train(corpus, "four", "--device-batch-size=1")
    assert logged(one) == pytest.approx(logged(four), abs=1e-4)


def test_loss_falls_and_metrics_are_complete(tiny_run: Path) -> None:
    losses = logged(tiny_run / "base")
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    rows = read_metrics(tiny_run / "base" / "metrics.jsonl")
    assert all({"step", "time_s"} <= set(row) for row in rows)
    assert 0 < rows[-1]["val/bpb"] < 10
    settings = json.loads((tiny_run / "base" / "settings.json").read_text(encoding="utf-8"))
    assert settings["num_params"] > 0
    assert list_steps(tiny_run / "base") == [3, 6]


def test_a_finished_stage_is_not_trained_again(corpus: Path, tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    before = (tiny_run / "base" / "metrics.jsonl").read_bytes()
    _train(corpus, "tiny", "--resume=auto", "--save-every=3")
    assert "is complete" in capsys.readouterr().out
    assert (tiny_run / "base" / "metrics.jsonl").read_bytes() == before


def test_runs_are_never_written_over(corpus: Path, tiny_run: Path) -> None:
    with pytest.raises(NanochatError, match="--resume auto"):
        _train(corpus, "tiny")
    with pytest.raises(NanochatError, match="--warmdown-ratio 0.65, not 0.5"):
        _train(corpus, "tiny", "--resume=3", "--warmdown-ratio=0.5")
    with pytest.raises(NanochatError, match="--depth 2, not 1"):
        _train(corpus, "tiny", "--resume=3", "--depth=1")
    with pytest.raises(NanochatError, match="steps there: 3, 6"):
        _train(corpus, "tiny", "--resume=4")
    flags = [*TINY_TRAINING, "--data", str(corpus), "--num-iterations=1"]
    assert base_train.main(flags) == base_train.main(flags) == 0
    assert {path.name for path in tiny_run.parent.iterdir()} == {"tiny", "d2", "d2-2"}


def test_a_batch_that_does_not_divide(corpus: Path, tiny_run: Path) -> None:
    with pytest.raises(NanochatError, match="nearest: 896, 1024"):
        _train(corpus, "x", "--total-batch-size=1000")
    with pytest.raises(NanochatError, match="nearest"):
        _train(corpus, "x", "--device-batch-size=3")
    with pytest.raises(NanochatError, match="--total-batch-size 512 of run 'tiny' is 4 rows .* go on with one of 1, 2, 4, or"):
        _train(corpus, "tiny", "--resume=3", "--device-batch-size=3")
    with pytest.raises(NanochatError, match="does not divide: go on with one of 1, or leave"):
        chat_sft.main(["--model-tag=tiny", "--resume=2", "--device-type=cpu", "--device-batch-size=3"])
    with pytest.raises(NanochatError, match="was started with --total-batch-size 512, not 1000"):  # a nearer one would not do
        _train(corpus, "tiny", "--resume=3", "--total-batch-size=1000")
    with pytest.raises(NanochatError, match="was started with --total-batch-size .*, not 1000"):
        chat_sft.main(["--model-tag=tiny", "--resume=2", "--device-type=cpu", "--total-batch-size=1000"])


def test_gradients_can_be_logged(tmp_path: Path) -> None:
    """As they are before the update, which may overwrite them."""
    trainer = make_trainer(tmp_path, num_iterations=3, log_every=1)

    def norm(model: GPT) -> float:
        return math.hypot(*(p.grad.to_dense().norm().item() for p in model.parameters() if p.grad is not None))

    trainer.step_metrics = lambda: {"train/grad_norm": norm(trainer.model)}
    trainer.train()
    model, (idx, targets) = make_model(), next(RandomBatches())
    (summed_loss(model, (idx, targets)) / targets.numel()).backward()
    assert logged(tmp_path, "train/grad_norm")[0] == pytest.approx(norm(model), rel=1e-5)


def test_a_loss_that_is_no_number_stops_the_run(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def loss_fn(model: GPT, batch: Batch) -> torch.Tensor:
        return summed_loss(model, batch) * (math.nan if next(calls) == 4 else 1)

    monkeypatch.setattr(base_train, "Trainer", functools.partial(Trainer, loss_fn=loss_fn))
    with pytest.raises(
        NanochatError, match=r"no longer a number at step 5: the last good checkpoint is step 4 .*; resume from it"
    ):
        _train(corpus, "nan", "--save-every=2")
    assert list_steps(Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs" / "nan" / "base") == [2, 4]


def test_a_model_that_is_cut_writes_no_samples(tmp_path: Path) -> None:
    """Rank 0 alone would wait for the others' rows."""
    trainer = make_trainer(tmp_path)
    for trainer.model.is_sharded in (False, True):
        again = Trainer(
            trainer.model, trainer.optimizer, trainer.loader, trainer.config, tmp_path, trainer.metrics, {}, sample=list
        )
        assert (again.sample_fn is None) == trainer.model.is_sharded


def test_weights_that_are_no_numbers_are_not_saved(corpus: Path) -> None:
    with pytest.raises(NanochatError, match=r"no longer numbers at step \d: the last good checkpoint is step \d"):
        _train(corpus, "inf", "--matrix-lr=1e38", "--save-every=1")
    stage_dir = Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs" / "inf" / "base"
    assert list_steps(stage_dir)
    assert all(tensor.isfinite().all() for step in list_steps(stage_dir) for tensor in _weights(stage_dir, step).values())


def test_a_crash_while_sampling_costs_nothing(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*args: object) -> list[dict[str, str]]:
        raise MemoryError

    monkeypatch.setattr(base_train, "continue_openings", fail)
    stage_dir = _train(corpus, "silent", "--sample-every=2")
    assert list_steps(stage_dir) == [6]
    assert "warning: no samples at step 2; training goes on. this machine ran out of memory" in capsys.readouterr().out


def test_a_crash_in_an_evaluation_costs_no_training(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(base_train, "evaluate_bpb", fail)
    with pytest.raises(ZeroDivisionError):
        _train(corpus, "crashed", "--eval-every=3", "--save-every=3")
    assert list_steps(Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs" / "crashed" / "base") == [3]


def test_what_a_stage_goes_on_from_may_not_change_before_it_starts(tiny_run: Path, tokenizer: Tokenizer) -> None:
    """Another process may train it while this one still reads its data; nothing of that is written over."""
    stage = open_stage("base", "tiny", "d2", "auto")
    shutil.copytree(tiny_run / "base" / "step_000006", tiny_run / "base" / "step_000009")
    metrics = (tiny_run / "base" / "metrics.jsonl").read_text(encoding="utf-8")
    with pytest.raises(NanochatError, match="by another process meanwhile"):
        prepare_directory(stage, tokenizer, {}, base_train.parse_arguments([]))
    assert (tiny_run / "base" / "metrics.jsonl").read_text(encoding="utf-8") == metrics


def test_an_older_optimizer_is_named(corpus: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_embeddings(*arguments: object) -> dict[str, torch.Tensor]:
        return {name: value for name, value in read_tensors(*arguments).items() if "mean_square" not in name}

    monkeypatch.setattr(nanochat.stage, "read_tensors", without_embeddings)
    with pytest.raises(NanochatError, match="with another optimizer .* not trained on here: choose another --model-tag"):
        _train(corpus, "tiny", "--resume=3", "--save-every=3")
    shutil.rmtree(tiny_run / "sft")
    flags = ["--model-tag=tiny", "--tasks=Arithmetic:60", "--num-iterations=1", "--no-compile", "--device-type=cpu"]
    with pytest.raises(NanochatError, match="with another optimizer .*: add --load-optimizer 0$"):
        chat_sft.main(flags)
    shutil.rmtree(tiny_run / "sft")
    assert chat_sft.main([*flags, "--load-optimizer=0", "--eval-tokens=128"]) == 0


def test_a_seed_is_another_model(corpus: Path) -> None:
    first, second = (logged(_train(corpus, f"seed{seed}", f"--seed={seed}")) for seed in (1, 2))
    assert first[1:] != second[1:]


def test_speed_counts_the_tokens_of_all_micro_batches(corpus: Path) -> None:
    rows = read_metrics(_train(corpus, "speed", "--device-batch-size=1") / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    assert [row["train/tokens"] for row in train] == [512 * step for step in range(1, 7)]
    total = sum(512 / row["train/tok_per_s"] for row in train)
    assert total == pytest.approx(train[-1]["time_s"], rel=0.01)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(corpus: Path, base_dir: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "scripts.base_train", *TINY_TRAINING, "--data", str(corpus), "--model-tag=stopped"]
    command += ["--num-iterations=100000", "--eval-every=-1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = base_dir / "runs" / "stopped" / "base" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    step = int(re.search(r"stopped after step (\d+)", output)[1])
    assert list_steps(metrics.parent) == [step]


# ----------------------------------------------------------------------------- bits per byte


def test_bits_per_byte_by_hand() -> None:
    model = make_model(vocab_size=10, n_layer=1)
    inputs, targets = torch.randint(10, (2, 8)), torch.randint(10, (2, 8))
    targets[0, :3] = -1
    token_bytes = torch.tensor([0, 1, 2, 3, 4, 1, 1, 1, 1, 5]).numpy()
    logits, flat = model(inputs).flatten(0, 1), targets.flatten()
    losses = torch.nn.functional.cross_entropy(logits, flat, ignore_index=-1, reduction="none")
    counted = [(loss.item(), token_bytes[t]) for loss, t in zip(losses, flat, strict=True) if t >= 0 and token_bytes[t]]
    expected = sum(loss for loss, _ in counted) / math.log(2) / sum(size for _, size in counted)
    assert evaluate_bpb(model, [(inputs, targets)], token_bytes) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(NanochatError, match="no text"):
        evaluate_bpb(model, [(inputs, torch.full_like(targets, -1))], token_bytes)

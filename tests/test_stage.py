"""Opening a stage: what is gone on from, and what the flags and --set may say."""

from __future__ import annotations

import argparse
import errno
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import ranks, stage, training_flags
from nanochat.checkpoint_manager import save_checkpoint, set_aside
from nanochat.common import NanochatError
from nanochat.gpt import GPTConfig
from nanochat.optim import OptimizerSettings
from nanochat.ranks import compare_ranks
from nanochat.runs import get_stage_dir, list_steps
from nanochat.same_run import check_settings
from nanochat.settings import Arguments, SettingsParser
from nanochat.stage import Stage, open_stage, prepare_directory, time_limit, write_settings
from nanochat.tokenizer import Tokenizer
from nanochat.training_flags import add_rate_arguments, parse_switches
from scripts import base_train, chat_rl, chat_sft
from tests.helpers import make_model

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


def test_a_job_that_slurm_repeats_does_not_begin_another_run(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert open_stage("base", None, "d4", "none").tag == "d4"  # it was lost before it had saved anything
    save_checkpoint(base_dir / "runs" / "d4" / "base", 100, STATE, None, {})
    with pytest.raises(NanochatError, match="Slurm started this job again, and there is a run 'd4': add --resume auto"):
        open_stage("base", None, "d4", "none")
    assert open_stage("base", None, "d4", "auto").resume_step == 100
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert open_stage("base", None, "d4", "none").tag == "d4-2"


def test_a_job_that_torchrun_repeats_does_not_begin_again(stage_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be refused, or be another run; the first start has said nothing of it."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert open_stage("base", "new", "d4", "none").resume_step is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(NanochatError, match="may not go on from a checkpoint: add --resume auto"):
        open_stage("base", "new", "d4", "none")
    assert open_stage("base", "r", "d4", "auto").resume_step == 300


def test_a_checkpoint_that_was_about_to_be_replaced_is_gone_on_from(stage_dir: Path) -> None:
    """The process was killed in between."""
    (stage_dir / "step_000300").rename(stage_dir / ".step_000300.old")
    assert open_stage("base", "r", "d4", "auto").resume_step == 300
    assert list_steps(stage_dir) == [100, 200, 300]


def test_ranks_that_cannot_share_a_batch_are_told_how_many_can(stage_dir: Path) -> None:
    """Not of other batches: a run that goes on keeps its own."""
    save_checkpoint(stage_dir, 400, STATE, None, {"settings": {"total_batch_size": 12 * 64}})
    stage = Stage("r", "base", stage_dir, 400, [400])
    for world_size in (1, 2, 4):
        stage.check_batch(-1, 64, world_size)
        stage.check_batch(0, 64, world_size)
    for world_size in (8, 5):
        with pytest.raises(NanochatError, match=f"which {world_size} processes cannot share: go on with one of 1, 2, 4$"):
            stage.check_batch(-1, 64, world_size)
    stage.check_batch(3, 64, 2)
    with pytest.raises(NanochatError, match="6 rows for each process.* go on with one of 1, 2, 3, 6, or leave it out"):
        stage.check_batch(4, 64, 2)


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


def test_two_runs_without_a_tag_do_not_meet(base_dir: Path) -> None:
    """Also while the first has no checkpoint yet."""
    directory = get_stage_dir("d2", "base")
    directory.mkdir(parents=True)
    assert open_stage("base", None, "d2", "none").tag == "d2"  # what a command left that ended before its first checkpoint
    code = (
        f"import filelock; lock = filelock.FileLock({str(directory / '.lock')!r}); lock.acquire(); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert open_stage("base", None, "d2", "none").tag == "d2-2"
        other.communicate(b"\n")


def test_a_base_whose_name_later_stages_have_gets_another(base_dir: Path) -> None:
    """Without a tag; they need the tokenizer of the one that they came from."""
    save_checkpoint(get_stage_dir("d4", "sft"), 5, STATE, None, {})
    assert open_stage("base", None, "d4", "none").tag == "d4-2"


@pytest.mark.parametrize(("step", "rows"), [(None, False), (5, True)])
def test_rows_of_a_start_that_saved_nothing_are_no_part_of_the_next(
    step: int | None, rows: bool, base_dir: Path, tokenizer: Tokenizer
) -> None:
    directory = get_stage_dir("r", "base")
    if step is not None:
        save_checkpoint(directory, step, STATE, None, {})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    stage = Stage("r", "base", directory, step, [] if step is None else [step])
    with stage.lock:
        prepare_directory(stage, tokenizer, {}, base_train.parse_arguments([]))
    assert (directory / "metrics.jsonl").exists() == rows


def test_a_stage_is_repeated_by_what_was_asked_for_and_what_came_of_it(base_dir: Path) -> None:
    """Not by what holds for these ranks or this start alone; and recipes find the path of the data as it is."""
    stage = Stage("r", "base", get_stage_dir("r", "base"), None, [])
    stage.directory.mkdir(parents=True)
    args = base_train.parse_arguments(["--resume=auto", "--data=/tmp/Überall", "--target-minutes=5"])
    settings = {**vars(args), "num_iterations": 7, "device_batch_size": 8}
    write_settings(stage, settings, args)
    assert '"/tmp/Überall"' in (stage.directory / "settings.json").read_text(encoding="utf-8")
    again = base_train.parse_arguments([f"--config={stage.directory / 'config.toml'}"])
    expected = {"model_tag": "r", "num_iterations": 7, "data": "/tmp/Überall", "target_minutes": -1, "resume": "none",
                "resume_from_step": -1, "device_batch_size": -1}  # fmt: skip
    assert {name: vars(again)[name] for name in expected} == expected


def test_minutes_hold_a_stage_that_is_new(base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One that goes on keeps its updates, one that was planned otherwise has no limit; a full disk ends neither."""
    args, settings = base_train.parse_arguments(["--target-minutes=5"]), {"num_iterations": 9}
    new, begun = (Stage("r", "base", base_dir, step, []) for step in (None, 3))
    assert time_limit(begun, settings, args, 20.0) is None is time_limit(new, settings, args, None)
    limit = time_limit(new, settings, args, 20.0)

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nanochat.stage.atomic_write", fail)
    limit.record(7)
    assert settings == {"num_iterations": 7}
    assert "settings.json could not be written; training goes on. the disk is full" in capsys.readouterr().out


def test_flags_reach_the_model_and_its_optimizer() -> None:
    """Rates are all times the scale that the batch has; the weight decay is the stage's to say."""
    config, cpu = make_model().config, torch.device("cpu")
    for more in ([], ["--activation-checkpointing"]):
        model = stage.make_model(config, cpu, base_train.parse_arguments(more), None)
        assert model.recompute_blocks == bool(more)
    rates = {"matrix_lr": 0.2, "embedding_lr": 0.3, "unembedding_lr": 0.04, "scalar_lr": 0.5}
    args = base_train.parse_arguments([f"--{name.replace('_', '-')}={value}" for name, value in rates.items()])
    found = stage.setup_optimizer(model, args, 0.5, weight_decay=0.7, muon_beta2=0.6)
    halves = {name: value / 2 for name, value in rates.items()}
    expected = model.setup_optimizer(**halves, weight_decay=0.7, muon_beta2=0.6)
    for group, wanted in zip(found.groups, expected.groups, strict=True):
        assert group.initial_lr == pytest.approx(wanted.initial_lr)
        assert (group.initial_weight_decay, group.betas) == (wanted.initial_weight_decay, wanted.betas)


def test_what_a_stage_says_of_its_training_counts_more_than_its_flags() -> None:
    """RL, for instance, has no total batch size; a GPU waits for a loss only every tenth update, unless told otherwise."""
    settings, gpu = {"num_iterations": 9, "total_batch_size": 512, "no_such_field": 1}, torch.device("cuda")
    config = stage.train_config(settings, gpu, total_batch_size=0)
    assert (config.num_iterations, config.total_batch_size, config.log_every) == (9, 0, 10)
    assert stage.train_config(settings, gpu, log_every=1).log_every == 1
    assert stage.train_config(settings, torch.device("cpu")).log_every == 1


def test_the_optimizers_own_rates_are_the_flags_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place says how fast is learned."""
    rates = {name: value * 2 for name, value in vars(OptimizerSettings()).items() if name.endswith("_lr")}
    for name, value in rates.items():
        monkeypatch.setattr(OptimizerSettings, name, value)
    parser = argparse.ArgumentParser()
    add_rate_arguments(parser.add_argument_group())
    assert vars(parser.parse_args([])) == rates


@pytest.mark.parametrize(
    ("flags", "adopted"),
    [([], (6, 512, 0.5)), (["--num-iterations=0", "--total-batch-size=0"], (6, 512, 0.5)),
     (["--num-iterations=7", "--expand-at=0"], (7, 512, 0.0)), (["--num-iterations=-1", "--total-batch-size=8"], (6, 8, 0.5))],
)  # fmt: skip
def test_what_flags_leave_open_is_as_the_stage_was_begun(
    flags: list[str], adopted: tuple, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = {"num_iterations": 6, "total_batch_size": 512, "expand_at": 0.5}
    monkeypatch.setattr(Stage, "recorded_settings", lambda self: begun)
    args = base_train.parse_arguments(flags)
    Stage("r", "base", base_dir, 3, [3]).adopt(args)
    assert tuple(vars(args)[name] for name in begun) == adopted
    assert args.target_flops == -1  # which that run did not record


def test_a_flag_that_was_given_is_not_adopted_even_at_its_default(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the run says that it was begun with another, and does not go on with it in silence."""
    monkeypatch.setattr(Stage, "recorded_settings", lambda self: {"target_param_data_ratio": 20.0})
    stage = Stage("r", "base", base_dir, 3, [3])
    for flags, adopted in (([], 20.0), (["--target-param-data-ratio=12"], 12.0)):
        args = base_train.parse_arguments(flags)
        assert args.defaults["target_param_data_ratio"] == 12.0
        stage.adopt(args)
        assert args.target_param_data_ratio == adopted


@pytest.mark.parametrize("script", [base_train, chat_sft, chat_rl])
def test_all_that_is_not_the_machines_stays_as_the_stage_was_begun(
    script: Any, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = script.parse_arguments([])
    monkeypatch.setattr(Stage, "recorded_settings", lambda self: dict.fromkeys(args.defaults, "begun"))
    Stage("r", "base", base_dir, 3, [3]).adopt(args)
    (machine,) = (group for group in args._parser._action_groups if group.title == "machine")
    own = {action.dest for action in machine._group_actions}
    own |= {"resume", "resume_from_step", "run", "log_to", "model_tag", "max_rows"}
    assert {name for name in args.defaults if str(vars(args)[name]) != "begun"} == own & args.defaults.keys()


def test_a_stage_without_a_checkpoint_is_not_begun_anew_with_fewer_flags(base_dir: Path) -> None:
    """It would be another; one that a scheduler repeats, with all of its flags, begins as it did."""
    stage = Stage("r", "base", base_dir / "runs" / "r" / "base", None, [])
    stage.directory.mkdir(parents=True)
    begun = ["--depth=1", "--seed=7", "--device-type=cpu", "--resume=auto", "--num-iterations=5"]
    recorded = {**vars(base_train.parse_arguments(begun)), "total_batch_size": 512, "data": "/a", "loaded": True}
    (stage.directory / "settings.json").write_text(json.dumps(recorded), encoding="utf-8")
    with pytest.raises(
        NanochatError, match=r"begun with --depth=1 --seed=7, but has no checkpoint .* \(--config .*toml has all"
    ):
        stage.adopt(base_train.parse_arguments(["--resume=auto"]))
    recorded["target_minutes"] = 3.0
    (stage.directory / "settings.json").write_text(json.dumps(recorded), encoding="utf-8")
    with pytest.raises(NanochatError, match=r"begun with --target-minutes=3\.0, but"):
        stage.adopt(base_train.parse_arguments([*begun, "--num-iterations=-1"]))
    begun.append("--target-minutes=3")
    for flags in (begun, [*begun, "--depth=2"], [*begun[1:], "--depth=3"], ["--resume=none"]):
        stage.adopt(base_train.parse_arguments(flags))


def test_a_number_of_updates_that_was_typed_is_no_remainder_of_the_plan(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run by time, whose config.toml holds a later plan than the checkpoint does."""
    monkeypatch.setattr(Stage, "recorded_settings", lambda self: {"num_iterations": 13})
    (base_dir / "settings.json").parent.mkdir(parents=True, exist_ok=True)
    (base_dir / "settings.json").write_text('{"num_iterations": 16}', encoding="utf-8")
    (base_dir / "config.toml").write_text("num-iterations = 16", encoding="utf-8")
    for flags, updates in ((["--num-iterations=16"], 16), (["--config", str(base_dir / "config.toml")], 13)):
        args = base_train.parse_arguments(flags)
        Stage("r", "base", base_dir, 3, [3]).adopt(args)
        assert args.num_iterations == updates


@pytest.mark.parametrize(
    ("script", "names"),
    [(base_train, ("num_iterations", "target_minutes", "target_flops", "total_batch_size")),
     (chat_sft, ("max_seq_len", "num_iterations", "target_minutes", "total_batch_size")), (chat_rl, ("num_iterations",))],
)  # fmt: skip
def test_zero_leaves_open_what_a_stage_may_adopt(script: Any, names: tuple[str, ...]) -> None:
    args = script.parse_arguments([f"--{name.replace('_', '-')}=0" for name in names])
    assert {name: vars(args)[name] for name in names} == {name: args.defaults[name] for name in names}


def test_set_leaves_to_flags_what_is_theirs() -> None:
    """The flags that the sentence names exist."""
    flags = {flag for action in base_train.parse_arguments([])._parser._actions for flag in action.option_strings}
    for name, flag in training_flags.OF_FLAGS.items():
        with pytest.raises(NanochatError, match=f"--set {name}=1: .* use {flag}$"):
            parse_switches([f"{name}=1"], GPTConfig, OptimizerSettings)
        assert flag in flags
    others = [f.name for f in fields(OptimizerSettings) if f.name not in training_flags.OF_FLAGS]
    (found,) = parse_switches([f"{name}={getattr(OptimizerSettings, name)}" for name in others], OptimizerSettings)
    assert replace(OptimizerSettings(), **found) == OptimizerSettings() and set(found) == set(others)


def test_without_a_tag_the_newest_of_such_runs_is_gone_on_with(base_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """Also where the plain name is an older run's; runs of other names are not meant."""
    assert open_stage("base", None, "d4", "auto").tag == "d4"
    for tag in ("d4", "d4-2", "d4-10", "d40", "d4-mine"):
        save_checkpoint(get_stage_dir(tag, "base"), 5, STATE, None, {})
    for resume in ("auto", "5"):
        found = open_stage("base", None, "d4", resume)
        assert (found.tag, found.resume_step) == ("d4-10", 5)
    assert "of d4, d4-10, d4-2 the newest is d4-10" in capsys.readouterr().out
    save_checkpoint(get_stage_dir("d4", "base"), 6, STATE, None, {})
    assert open_stage("base", None, "d4", "auto").tag == "d4"
    assert open_stage("base", "d4-2", "d4", "auto").tag == "d4-2"


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("base", "choose another --model-tag"),
        ("rl", r"begin another run with --from-run r \(or remove .* to start it again\)"),
    ],
)
def test_the_way_to_a_stage_anew(name: str, way_out: str, base_dir: Path) -> None:
    """A later stage of another run would have no base model to start from."""
    save_checkpoint(get_stage_dir("r", name), 5, STATE, None, {"settings": {"seed": 1}})
    with pytest.raises(NanochatError, match=f"already has {name} checkpoints up to step 5: add --resume .* or {way_out}$"):
        open_stage(name, "r", "r", "none")
    with pytest.raises(NanochatError, match=rf"started with --seed 1, not 2: leave the flag out to go on, or {way_out}$"):
        check_settings(open_stage(name, "r", "r", "auto"), {"seed": 2, "tokenizer_fingerprint": "x"}, _arguments([]))


def _arguments(argv: list[str]) -> Arguments:
    parser = SettingsParser("A test.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--new-flag", type=float, default=-1.0)
    return parser.parse_args(argv)


def test_what_no_flag_gives_is_not_called_one(base_dir: Path) -> None:
    """A model of other size by the same flags is of another nanochat."""
    save_checkpoint(get_stage_dir("r", "base"), 5, STATE, None, {"settings": {"seed": 1, "num_params": 8}})
    new = {"seed": 1, "tokenizer_fingerprint": "x", "num_params": 7}
    with pytest.raises(NanochatError, match="makes num_params 7 of these settings, and run 'r' has 8: use the version that"):
        check_settings(open_stage("base", "r", "r", "auto"), new, _arguments([]))


def test_a_run_that_is_older_than_a_flag_was_made_with_its_default(base_dir: Path, tmp_path: Path) -> None:
    """What the stage made of the default does not matter, nor does what no flag gives."""
    save_checkpoint(get_stage_dir("r", "base"), 5, STATE, None, {"settings": {"seed": 1}})
    opened = open_stage("base", "r", "r", "auto")
    new = {"seed": 1, "tokenizer_fingerprint": "x", "num_params": 7, "tag": "other"}
    check_settings(opened, {**new, "new_flag": 0.5}, _arguments([]))
    (tmp_path / "some.toml").write_text("new_flag = 0.5", encoding="utf-8")
    for argv in (["--new-flag=0.5"], [f"--config={tmp_path / 'some.toml'}"]):
        with pytest.raises(NanochatError, match=r"was started with --new-flag -1.0, not 0.5"):
            check_settings(opened, {**new, "new_flag": 0.5}, _arguments(argv))
    anew = replace(opened, resume_step=None)
    check_settings(anew, {**new, "new_flag": 0.5}, _arguments(["--new-flag=0.5"]))


@pytest.mark.parametrize(
    ("second", "found"),
    [({"a": 1}, "b is 2 on rank 0, but absent on rank 1"), ({"a": 1, "b": 3}, "b is 2 on rank 0, but 3 on rank 1"),
     ({"a": 1, "b": 2, "c": 4}, "c is absent on rank 0, but 4 on rank 1")],
)  # fmt: skip
def test_ranks_that_see_different_things_are_told_apart(second: dict, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "gather_objects", lambda mine: [mine, mine])
    compare_ranks({"a": 1, "b": 2})
    monkeypatch.setattr(ranks, "gather_objects", lambda mine: [mine, second])
    with pytest.raises(NanochatError, match=found):
        compare_ranks({"a": 1, "b": 2})


@pytest.mark.parametrize("resume", ["\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT TWO}", "9" * 5000, "-1", "", "auto "])
def test_what_is_no_step_is_refused(resume: str) -> None:
    with pytest.raises(NanochatError, match="is neither auto nor none nor a step"):
        open_stage("base", "r", "d4", resume)


@pytest.mark.parametrize("pair", ["bigrams=2.7", "bigrams=1e999", "bigrams=True", "n_head=x", "muon_momentum=1" + 400 * "0"])
def test_set_takes_no_value_of_another_kind(pair: str) -> None:
    """Nor makes one of it: 2.7 would be 2 without a word."""
    with pytest.raises(NanochatError, match=rf"^--set {pair}: the value must be like"):
        parse_switches([pair], GPTConfig, OptimizerSettings)


@pytest.mark.parametrize("name", ["sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"])
def test_a_model_has_some_of_everything(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(NanochatError, match=f"^{name} {value} is not a whole number above 0"):
            replace(GPTConfig(), **{name: value})

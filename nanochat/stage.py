"""Opening a stage of a run: which directory it writes to, and whether it goes on or starts anew.

Used by the training scripts, whose common flags stand here too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any

import torch

from nanochat.checkpoint_manager import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    SETTINGS_FILE,
    STAGES,
    CheckpointError,
    build_model,
    clean_up,
    get_run_dir,
    get_stage_dir,
    list_steps,
    load_checkpoint,
    load_into,
    lock_stage,
    newest_of_runs,
    newest_valid_step,
    no_such_step,
    open_checkpoint,
    read_meta,
    read_tensors,
    set_aside,
    step_dir,
    verify_checkpoint,
)
from nanochat.common import (
    NanochatError,
    all_or_none,
    atomic_write,
    gather_objects,
    get_compute_dtype,
    get_dist_info,
    on_rank0,
    print0,
    read_json_object,
)
from nanochat.dataset import Source
from nanochat.fp8 import enable_fp8
from nanochat.gpt import GPT
from nanochat.loggers import LOGGERS, check_installed
from nanochat.metrics import MetricsLog, read_metrics
from nanochat.model_config import read_config
from nanochat.optim import MuonAdamW, OptimizerSettings
from nanochat.settings import CONFIG_FILE, Arguments
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import Trainer

RATES = {"matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr"}
OF_FLAGS = {*RATES, "weight_decay"}  # fields of OptimizerSettings that --set does not take
# What may differ between a run and its resumption: it changes how the work is done, not what is computed; and rates, since
# lower ones are the way out of a divergence.
FREE_SETTINGS = {
    "resume", "resume_from_step", "run", "log_to", "tensorboard",
    "device", "dtype", "fp8", "world_size", "fsdp", "activation_checkpointing", "device_batch_size",
    "compile", "eval_every", "eval_tokens", "sample_every", "save_every", "keep_last",
    "data", "tokenizer", "from_hf", "model_tag", "tag", "model_step",  # what these mean is compared, not where it lies
    "device_type", *RATES,
    "core_metric_every", "core_metric_max_per_task", "eval_bundle", "max_rows", "eval_examples", "eval_samples",
}  # fmt: skip


def add_training_arguments(parser: argparse.ArgumentParser, eval_every: int = 250, generates: bool = False) -> None:
    """Flags that every training script has. generates: the stage writes what it learns from, which takes a whole model."""
    run = parser.add_argument_group("run")
    run.add_argument(
        "--run",
        default="dummy",
        metavar="NAME",
        help="what loggers call the run; without --log-to it goes to Weights & Biases, 'dummy' to none",
    )
    run.add_argument(
        "--log-to",
        nargs="+",
        action="extend",
        default=[],
        choices=LOGGERS,
        metavar="LOGGER",
        help=f"loggers beside metrics.jsonl: {', '.join(LOGGERS)} (WANDB_MODE=offline keeps the first one's on disk)",
    )
    run.add_argument("--tensorboard", action="store_true", help="the same as --log-to tensorboard")
    run.add_argument("--model-tag", default=None, metavar="TAG", help="the run's name (base_train: d and the depth)")
    run.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|STEP",
        help="go on from the newest checkpoint, from none, from STEP",
    )
    run.add_argument("--save-every", type=int, default=-1, metavar="STEPS", help="save every so often (-1: at the end)")
    run.add_argument("--keep-last", type=int, default=3, metavar="K", help="checkpoints to keep, and the best (-1: all)")
    run.add_argument("--eval-every", type=int, default=eval_every, metavar="STEPS", help="validate (-1: at the end)")
    if not generates:
        run.add_argument("--eval-tokens", type=int, default=None, metavar="N",
                         help="validation tokens to use (default: 2^18, on a GPU 2^22; -1: all)")  # fmt: skip
        run.add_argument("--target-minutes", type=float, default=-1.0, help="end the training about so long after the start")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device-type", default="", metavar="cuda|mps|cpu", help="default: the best that is here")
    machine.add_argument("--device-batch-size", type=int, default=-1, metavar="ROWS", help="rows at a time (-1: as fit)")
    if generates:
        parser.set_defaults(fsdp=False)
    else:
        machine.add_argument("--fsdp", action="store_true", help="cut the model over all ranks: for models beyond one GPU")
    machine.add_argument("--activation-checkpointing", action="store_true",
                         help="compute blocks again in the backward pass: slower by a third, for less memory")  # fmt: skip
    machine.add_argument("--fp8", action="store_true", help="multiply in 8 bits: on GPUs that do (Ada, Hopper and later)")
    machine.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly")


def open_metrics(stage: Stage, settings: dict[str, Any], args: argparse.Namespace) -> MetricsLog:
    """The log of a stage, and of the loggers that its flags name."""
    return MetricsLog(stage.directory, settings, args.run, _loggers(args), get_dist_info()[1], stage.resume_step)


def _loggers(args: argparse.Namespace) -> list[str]:
    """What its flags name; a --run of its own alone means wandb."""
    named = [*args.log_to, *(["tensorboard"] if args.tensorboard else [])]
    return named or (["wandb"] if args.run != "dummy" else [])


def add_rate_arguments(group: argparse._ArgumentGroup) -> None:
    """Peak learning rates, which `setup_optimizer` reads."""
    for name, text in (
        ("embedding_lr", "peak learning rate of embeddings"), ("unembedding_lr", "of the head"),
        ("matrix_lr", "of matrices, which Muon updates"), ("scalar_lr", "of single numbers"),
    ):  # fmt: skip
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=float, default=getattr(OptimizerSettings, name), help=text)


def setup_optimizer(model: GPT, args: argparse.Namespace, scale: float, weight_decay: float, **settings: Any) -> MuonAdamW:
    """The model's optimizer with the rates that were asked for, all times `scale`; settings: of OptimizerSettings."""
    rates = {name: getattr(args, name) * scale for name in RATES}
    return model.setup_optimizer(**rates, weight_decay=weight_decay, **settings)


def parse_switches(pairs: list[str], *settings: type) -> list[dict[str, Any]]:
    """NAME=VALUE pairs as keyword arguments, those of each dataclass in `settings` for itself.

    Raises NanochatError for a name that none of them has, or that has a flag of its own, or a value that does not suit it.
    """
    parsed: list[dict[str, Any]] = [{} for _ in settings]
    known: dict[str, tuple[dict[str, Any], Any]] = {
        f.name: (target, f.default) for target, cls in zip(parsed, settings, strict=True) for f in fields(cls)
    }
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name in OF_FLAGS:  # whose values are scaled for the run, which --set would undo
            raise NanochatError(f"--set {pair}: {name} has a flag of its own: give --{name.replace('_', '-')} {text}")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(sorted(known))}"
            raise NanochatError(f"--set {pair}: there is no switch {name!r}; {hint}")
        target, default = known[name]
        try:
            if isinstance(default, bool):
                target[name] = {"true": True, "false": False}[text.lower()]
            else:
                target[name] = text if isinstance(default, str) else type(default)(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError, KeyError):
            raise NanochatError(f"--set {pair}: the value must be like {default!r}") from None
    return parsed


@dataclass(frozen=True)
class Stage:
    """An opened stage: where it writes and the step it goes on from (None: it starts anew)."""

    tag: str
    name: str
    directory: Path
    resume_step: int | None
    steps: list[int]  # found when it was opened
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, compare=False)

    def is_complete(self, num_iterations: int) -> bool:
        """True if the last step was saved and evaluated, so that nothing is left to do (loss or pass@1 is measured last)."""
        if self.resume_step is None or self.resume_step < num_iterations:
            return False
        rows = [row for row in read_metrics(self.directory / "metrics.jsonl") if row["step"] == num_iterations]
        return any("val/bpb" in row or "val/pass@1" in row for row in rows)

    @property
    def start(self) -> tuple[Path, int] | None:
        """Where the weights to go on from are."""
        return None if self.resume_step is None else (self.directory, self.resume_step)

    def recorded_settings(self) -> dict[str, Any]:
        """The settings that the checkpoint to go on from was made with; {} for a stage that starts anew."""
        if self.resume_step is None:
            return {}
        return read_meta(self.directory, self.resume_step)["settings"]


def open_stage(name: str, tag: str | None, default_tag: str, resume: str) -> Stage:
    """Decide between going on and starting anew, without ever writing over an older run.

    resume "none": a run of a given tag must be new; without a tag the first free of d4, d4-2, d4-3 ... is taken.
    "auto": from the newest intact checkpoint, or anew if there is none; without a tag, of the newest of those runs. A
    number: from that step; where a scheduler has started this again after a start that did so, from the newest, or all
    that was done since would be done again. Rank 0 decides for all.
    """
    if resume not in ("auto", "none") and not resume.isdigit():
        raise NanochatError(f"--resume {resume!r} is neither auto nor none nor a step: give one of these")
    if resume == "none" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise NanochatError("torchrun started this job again, but it may not go on from a checkpoint: add --resume auto")
    return on_rank0(lambda: _open_stage(name, tag, default_tag, resume))


def _open_stage(name: str, tag: str | None, default_tag: str, resume: str) -> Stage:
    if resume == "none":
        if tag is None:
            tag, n = default_tag, 1
            while list_steps(get_stage_dir(tag, name)) or _heirs(tag, name):
                n += 1
                tag = f"{default_tag}-{n}"
        elif steps := list_steps(get_stage_dir(tag, name)):
            raise NanochatError(
                f"run {tag!r} already has {name} checkpoints up to step {steps[-1]}: add --resume auto to go on, or "
                f"{_way_to_begin_anew(get_stage_dir(tag, name))}"
            )
        step = None
    else:
        tag = tag or _newest_untagged(name, default_tag)
        directory = get_stage_dir(tag, name)
        if directory.exists():
            with lock_stage(directory):
                clean_up(directory)
        if resume == "auto" or _is_second_start(directory, resume):
            step, skipped = newest_valid_step(directory)
            for sentence in skipped:
                print0(f"passed over: {sentence}")
        else:
            step = int(resume)
            if step not in list_steps(directory):
                raise no_such_step(directory, step)
    directory = get_stage_dir(tag, name)
    if step is None and (heirs := _heirs(tag, name)):
        raise NanochatError(
            f"run {tag!r} has {' and '.join(heirs)} checkpoints, whose tokenizer that of a new base model would replace: "
            "choose another --model-tag"
        )
    return Stage(tag, name, directory, step, list_steps(directory))


def _newest_untagged(name: str, default_tag: str) -> str:
    """Of the runs d4, d4-2, d4-3 ..., which commands without a tag make, the one whose checkpoint is the newest."""
    runs = [run for run in newest_of_runs(name) if re.fullmatch(rf"{re.escape(default_tag)}(-\d+)?", run[1])]
    newest = max(runs, default=(0.0, default_tag))[1]
    if len(runs) > 1:
        print0(f"of {', '.join(sorted(tag for _, tag in runs))} the newest is {newest}: --model-tag chooses another")
    return newest


def _way_to_begin_anew(directory: Path) -> str:
    """The end of a sentence: how to begin a stage anew. A later stage cannot take another run, which has no model for it."""
    return "choose another --model-tag" if directory.name == STAGES[0] else f"remove {directory} to do it anew"


def _is_second_start(directory: Path, resume: str) -> bool:
    """Whether torchrun or Slurm repeats a command that has gone on from step `resume` already."""
    if not any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")):
        return False
    settings = read_json_object(directory / SETTINGS_FILE) if (directory / SETTINGS_FILE).exists() else {}
    return resume in (settings.get("resume"), str(settings.get("resume_from_step")))


def _heirs(tag: str, name: str) -> list[str]:
    """The later stages that still need the tokenizer of a run whose base is gone; none unless the base is asked for."""
    return [stage for stage in STAGES[1:] if name == STAGES[0] and list_steps(get_stage_dir(tag, stage))]


def open_start(stage: Stage, source: str, step: int | None) -> tuple[Path, Tokenizer, dict[str, Any], int]:
    """(directory, tokenizer, meta, parent's step) of the checkpoint that a stage starts from or goes on from.

    source, step: of the stage before, None for its newest; a stage that goes on keeps its parent, which may be gone or be
    trained on since. Raises NanochatError if another is asked for.
    """
    step = None if step is None or step < 0 else step
    if stage.resume_step is None:
        directory, tokenizer, meta = open_checkpoint(source, stage.tag, step)
        return directory, tokenizer, meta, meta["step"]
    directory, tokenizer, meta = open_checkpoint(stage.name, stage.tag, stage.resume_step)
    parent = meta["parent"]
    if (source, parent["step"] if step is None else step) != (parent["stage"], parent["step"]):
        raise NanochatError(
            f"run {stage.tag!r} was started from {parent['stage']} step {parent['step']}, not {source}"
            f"{'' if step is None else f' step {step}'}: use the same settings to go on, or "
            f"{_way_to_begin_anew(stage.directory)}"
        )
    return directory, tokenizer, meta, parent["step"]


def begin(
    stage: Stage, model: GPT, tokenizer: Tokenizer, args: Arguments, decided: dict[str, Any], source: Source | None = None
) -> dict[str, Any] | None:
    """Write what a stage is into its directory before it starts, and return its settings; None if it is done already.

    decided: what the flags left open, num_iterations above all; source: the text that it reads. Raises NanochatError if a
    stage that is to go on was started with another tokenizer, other settings or other text, or if ranks see different ones.
    A collective call.
    """
    device, (_, rank, _, world_size) = model.get_device(), get_dist_info()
    settings = {
        **vars(args), **describe_model(model), **decided, "device": str(device), "dtype": str(get_compute_dtype(device)),
        "world_size": world_size, "tag": stage.tag, "stage": stage.name, "tokenizer_fingerprint": tokenizer.fingerprint(),
    }  # fmt: skip
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    check_settings(stage, settings, args)
    if stage.is_complete(settings["num_iterations"]):
        print0(f"{stage.directory} is complete: {settings['num_iterations']} steps done")
        return None
    shared = {name: settings[name] for name in ("tokenizer_fingerprint", "mixture", "num_iterations", "total_batch_size")
              if name in settings}  # fmt: skip
    compare_ranks(shared | (source.describe()["files"] if source is not None else {}))
    if source is not None:
        check_data(stage, source)
    all_or_none(lambda: prepare_directory(stage, tokenizer, settings, args, rank))
    if 0 < args.save_every * args.keep_last < settings["num_iterations"] and args.keep_last == args.defaults["keep_last"]:
        print0(f"the newest {args.keep_last} checkpoints are kept, and the best (--keep-last)")
    return settings


def compare_ranks(seen: dict[str, Any]) -> None:
    """Raise NanochatError on every rank if they do not see the same, by its names (a collective call)."""
    first, *others = gather_objects(seen)
    for rank, other in enumerate(others, 1):
        for name in first | other:
            here, there = (str(values.get(name, "absent")) for values in (first, other))
            if here != there:
                raise NanochatError(
                    f"{name} is {here} on rank 0, but {there} on rank {rank}: give all machines the same files and flags"
                )


def check_settings(stage: Stage, new: dict[str, Any], args: Arguments) -> None:
    """Raise NanochatError if a stage that is to go on was started with other settings."""
    if stage.resume_step is None:
        return
    old, anew = stage.recorded_settings(), _way_to_begin_anew(stage.directory)
    fingerprint = new["tokenizer_fingerprint"]
    if old.get("tokenizer_fingerprint", fingerprint) != fingerprint:
        raise NanochatError(
            f"the tokenizer is not the one that run {stage.tag!r} was started with: give the copy that the run keeps, "
            f"--tokenizer={get_run_dir(stage.tag)}, or {anew}"
        )
    for key, value in json.loads(json.dumps(new)).items():
        flag = "--set" if key == "switches" else "--" + key.replace("_", "-")
        before = old.get(key, value)
        if key not in old and key in args.defaults and vars(args)[key] != args.defaults[key]:  # a flag newer than the run
            before = args.defaults[key]
        if key in RATES and before != value:
            print0(f"going on with {flag} {value}: until here it was {before}")
        if key not in FREE_SETTINGS and before != value:
            raise NanochatError(
                f"run {stage.tag!r} was started with {flag} {before}, not {value}: use the same settings to go on, or {anew}"
            )


def check_tokens(source: Source, tokenizer: Tokenizer) -> None:
    """Raise NanochatError if the source holds tokens of another tokenizer."""
    found = source.tokenizer_fingerprint()
    if found is not None and found != tokenizer.fingerprint():
        raise NanochatError(
            f"{source.name} holds tokens of another tokenizer ({found[:12]}, not {tokenizer.fingerprint()[:12]}): give "
            "the tokenizer that made them, or the text itself"
        )


def check_data(stage: Stage, source: Source) -> None:
    """Raise NanochatError if files that a stage read are gone, changed or elsewhere in order. New ones go behind them."""
    if stage.resume_step is None:
        return
    now = source.describe()["files"]
    before = read_meta(stage.directory, stage.resume_step)["data"]["files"]
    plain: dict[str, Any] = {}  # by names alone, as files below folders were once recorded, if they tell
    if len({PurePath(name).name for name in now}) == len(now) and not any("/" in name for name in before):
        plain = {PurePath(name).name: size for name, size in now.items()}
    for name, size in before.items():
        if now.get(name, plain.get(name)) != size:
            what = "is gone" if name not in now else "has changed"
            raise NanochatError(f"{name} of {source.name} {what} since run {stage.tag!r} read it: restore it to go on")
    for files in (source.train_files, source.val_files):
        known = [file.name in before or (bool(plain) and PurePath(file.name).name in before) for file in files]
        if known != sorted(known, reverse=True):
            new = files[known.index(False)].name
            raise NanochatError(
                f"{new} of {source.name} is new and sorts before files that run {stage.tag!r} read: give it a name that sorts "
                "behind them to go on"
            )


def prepare_directory(stage: Stage, tokenizer: Tokenizer, settings: dict[str, Any], args: Arguments, rank: int) -> None:
    """Write what the stage is (settings.json, config.toml, the tokenizer) before it starts."""
    if rank != 0:
        return
    for name in _loggers(args):
        check_installed(name)
    stage.lock.enter_context(lock_stage(stage.directory))  # as long as the stage lives; the trainer takes it once more
    if list_steps(stage.directory) != stage.steps:
        raise NanochatError(f"{stage.directory} was trained by another process meanwhile: give the same command again")
    if stage.resume_step is not None:
        print0(f"going on from step {stage.resume_step} of {stage.directory}")
    else:
        (stage.directory / "metrics.jsonl").unlink(missing_ok=True)  # of a start that never reached a checkpoint
        if stage.name == "base":
            tokenizer.save(get_run_dir(stage.tag))
    text = json.dumps(settings, indent=2, ensure_ascii=False)  # recipes look for the path of the data as it is
    atomic_write(stage.directory / SETTINGS_FILE, text)
    config = args.to_toml({**settings, "model_tag": stage.tag}, leave_out=("resume", "resume_from_step"))
    atomic_write(stage.directory / CONFIG_FILE, config)


def make_model(
    model_config: dict[str, Any], device: torch.device, args: argparse.Namespace, start: tuple[Path, int] | None
) -> GPT:
    """The model of a stage, as its flags want it: new, or with the weights of `start`, a step of some stage."""
    if not args.fsdp:
        model = build_model(model_config, load_checkpoint(*start, device)[0] if start else None, device, args.seed)
    else:
        from nanochat.sharding import shard

        with torch.device("meta"):
            model = GPT(read_config(model_config))
        shard(model, device)
        model.to_empty(device=device)
        if start is None:
            model.init_weights(args.seed)
        else:
            verify_checkpoint(step_dir(*start))
            load_into(step_dir(*start), MODEL_FILE, dict(model.named_parameters()))
    model.recompute_blocks = args.activation_checkpointing
    if args.fp8:
        enable_fp8(model, device)
    return model


def load_optimizer(optimizer: MuonAdamW, stage_dir: Path, step: int, way_out: str = "add --load-optimizer 0") -> None:
    """Give an optimizer the state of a step. Raises CheckpointError if that was saved without, or by another optimizer."""
    directory = step_dir(stage_dir, step)
    if optimizer.sharded:
        state = optimizer.state_dict()
        load_into(directory, OPTIMIZER_FILE, state)
    else:
        state = read_tensors(directory, OPTIMIZER_FILE)
    if not state:
        raise CheckpointError(f"{directory} was saved without optimizer state: {way_out}")
    try:
        optimizer.load_state_dict(state)
    except KeyError as error:
        raise CheckpointError(
            f"{directory} was saved by a nanochat whose optimizer was another (it has no {error}): {way_out}"
        ) from None


def go_on(trainer: Trainer, stage: Stage) -> None:
    """Put a resumed stage's trainer where it was; set aside, when nothing can be refused any more, what came after."""
    if stage.resume_step is not None:
        way_out = f"its weights can be used, but not trained on here: {_way_to_begin_anew(stage.directory)}"
        load_optimizer(trainer.optimizer, stage.directory, stage.resume_step, way_out)
        trainer.load_state_dict(read_meta(stage.directory, stage.resume_step)["trainer"])
        if trainer.rank == 0 and (later := set_aside(stage.directory, stage.resume_step)):
            print(f"{later[0]} to {later[-1]} of an earlier attempt are set aside there and may be deleted")


def describe_model(model: GPT) -> dict[str, Any]:
    """Sizes, for settings.json and the report."""
    counts = model.num_scaling_params()
    return {
        "num_params": counts["total"],
        "num_scaling_params": counts["scaling"],
        "flops_per_token": model.estimate_flops(),
    }

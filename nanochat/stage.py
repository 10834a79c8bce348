"""A stage of a run: the directory it writes to, whether it resumes or starts, its model, and its training.

Used by the training scripts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    CheckpointError,
    build_model,
    clean_up,
    list_files,
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
    verify_checkpoint,
)
from nanochat.common import NanochatError, describe_error, get_dist_info, print0, some_of
from nanochat.dataset import Source
from nanochat.files import atomic_write, read_json
from nanochat.flash_attention import choose_backend
from nanochat.fp8 import enable_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.lanes import LANES
from nanochat.loggers import check_installed
from nanochat.metrics import METRICS_FILE, MetricsLog, read_metrics
from nanochat.optim import MuonAdamW, OptimizerSettings
from nanochat.pace import TimeLimit
from nanochat.ranks import compare_ranks, on_rank0
from nanochat.runs import SETTINGS_FILE, STAGES, get_run_dir, get_stage_dir, heirs, list_steps, step_dir
from nanochat.same_run import NOT_KEPT, check_data, check_settings, way_to_begin_anew
from nanochat.settings import CONFIG_FILE, Arguments, flag_of
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import TrainConfig, Trainer
from nanochat.training_flags import RATES, chosen_loggers, parse_switches

USUAL_SAVE_EVERY = 250  # updates, as often as base training evaluates by default
NEXT = {"base": "chat_sft", "sft": "chat_cli", "rl": "chat_cli --source=rl"}  # the script that reads a stage's result


@dataclass(frozen=True)
class Stage:
    """An opened stage: where it writes, and the step that it resumes from (None: it starts from the beginning)."""

    tag: str
    name: str
    directory: Path
    resume_step: int | None
    steps: list[int]  # checkpoints found when it was opened
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, compare=False)

    def is_complete(self, num_iterations: int) -> bool:
        """True if the last step was saved and evaluated: nothing is left to do."""
        if self.resume_step is None or self.resume_step < num_iterations:
            return False
        rows = [row for row in read_metrics(self.directory / METRICS_FILE) if row["step"] == num_iterations]
        return any(name.startswith("val/") for row in rows for name in row)

    def say_complete(self, num_iterations: int) -> None:
        """Say where the result is and, unless a recipe gives the commands, what most people do next."""
        print0(f"{self.directory} is complete: {num_iterations} steps done")
        if "NANOCHAT_STAGE" not in os.environ:
            print0(f"next: python -m scripts.{NEXT[self.name]} --model-tag={self.tag}")

    @property
    def start(self) -> tuple[Path, int] | None:
        """The checkpoint to resume from: (directory, step)."""
        return None if self.resume_step is None else (self.directory, self.resume_step)

    def recorded_settings(self) -> dict[str, Any]:
        """The settings recorded in the checkpoint to resume from; {} if the stage starts from the beginning."""
        if self.resume_step is None:
            return {}
        return read_meta(self.directory, self.resume_step)["settings"]

    def adopt(self, args: Arguments) -> None:
        """Where the stage goes on, give the flags that were left out the values of that checkpoint, but for NOT_KEPT.

        A run by time may have changed its number of updates after this step. Its config.toml holds the newest number; that
        is not a request for other settings.
        """
        if self.resume_step is not None:
            planned = read_json(self.directory / SETTINGS_FILE).get("num_iterations")
            if args.num_iterations == planned and "num_iterations" not in args.typed:
                args.given.discard("num_iterations")
        elif args.resume == "auto":
            on_rank0(lambda: self._check_left_out(args))
        kept = args.defaults.keys() - NOT_KEPT
        args.adopt({name: value for name, value in self.recorded_settings().items() if name in kept})

    def _check_left_out(self, args: Arguments) -> None:
        """Raise NanochatError if the stage was begun, but not saved, with flags that are left out now: it would be another."""
        begun = read_json(self.directory / SETTINGS_FILE)
        flags = {name: default for name, default in args.defaults.items() if name not in NOT_KEPT | args.given}
        # What flags leave open, by -1 or None, is recorded as it was decided, but for the minutes.
        flags = {name: default for name, default in flags.items() if default not in (None, -1) or name == "target_minutes"}
        missing = [name for name, default in flags.items() if begun.get(name, default) != default]
        if missing:
            given = " ".join(f"{flag_of(name)}={begun[name]}" for name in missing)
            raise NanochatError(
                f"run {self.tag!r} was begun with {given}, but has no checkpoint to go on from: give that again "
                f"(--config {self.directory / CONFIG_FILE} has all), or {way_to_begin_anew(self.directory)}"
            )

    def check_batch(self, device_batch_size: int, sequence_len: int, world_size: int) -> None:
        """Raise NanochatError if these ranks or rows cannot share the batch that the stage goes on with, which it keeps."""
        tokens = self.recorded_settings().get("total_batch_size", 0)
        batch, rows = f"the --total-batch-size {tokens} of run {self.tag!r}", tokens // sequence_len
        if rows % world_size:
            fitting = ", ".join(str(n) for n in range(1, LANES + 1) if LANES % n == rows % n == 0)
            raise NanochatError(
                f"{batch} is {rows} rows, which {world_size} processes cannot share: go on with one of {fitting}"
            )
        own = rows // world_size
        if device_batch_size > 0 and own % device_batch_size:
            fitting = ", ".join(str(n) for n in range(1, own + 1) if own % n == 0)
            raise NanochatError(
                f"{batch} is {own} rows for each process, which --device-batch-size {device_batch_size} does not divide: "
                f"go on with one of {fitting}, or leave it out"
            )


def open_stage(name: str, tag: str | None, default_tag: str, resume: str, loggers: Sequence[str] = ()) -> Stage:
    """Decide whether to resume or to start, without ever overwriting an older run. Rank 0 decides for all.

    loggers: those that the stage will log to; NanochatError if one is not installed where rank 0 runs.

    resume "none": start; a given tag must be new, and without one the first free of d4, d4-2, d4-3 ... is taken.
    "auto": resume from the newest intact checkpoint, or start if there is none; without a tag, in the newest of those runs.
    A number: resume from that step; if torchrun or Slurm repeats such a command, from the newest, to keep the work since.
    """
    if not re.fullmatch("auto|none|[0-9]{1,18}", resume):
        raise NanochatError(f"--resume {resume[:50]!r} is neither auto nor none nor a step: give one of these")
    if resume == "none" and restarted_by() == "torchrun":
        raise NanochatError("torchrun started this job again, but it may not go on from a checkpoint: add --resume auto")
    return on_rank0(lambda: _open_stage(name, tag, default_tag, resume, loggers))


def _open_stage(name: str, tag: str | None, default_tag: str, resume: str, loggers: Sequence[str]) -> Stage:
    for logger in loggers:
        check_installed(logger)
    if tag is None:
        tag = free_tag(name, default_tag) if resume == "none" else _newest_untagged(name, default_tag)
        if resume == "none" and tag != default_tag and restarted_by() == "Slurm":
            raise NanochatError(
                f"Slurm started this job again, and there is a run {default_tag!r}: add --resume auto to go on with what the "
                "job has done, or --model-tag NAME if it has not begun"
            )
    directory = get_stage_dir(tag, name)
    step = _step_to_resume(directory, resume)
    if step is not None and (origin := read_meta(directory, step).get("imported")):
        raise NanochatError(
            f"the base model of run {tag!r} came from {origin['from']}: it can be fine-tuned, but not trained on here; "
            f"{way_to_begin_anew(directory)}"
        )
    if step is None and name == STAGES[0] and (later := heirs(tag)):
        raise NanochatError(
            f"run {tag!r} has {' and '.join(later)} checkpoints, whose tokenizer that of a new base model would replace: "
            "choose another --model-tag"
        )
    return Stage(tag, name, directory, step, list_steps(directory))


def _step_to_resume(directory: Path, resume: str) -> int | None:
    """The step that a stage in this directory goes on from; None to start it. Raises NanochatError; see `open_stage`."""
    if resume == "none":
        if steps := list_steps(directory):
            raise NanochatError(
                f"run {directory.parent.name!r} already has {directory.name} checkpoints up to step {steps[-1]}: add "
                f"--resume auto to go on, or {way_to_begin_anew(directory)}"
            )
        return None
    if directory.exists():
        with lock_stage(directory):
            clean_up(directory)
    if resume != "auto" and not _is_second_start(directory, resume):
        if int(resume) not in list_steps(directory):
            raise no_such_step(directory, int(resume))
        return int(resume)
    step, skipped = newest_valid_step(directory)
    if step is None and skipped:  # starting again would overwrite files that may still be repaired
        raise NanochatError(
            f"no checkpoint in {directory} is whole ({skipped[0]}): restore its files, or {way_to_begin_anew(directory)}"
        )
    for sentence in skipped:
        print0(f"passed over: {sentence}")
    return step


def free_tag(name: str, default_tag: str) -> str:
    """The first of d4, d4-2, d4-3 ... without such a stage."""
    tags = itertools.chain([default_tag], (f"{default_tag}-{n}" for n in itertools.count(2)))
    return next(tag for tag in tags if not _is_taken(tag, name))


def _is_taken(tag: str, name: str) -> bool:
    """Whether the run has such a stage, or one is about to have its first checkpoint, or stages that need another base."""
    directory = get_stage_dir(tag, name)
    if list_steps(directory) or (name == STAGES[0] and heirs(tag)):
        return True
    try:
        with lock_stage(directory) if directory.exists() else contextlib.nullcontext():
            return False
    except NanochatError:
        return True


def _newest_untagged(name: str, default_tag: str) -> str:
    """The run with the newest checkpoint among d4, d4-2, d4-3 ..., the names given to runs without a tag."""
    runs = [run for run in newest_of_runs(name) if re.fullmatch(rf"{re.escape(default_tag)}(-\d+)?", run[1])]
    newest = max(runs, default=(0.0, default_tag))[1]
    if len(runs) > 1:
        print0(f"of {', '.join(sorted(tag for _, tag in runs))} the newest is {newest}: --model-tag chooses another")
    return newest


def restarted_by() -> str | None:
    """What repeats this command because its processes were lost."""
    counts = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "Slurm": "SLURM_RESTART_COUNT"}
    return next((who for who, count in counts.items() if int(os.environ.get(count) or 0)), None)


def _is_second_start(directory: Path, resume: str) -> bool:
    """Whether torchrun or Slurm is repeating a command that already resumed from step `resume`."""
    if restarted_by() is None:
        return False
    settings = read_json(directory / SETTINGS_FILE)
    return resume in (settings.get("resume"), str(settings.get("resume_from_step")))


def open_start(
    stage: Stage, source: str, step: int | None, from_run: str | None = None
) -> tuple[Path, Tokenizer, dict[str, Any], int]:
    """(directory, tokenizer, meta, parent's step) of the checkpoint that a stage starts or resumes from.

    source, step: the previous stage and its step (None: the newest), of the same run or, until that has a copy, of from_run.
    A resumed stage keeps its parent, even if that was removed or trained further; NanochatError if another one is requested.
    """
    step = None if step is None or step < 0 else step
    if stage.resume_step is None:
        has_own = on_rank0(lambda: bool(list_steps(get_stage_dir(stage.tag, source))))
        directory, tokenizer, meta = open_checkpoint(source, stage.tag if has_own else from_run or stage.tag, step)
        return directory, tokenizer, meta, meta["step"]
    directory, tokenizer, meta = open_checkpoint(stage.name, stage.tag, stage.resume_step)
    parent = meta["parent"]
    if (source, parent["step"] if step is None else step) != (parent["stage"], parent["step"]):
        flag = "--model-step" if source == parent["stage"] else "--source"
        raise NanochatError(
            f"run {stage.tag!r} was started from {parent['stage']} step {parent['step']}, not {source}"
            f"{'' if step is None else f' step {step}'}: leave {flag} out to go on, or {way_to_begin_anew(stage.directory)}"
        )
    return directory, tokenizer, meta, parent["step"]


def begin(
    stage: Stage, model: GPT, tokenizer: Tokenizer, args: Arguments, decided: dict[str, Any], source: Source | None = None
) -> dict[str, Any] | None:
    """Record a stage's settings in its directory before it starts, and return them; None if the stage is already done.

    decided: values that the flags left open, above all num_iterations; source: the text that the stage reads. Raises
    NanochatError if a resumed stage was started with another tokenizer, other settings or other text, or if ranks disagree.
    A collective call.
    """
    device, dtype, here = model.get_device(), model.get_compute_dtype(), get_dist_info()
    settings = {
        **vars(args), **describe_model(model), **decided, "device": str(device), "dtype": str(dtype),
        "attention": choose_backend(device, dtype, model.config.head_dim, model.fixed_shape).name,
        "world_size": here.world_size, "tag": stage.tag, "stage": stage.name, "tokenizer_fingerprint": tokenizer.fingerprint(),
    }  # fmt: skip
    # Absolute paths, because the next command may be given in another folder; as text, for JSON.
    settings = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in settings.items()}
    check_settings(stage, settings, args)
    if stage.is_complete(settings["num_iterations"]):
        stage.say_complete(settings["num_iterations"])
        return None
    shared = {name: settings[name] for name in ("tokenizer_fingerprint", "mixture", "num_iterations", "total_batch_size")
              if name in settings}  # fmt: skip
    compare_ranks(shared | (source.sizes() if source is not None else {}))
    if source is not None:
        source.samples = on_rank0(source.sample)  # not on each rank, which may read over a network
        check_data(stage, source)
        on_rank0(source.check_validation)
    on_rank0(lambda: prepare_directory(stage, tokenizer, settings, args))
    save_every = args.save_every if args.save_every >= 0 else args.eval_every
    if (
        "keep_last" not in args.given
        and stage.resume_step is None
        and 0 < save_every * args.keep_last < settings["num_iterations"]
    ):
        print0(f"the newest {args.keep_last} checkpoints and the best are kept (--keep-last)")
    if save_every < 0 and settings["num_iterations"] > USUAL_SAVE_EVERY:
        print0(f"no checkpoint is saved before the end, for nothing is evaluated: --save-every {USUAL_SAVE_EVERY} saves some")
    return settings


def prepare_directory(stage: Stage, tokenizer: Tokenizer, settings: dict[str, Any], args: Arguments) -> None:
    """Write settings.json, config.toml and the tokenizer before the stage starts."""
    try:
        stage.lock.enter_context(lock_stage(stage.directory))  # for the life of the stage
    except NanochatError as error:
        if stage.name == STAGES[0] and args.model_tag is None and stage.resume_step is None:
            raise NanochatError(
                f"another command has begun {stage.tag} meanwhile: give this one again, and it takes the next name"
            ) from error
        raise
    if list_steps(stage.directory) != stage.steps:
        raise NanochatError(f"{stage.directory} was trained by another process meanwhile: give the same command again")
    if stage.resume_step is not None:
        print0(f"going on from step {stage.resume_step} of {stage.directory}")
    else:
        (stage.directory / METRICS_FILE).unlink(missing_ok=True)  # left by a start that never reached a checkpoint
        if stage.name == "base":
            tokenizer.save(get_run_dir(stage.tag))
    write_settings(stage, settings, args)


def write_settings(stage: Stage, settings: dict[str, Any], args: Arguments) -> None:
    """Write settings.json, and config.toml to repeat the stage with."""
    text = json.dumps(settings, indent=2, ensure_ascii=False)  # unescaped: recipes search it for the path of the data
    atomic_write(stage.directory / SETTINGS_FILE, text)
    left_out = ("resume", "resume_from_step", "target_minutes")  # the last: what it allowed is num_iterations
    # The rows as they were asked for: those chosen for these ranks may not divide the batch on others.
    chosen = {**settings, "model_tag": stage.tag, "device_batch_size": args.device_batch_size}
    config = args.to_toml(chosen, leave_out=left_out)
    atomic_write(stage.directory / CONFIG_FILE, config)


def make_model(config: GPTConfig, device: torch.device, args: argparse.Namespace, start: tuple[Path, int] | None) -> GPT:
    """The model that a stage's flags describe: new, or with the weights of `start`, a step of some stage."""
    if not args.fsdp:
        model = build_model(config, load_checkpoint(*start, device)[0] if start else None, device, args.seed)
    else:
        from nanochat.sharding import shard

        model = GPT.on_meta(config)
        shard(model, device)
        model.to_empty(device=device)
        if start is None:
            model.init_weights(args.seed)
        else:
            verify_checkpoint(step_dir(*start))
            try:
                load_into(step_dir(*start), MODEL_FILE, dict(model.named_parameters()))
            except KeyError as error:
                raise CheckpointError(
                    f"these weights do not fit the model they claim to be (they have no {error}): train it again"
                ) from None
    model.recompute_blocks = args.activation_checkpointing
    if args.fp8:
        enable_fp8(model, device)
    return model


def open_metrics(stage: Stage, settings: dict[str, Any], args: argparse.Namespace) -> MetricsLog:
    """The stage's metrics log, with the loggers that its flags name."""
    return MetricsLog(stage.directory, settings, args.run, chosen_loggers(args), get_dist_info().rank, stage.resume_step)


def setup_optimizer(model: GPT, args: argparse.Namespace, scale: float, weight_decay: float, **settings: Any) -> MuonAdamW:
    """The model's optimizer with the rates from the flags, all times `scale`; settings: more of OptimizerSettings."""
    rates = {name: getattr(args, name) * scale for name in RATES}
    return model.setup_optimizer(**rates, weight_decay=weight_decay, **settings)


def optimizer_switches(meta: dict[str, Any]) -> dict[str, Any]:
    """What --set said of the optimizer when the run's base model was trained: it holds for later stages, too."""
    return parse_switches(meta["settings"].get("switches", []), GPTConfig, OptimizerSettings)[1]


def load_optimizer(optimizer: MuonAdamW, stage_dir: Path, step: int, way_out: str = "add --load-optimizer 0") -> None:
    """Load a step's optimizer state. Raises CheckpointError if it has none, or another optimizer saved it."""
    directory = step_dir(stage_dir, step)
    files = list_files(directory)
    if OPTIMIZER_FILE not in files and MODEL_FILE in files:  # sharded checkpoints have neither file
        raise CheckpointError(f"{directory} was saved without optimizer state: {way_out}")
    try:
        if optimizer.sharded:
            state = optimizer.state_dict()
            load_into(directory, OPTIMIZER_FILE, state)
        else:
            verify_checkpoint(directory, but_for=MODEL_FILE)  # the model file was verified when it was loaded
            state = read_tensors(directory, OPTIMIZER_FILE)
        optimizer.load_state_dict(state)
    except KeyError as error:
        raise CheckpointError(
            f"{directory} was saved by a nanochat with another optimizer (it has no {error}): {way_out}"
        ) from None


def train_config(settings: dict[str, Any], device: torch.device, **own: Any) -> TrainConfig:
    """The loop's settings: those of the stage with the same names (see `begin`), then `own`, which takes precedence."""
    chosen = {f.name: settings[f.name] for f in fields(TrainConfig) if f.name in settings}
    return TrainConfig(**{**chosen, "log_every": 10 if device.type == "cuda" else 1, **own})


def time_limit(stage: Stage, settings: dict[str, Any], args: Arguments, most: float | None) -> TimeLimit | None:
    """What holds a stage that was planned by --target-minutes to them; one that resumes keeps the updates that it has.

    most: updates that are never exceeded; None for a stage that was not planned so.
    """
    if most is None or stage.resume_step is not None:
        return None

    def record(updates: int) -> None:
        settings["num_iterations"] = updates  # in the very dict that the trainer writes into checkpoints
        try:
            if get_dist_info().rank == 0:
                write_settings(stage, settings, args)
        except OSError as error:  # checkpoints say so too
            print0(f"warning: {SETTINGS_FILE} could not be written; training goes on. {describe_error(error)}")

    return TimeLimit(args.target_minutes, most, record)


def train(trainer: Trainer, stage: Stage) -> None:
    """Train a stage to its end, from the step it has reached."""
    step = stage.resume_step
    if step is not None:
        way_out = f"its weights can be used, but not trained on here: {way_to_begin_anew(stage.directory)}"
        load_optimizer(trainer.optimizer, stage.directory, step, way_out)
        trainer.load_state_dict(read_meta(stage.directory, step)["trainer"])
        if trainer.rank == 0 and (later := set_aside(stage.directory, step)):  # last, when nothing can fail any more
            print(f"an earlier attempt's later steps are set aside in {stage.directory} and may be deleted: {some_of(later)}")
    trainer.train()


def describe_model(model: GPT) -> dict[str, Any]:
    """Sizes, for settings.json and the report."""
    counts = model.num_scaling_params()
    return {
        "num_params": counts["total"],
        "num_scaling_params": counts["scaling"],
        "flops_per_token": model.estimate_flops(),
    }

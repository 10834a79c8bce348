"""Opening a stage of a run: which directory it writes to, and whether it goes on or starts anew.

Used by the training scripts, which also share their flags and the fitting of the batch to the machine.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    SETTINGS_FILE,
    CheckpointError,
    build_model,
    clean_up,
    get_run_dir,
    get_stage_dir,
    list_steps,
    load_checkpoint,
    load_into,
    lock_stage,
    newest_valid_step,
    no_such_step,
    read_meta,
    read_tensors,
    set_aside,
    step_dir,
    verify_checkpoint,
)
from nanochat.common import (
    NanochatError,
    any_rank,
    atomic_write,
    from_rank0,
    gather_objects,
    get_dist_info,
    print0,
    read_json_lines,
    seconds_since_start,
    synchronize,
)
from nanochat.compilation import can_compile, expected_mfu, measure_matmul_rate
from nanochat.dataset import Source
from nanochat.fp8 import enable_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.loggers import LOGGERS
from nanochat.optim import MuonAdamW
from nanochat.passes import Passes
from nanochat.scaling import accumulation_steps, default_device_batch_size
from nanochat.settings import CONFIG_FILE, Arguments
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import Trainer

RATES = {"matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr"}
# What may differ between a run and its resumption: it changes how the work is done, not what is computed; and rates, since
# lower ones are the way out of a divergence.
FREE_SETTINGS = {
    "resume", "resume_from_step", "run", "log_to", "tensorboard", "log_every",
    "device", "dtype", "fp8", "world_size", "fsdp", "activation_checkpointing", "device_batch_size", "grad_accum_steps",
    "compile", "eval_every", "eval_tokens", "sample_every", "save_every", "keep_last",
    "data", "tokenizer", "from_hf", "model_tag",  # what these mean is compared, not where it lies
    "device_type", *RATES,
    "core_metric_every", "core_metric_max_per_task", "eval_bundle", "max_rows", "eval_examples", "eval_samples",
    "sample_prompts",
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
        run.add_argument("--eval-tokens", type=int, default=-1, metavar="N", help="validation tokens to use (-1: all)")
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


def chosen_loggers(args: argparse.Namespace) -> list[str]:
    """Whom the flags want to tell of the run's numbers."""
    return [*args.log_to, *(["tensorboard"] if args.tensorboard else [])]


def add_rate_arguments(group: argparse._ArgumentGroup) -> None:
    """Peak learning rates, which `setup_optimizer` reads."""
    group.add_argument("--embedding-lr", type=float, default=0.3, help="peak learning rate of embeddings")
    group.add_argument("--unembedding-lr", type=float, default=0.008, help="of the head")
    group.add_argument("--matrix-lr", type=float, default=0.02, help="of matrices, which Muon updates")
    group.add_argument("--scalar-lr", type=float, default=0.5, help="of single numbers")


def setup_optimizer(
    model: GPT, args: argparse.Namespace, scale: float, weight_decay: float, **settings: Any
) -> MuonAdamW:
    """The model's optimizer with the rates that were asked for, all times `scale`; settings: of OptimizerSettings."""
    rates = {name: getattr(args, name) * scale for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")}
    return model.setup_optimizer(**{**rates, "weight_decay": weight_decay, **settings})


def parse_switches(pairs: list[str], *settings: type) -> list[dict[str, Any]]:
    """NAME=VALUE pairs as keyword arguments, those of each dataclass in `settings` for itself.

    Raises NanochatError for a name that none of them has, or a value that does not suit it.
    """
    parsed: list[dict[str, Any]] = [{} for _ in settings]
    known: dict[str, tuple[dict[str, Any], Any]] = {
        f.name: (kind, f.default) for kind, cls in zip(parsed, settings, strict=True) for f in fields(cls)
    }
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(sorted(known))}"
            raise NanochatError(f"--set {pair}: there is no switch {name!r}; {hint}")
        kind, default = known[name]
        try:
            if isinstance(default, bool):
                kind[name] = {"true": True, "false": False}[text.lower()]
            else:
                kind[name] = text if isinstance(default, str) else type(default)(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError, KeyError):
            raise NanochatError(f"--set {pair}: the value must be like {default!r}") from None
    return parsed


@dataclass(frozen=True)
class Stage:
    """An opened stage: where it writes and the step it goes on from (None: it starts anew), of those it found."""

    tag: str
    name: str
    directory: Path
    resume_step: int | None
    steps: list[int]
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, compare=False)

    def is_complete(self, num_iterations: int) -> bool:
        """True if the last step was saved and evaluated, so that there is nothing left to do."""
        if self.resume_step is None or self.resume_step < num_iterations:
            return False
        rows = [row for row in read_json_lines(self.directory / "metrics.jsonl") if row["step"] == num_iterations]
        return any(name.startswith("val/") for row in rows for name in row)

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
    "auto": from the newest intact checkpoint, or anew if there is none. A number: from that step. Rank 0 decides for all.
    """
    if resume not in ("auto", "none") and not resume.isdigit():
        raise NanochatError(f"--resume {resume!r} is neither auto nor none nor a step")
    if resume == "none" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise NanochatError("torchrun started this job again, but it may not go on from a checkpoint: add --resume auto")
    outcome: Stage | NanochatError | None = None
    if get_dist_info()[1] == 0:
        try:
            outcome = _open_stage(name, tag, default_tag, resume)
        except NanochatError as error:
            outcome = error
    outcome = from_rank0(outcome)
    if not isinstance(outcome, Stage):
        raise outcome or NanochatError("rank 0 found no stage to work on")
    return outcome


def _open_stage(name: str, tag: str | None, default_tag: str, resume: str) -> Stage:
    if resume == "none":
        if tag is None:
            tag, n = default_tag, 1
            while list_steps(get_stage_dir(tag, name)):
                n += 1
                tag = f"{default_tag}-{n}"
        elif steps := list_steps(get_stage_dir(tag, name)):
            raise NanochatError(
                f"run {tag!r} already has {name} checkpoints up to step {steps[-1]}: add --resume auto to go on, "
                "or choose another --model-tag"
            )
        step = None
    else:
        tag = tag or default_tag
        directory = get_stage_dir(tag, name)
        if directory.exists():
            with lock_stage(directory):
                clean_up(directory)
        if resume == "auto":
            step, skipped = newest_valid_step(directory)
            for sentence in skipped:
                print0(f"passed over: {sentence}")
        else:
            step = int(resume)
            if step not in list_steps(directory):
                raise no_such_step(directory, step)
    directory = get_stage_dir(tag, name)
    return Stage(tag, name, directory, step, list_steps(directory))


def check_settings(stage: Stage, new: dict[str, Any]) -> None:
    """Raise NanochatError if a stage that is to go on was started with other settings."""
    old = stage.recorded_settings()
    fingerprint = new["tokenizer_fingerprint"]
    if old.get("tokenizer_fingerprint", fingerprint) != fingerprint:
        raise NanochatError(
            f"the tokenizer is not the one that run {stage.tag!r} was started with: give the copy that the run keeps, "
            f"--tokenizer={get_run_dir(stage.tag)}, or choose another --model-tag"
        )
    for key, value in json.loads(json.dumps(new)).items():
        flag = "--set" if key == "switches" else "--" + key.replace("_", "-")
        if key in RATES and old.get(key, value) != value:
            print0(f"going on with {flag} {value}: until here it was {old[key]}")
        if key not in FREE_SETTINGS and key in old and old[key] != value:
            raise NanochatError(
                f"run {stage.tag!r} was started with {flag} {old[key]}, not {value}: use the same settings to go on, "
                "or another --model-tag"
            )


def check_tokens(source: Source, tokenizer: Tokenizer) -> None:
    """Raise NanochatError if the source holds tokens of another tokenizer."""
    found = source.tokenizer_fingerprint()
    if found is not None and found != tokenizer.fingerprint():
        raise NanochatError(
            f"{source.name} holds tokens of another tokenizer ({found[:12]}, not {tokenizer.fingerprint()[:12]}): give "
            "the one that made them with --tokenizer"
        )


def check_data(stage: Stage, source: Source) -> None:
    """Raise NanochatError if files that a stage read are gone, changed or elsewhere in order. New ones go behind them."""
    if stage.resume_step is None:
        return
    now = source.describe()["files"]
    before = read_meta(stage.directory, stage.resume_step)["data"]["files"]
    for name, size in before.items():
        if now.get(name) != size:
            what = "is gone" if name not in now else "has changed"
            raise NanochatError(f"{name} of {source.name} {what} since run {stage.tag!r} read it: restore it to go on")
    for files in (source.train_files, source.val_files):
        known = [file.name in before for file in files]
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
    stage.lock.enter_context(lock_stage(stage.directory))  # as long as the stage lives; the trainer takes it once more
    if list_steps(stage.directory) != stage.steps:
        raise NanochatError(f"{stage.directory} was trained by another process meanwhile: give the same command again")
    if stage.resume_step is not None:
        print0(f"going on from step {stage.resume_step} of {stage.directory}")
        if later := set_aside(stage.directory, stage.resume_step):
            print0(f"{later[0]} to {later[-1]} of an earlier attempt are set aside there and may be deleted")
    else:
        (stage.directory / "metrics.jsonl").unlink(missing_ok=True)  # of a start that never reached a checkpoint
        if stage.name == "base":
            tokenizer.save(get_run_dir(stage.tag))
    atomic_write(stage.directory / SETTINGS_FILE, json.dumps(settings, indent=2))
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
            model = GPT(GPTConfig(**model_config))
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


def load_optimizer(optimizer: MuonAdamW, stage_dir: Path, step: int) -> None:
    """Give an optimizer the state of a step. Raises CheckpointError if that was saved without, or by another optimizer."""
    directory = step_dir(stage_dir, step)
    if optimizer.sharded:
        state = optimizer.state_dict()
        load_into(directory, OPTIMIZER_FILE, state)
    else:
        state = read_tensors(directory, OPTIMIZER_FILE)
    if not state:
        raise CheckpointError(f"{directory} was saved without optimizer state: training cannot go on from it")
    try:
        optimizer.load_state_dict(state)
    except KeyError as error:
        raise CheckpointError(
            f"{directory} was saved by a nanochat whose optimizer was another (it has no {error}): its weights can be used, "
            "but training must start anew under another --model-tag"
        ) from None


def go_on(trainer: Trainer, stage: Stage) -> None:
    """Put a resumed stage's trainer where it was."""
    if stage.resume_step is not None:
        load_optimizer(trainer.optimizer, stage.directory, stage.resume_step)
        trainer.load_state_dict(read_meta(stage.directory, stage.resume_step)["trainer"])


# ----------------------------------------------------------------------------- what stages share


def flops_in(model: GPT, minutes: float) -> float:
    """Floating-point operations that the ranks do in `minutes` of training, roughly: what a batch size is chosen by."""
    device, dtype = model.get_device(), model.get_compute_dtype()
    rate = expected_mfu(device, dtype) * from_rank0(measure_matmul_rate(device, dtype))
    return rate * get_dist_info()[3] * 60 * minutes


def batch_worth_an_update(model: GPT) -> int:
    """Tokens for which the work that an update takes whatever its batch is a fifth of the whole, roughly (a collective call).

    Where memory is slow beside the products, as with AMX, a smaller batch learns more from a token but less in a second
    (dev/LOG.md, "Batches where updates are dear").
    """
    device = model.get_device()
    idx = torch.zeros(1, model.config.sequence_len, dtype=torch.long, device=device)
    optimizer = _idle_optimizer(model)
    model(idx, idx).backward()
    seconds = max(gather_objects(min(seconds_of(optimizer.step, device) for _ in range(3))))
    model.zero_grad(set_to_none=True)
    return int(4 * seconds * flops_in(model, 1 / 60) / model.estimate_flops())


def _idle_optimizer(model: GPT) -> MuonAdamW:
    """One whose steps take their time and change nothing."""
    return model.setup_optimizer(matrix_lr=0, embedding_lr=0, unembedding_lr=0, scalar_lr=0, weight_decay=0)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """What a device takes for some work, to its very end."""
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def steps_in(
    stage: Stage, model: GPT, minutes: float, rows: int, total_batch_size: int, compile: bool, expand_at: float = 0.0
) -> int:
    """Updates that this machine does until `minutes` after the command was given: --target-minutes as a horizon.

    Measured on a few micro-batches of `rows`, compiled as the training will be, and on updates by nothing, of all blocks and
    of the last one, which learns alone for a share expand_at. A resumed stage keeps what it began with, so that its
    schedules stay what they were. Raises NanochatError if no time is left.
    """
    if old := stage.recorded_settings():
        return old["num_iterations"]
    T, device = model.config.sequence_len, model.get_device()
    if compile and can_compile(device) is None:
        print0("compiling, and measuring how fast this machine trains")
        model.compile()
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (rows, T), generator=generator).to(device)
    passes, count = Passes(model), torch.tensor(idx.numel(), device=device)
    optimizer = _idle_optimizer(model)
    accumulated = accumulation_steps(total_batch_size, rows, T, get_dist_info()[3])

    def seconds_of_step(idle_blocks: int) -> float:
        model.idle_blocks = idle_blocks
        each = [seconds_of(lambda: passes.run([(idx, idx)], count), device) for _ in range(5)][2:]  # the first ones compile
        updates = [seconds_of(optimizer.step, device) for _ in range(3)][1:]
        model.zero_grad(set_to_none=True)
        model.idle_blocks = 0
        return accumulated * statistics.median(each) + min(updates)

    mean = (1 - expand_at) * seconds_of_step(0)
    if expand_at:
        mean += expand_at * seconds_of_step(model.config.n_layer - 1)
    ranks = gather_objects((mean, seconds_since_start()))
    seconds, elapsed = (max(column) for column in zip(*ranks, strict=True))
    if elapsed >= 60 * minutes:
        raise NanochatError(f"--target-minutes {minutes:g} is over: start-up alone took {elapsed:.0f} s here; give more")
    return max(1, int((60 * minutes - elapsed) / seconds))


def describe_model(model: GPT) -> dict[str, Any]:
    """Sizes, for settings.json and the report."""
    counts = model.num_scaling_params()
    return {
        "num_params": counts["total"],
        "num_scaling_params": counts["scaling"],
        "flops_per_token": model.estimate_flops(),
    }


def choose_device_batch_size(model: GPT, requested: int, total_batch_size: int, world_size: int) -> int:
    """Rows in a micro-batch: as requested, else as many as divide the total batch and fit the device's memory.

    A CPU gets at most 8,192 tokens at a time, which is all its caches like; a quarter of that with a large vocabulary, when
    most of the time goes to the loss, which takes few tokens at a time anyway. A GPU is tried: one forward and backward
    pass, with fewer rows after each failure, so that cards of 6 and of 80 GB run the same command.
    """
    T, device = model.config.sequence_len, model.get_device()
    if requested > 0:
        accumulation_steps(total_batch_size, requested, T, world_size)  # raises if it does not divide
        return requested
    most_tokens = 2**17 if device.type == "cuda" else 2**13 if model.config.vocab_size < 2**14 else 2**11
    rows = default_device_batch_size(total_batch_size, T, world_size, most_tokens)
    accumulation_steps(total_batch_size, rows, T, world_size)
    while device.type == "cuda" and rows > 1 and any_rank(not _fits(model, rows)):
        rows = default_device_batch_size(total_batch_size, T, world_size, rows * T - 1)
    return rows


def _fits(model: GPT, rows: int) -> bool:
    """Whether a pass over that many rows fits in a GPU's memory, beside what the optimizer will need."""
    device = model.get_device()
    idx = torch.zeros(rows, model.config.sequence_len, dtype=torch.long, device=device)
    optimizer_bytes = 8 * sum(p.numel() for p in model.parameters())  # two float32 moments
    try:
        reserve = torch.empty(optimizer_bytes, dtype=torch.uint8, device=device)
        model(idx, idx).backward()
        del reserve
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()

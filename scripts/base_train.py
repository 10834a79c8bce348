"""Pretrain a base model: python -m scripts.base_train --depth=12, or torchrun --nproc_per_node=8 -m -- scripts.base_train.

`--depth` is the one dial; everything else follows from it (nanochat/scaling.py) and can be overridden.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.branch import branch_tag, start_of
from nanochat.common import NanochatError, print0, run_command
from nanochat.core_bundle import find_bundle
from nanochat.core_eval import NanochatScorer, evaluate_core
from nanochat.dataloader import TokenLoader
from nanochat.dataset import DATA_HELP, Source, default_source_name, get_source
from nanochat.devices import compute_init, in_process_group
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import batches_to_validate, evaluate_bpb
from nanochat.optim import OptimizerSettings
from nanochat.pace import batch_worth_an_update, choose_device_batch_size, flops_in, steps_in
from nanochat.ranks import gather_objects, on_rank0
from nanochat.same_run import check_settings
from nanochat.samples import continue_openings
from nanochat.scaling import (
    MOST_EPOCHS,
    TOKENS_PER_PARAM,
    Horizon,
    accumulation_steps,
    config_for_depth,
    expansion_share,
    plan_horizon,
)
from nanochat.settings import Arguments, SettingsParser
from nanochat.stage import Stage, begin, make_model, open_metrics, open_stage, setup_optimizer, time_limit, train, train_config
from nanochat.tokenizer import (
    FILE_NAME,
    Tokenizer,
    get_run_tokenizer,
    get_tokenizer,
    get_tokenizer_dir,
    name_or_absolute_path,
)
from nanochat.trainer import Trainer
from nanochat.training_flags import (
    RATES,
    add_rate_arguments,
    add_schedule_arguments,
    add_training_arguments,
    chosen_loggers,
    parse_switches,
)
from scripts import tok_train

HORIZON = ("num_iterations", "target_minutes", "target_flops", "target_param_data_ratio")
# Flags that, with the tokenizer, decide which weights fit the model.
SHAPE = ("depth", "aspect_ratio", "head_dim", "num_kv_heads", "max_seq_len", "window_pattern", "switches")


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Pretrain a base model.",
        examples=[
            "%(prog)s --depth 4 --max-seq-len 512 --target-minutes 5",
            "%(prog)s --config mine.toml --model-tag mine --resume auto",
            "torchrun --standalone --nproc_per_node=8 -m -- scripts.base_train --depth 20",
        ],
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", default=None, metavar="NAME|PATH", help=DATA_HELP)
    data.add_argument(
        "--tokenizer",
        default="default",
        metavar="NAME|PATH",
        help="made by scripts.tok_train; a resumed run keeps its own",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--depth", type=int, default=20, help="layers; all else follows from it")
    model.add_argument("--aspect-ratio", type=int, default=64, help="width = depth * aspect ratio")
    model.add_argument("--head-dim", type=int, default=128, help="channels of an attention head")
    model.add_argument("--num-kv-heads", type=int, default=None, help="fewer than the heads: grouped-query attention")
    model.add_argument("--max-seq-len", type=int, default=2048, help="context length")
    model.add_argument("--window-pattern", default="SSSL", metavar="LETTERS",
                       help="L: whole context, S: a quarter of it; repeated over the layers")  # fmt: skip
    horizon = parser.add_argument_group("horizon (the first that is above 0)")
    horizon.add_argument("--num-iterations", type=int, default=-1, help="updates")
    horizon.add_argument("--target-minutes", type=float, default=-1.0, help="minutes until training ends, start-up included")
    horizon.add_argument("--target-flops", type=float, default=-1.0, help="operations of the whole training, such as 1e18")
    horizon.add_argument("--target-param-data-ratio", type=float, default=TOKENS_PER_PARAM,
                         help="tokens per parameter of blocks and head")  # fmt: skip
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--total-batch-size", type=int, default=-1,
                              help="tokens in an update (-1: chosen from the tokens of the run)")  # fmt: skip
    add_rate_arguments(optimization)
    optimization.add_argument("--weight-decay", type=float, default=OptimizerSettings.weight_decay,
                              help="weight decay of matrices at depth 12, scaled from there")  # fmt: skip
    add_schedule_arguments(optimization)
    optimization.add_argument("--expand-at", type=float, default=-1.0, metavar="SHARE",
                              help="train only the last block for this share of the updates (0: never; "
                              "-1: decide from --target-minutes)")  # fmt: skip
    optimization.add_argument("--seed", type=int, default=42, help="seed of the initial weights")
    optimization.add_argument("--set", dest="switches", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                              help="for experiments: fields of GPTConfig and OptimizerSettings without a flag")  # fmt: skip
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--core-metric-every", type=int, default=-1, metavar="STEPS", help="measure CORE (-1: never)")
    measuring.add_argument("--core-metric-max-per-task", type=int, default=500, help="questions of each CORE task (-1: all)")
    measuring.add_argument("--eval-bundle", type=Path, default=None, metavar="DIR", help="CORE's data (default: downloaded)")
    run = add_training_arguments(parser, model_tag="the run's name (default: d and the depth)")
    run.add_argument("--resume-from-step", type=int, default=-1, help="the same as --resume STEP")
    args = parser.parse_args(argv)
    args.prefer_typed(*HORIZON)
    args.require_positive("depth", "aspect_ratio", "max_seq_len", "num_kv_heads")
    args.require_between(0, math.inf, *RATES, "weight_decay", "warmup_steps")
    args.require_between(0, 1, "warmdown_ratio", "final_lr_frac", *(["expand_at"] if args.expand_at != -1 else []))
    args.require_some("core_metric_max_per_task")
    args.leave_open("num_iterations", "target_minutes", "target_flops", "total_batch_size")
    if args.expand_at == -1:
        args.given.discard("expand_at")
    return args


class Plan(NamedTuple):
    """How a run goes."""

    horizon: Horizon
    rows: int  # of a micro-batch
    expand_at: float  # the share of the updates in which the last block learns alone
    target_flops: float  # written to config.toml, to plan the same run again
    by_time: bool  # planned by --target-minutes


def plan(
    args: Arguments, model: GPT, optimizer_switches: dict[str, Any], world_size: int, holds: Callable[[float], bool]
) -> Plan:
    """How long to train and in what batches. holds: whether the text has that many tokens."""
    target_flops, least_batch = args.target_flops, 0
    by_time = args.target_minutes > 0 and args.num_iterations <= 0
    optimizer = {"weight_decay": args.weight_decay, **optimizer_switches}
    if by_time:
        target_flops = flops_in(model, args.target_minutes)
        least_batch = batch_worth_an_update(model, optimizer) if args.total_batch_size <= 0 else 0
    expand_at = choose_expansion(args.expand_at, model, target_flops if by_time else 0, holds)
    flops_per_token = mean_flops(model, expand_at)
    horizon = plan_horizon(
        model.config, flops_per_token, args.num_iterations, target_flops, args.target_param_data_ratio, args.total_batch_size,
        least_batch, batch_multiple=args.max_seq_len * world_size * max(1, args.device_batch_size),
    )  # fmt: skip
    batch_size = horizon.total_batch_size
    rows = choose_device_batch_size(model, args.device_batch_size, batch_size, world_size, **optimizer)
    if by_time:  # plan again with the measured time of a batch of this size
        steps = steps_in(model, args.target_minutes, rows, batch_size, args.compile, optimizer, expand_at)
        target_flops = steps * batch_size * flops_per_token
        horizon = plan_horizon(model.config, flops_per_token, target_flops=target_flops, total_batch_size=batch_size)
    return Plan(horizon, rows, expand_at, target_flops, by_time)


def choose_expansion(asked: float, model: GPT, flops_in_time: float, holds: Callable[[float], bool]) -> float:
    """The share of the updates in which only the last block learns. Raises NanochatError if others would never learn.

    asked: --expand-at; flops_in_time: the operations that fit into --target-minutes, or 0 without that flag. Runs under
    --target-flops never choose it by themselves: they are made to be compared, so all train the same way.
    """
    if asked >= 1:
        raise NanochatError(f"--expand-at {asked:g} leaves no updates for the other blocks: give less than 1")
    if asked >= 0:
        return asked
    if flops_in_time <= 0:
        return 0.0
    share = expansion_share(flops_in_time / model.estimate_flops() / model.num_scaling_params()["scaling"])
    tokens = flops_in_time / mean_flops(model, share)
    return share if share == 0 or holds(tokens / MOST_EPOCHS) else 0.0


def mean_flops(model: GPT, expand_at: float) -> float:
    """Mean floating-point operations per token, in a run that trains only the last block for a share expand_at of it."""
    one_block, all_blocks = (model.estimate_flops(idle_blocks) for idle_blocks in (model.config.n_layer - 1, 0))
    return expand_at * one_block + (1 - expand_at) * all_blocks


def peak_weight_decay(args: Arguments, horizon: Horizon) -> float:
    """The peak weight decay, capped so that one update takes away at most an eighth of a matrix.

    In a run of few updates the rule would ask for more. For tall matrices, whose rate is doubled (updates.apply_update),
    the cap is a quarter.
    """
    most = 0.125 / max(args.matrix_lr * horizon.lr_scale, 1e-9)
    return min(args.weight_decay * horizon.weight_decay_scale, most)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    _, rank, _, world_size, device = compute_init(args.device_type, args.seed)
    resume = str(args.resume_from_step) if args.resume_from_step >= 0 else args.resume
    tag = args.model_tag if args.from_run is None else branch_tag(args, "base", resume)
    stage = open_stage("base", tag, f"d{args.depth}", resume, chosen_loggers(args))

    # What to train, for how long, in what batches
    stage.adopt(args)
    if args.fsdp and args.core_metric_every > 0:
        raise NanochatError("--core-metric-every needs a whole model: make it -1 with --fsdp, and run base_eval afterwards")
    start = start_of(args, stage, SHAPE)
    source, tokenizer = open_text(args, stage)
    model_switches, optimizer_switches = parse_switches(args.switches, GPTConfig, OptimizerSettings)
    OptimizerSettings(**optimizer_switches)  # refuses meaningless values before anything is written
    config = describe_config(args, tokenizer, model_switches)
    shape = {name: vars(args)[name] for name in SHAPE}
    kept = {**shape, "total_batch_size": args.total_batch_size, "tokenizer_fingerprint": tokenizer.fingerprint()}
    check_settings(stage, kept, args)
    stage.check_batch(args.device_batch_size, args.max_seq_len, world_size)
    model = make_model(config, device, args, start)

    def holds(tokens: float) -> bool:
        return on_rank0(lambda: source.holds(tokens, tokenizer))

    horizon, rows, expand_at, target_flops, by_time = plan(args, model, optimizer_switches, world_size, holds)
    bundle = find_bundle(args.eval_bundle) if args.core_metric_every > 0 else None
    decided = {
        "eval_bundle": bundle, "num_iterations": horizon.num_iterations, "total_batch_size": horizon.total_batch_size,
        "device_batch_size": rows, "expand_at": expand_at, "target_flops": target_flops,
        "parent": None if args.from_run is None else f"base of {args.from_run}",
    }  # fmt: skip
    settings = begin(stage, model, tokenizer, args, decided, source)
    if settings is None:
        return 0
    print0(
        f"pretraining {stage.tag}: depth {args.depth}, {settings['num_params']:,} parameters, "
        f"{horizon.num_iterations:,} steps of {horizon.total_batch_size:,} tokens, {device} in "
        f"{settings['dtype'].removeprefix('torch.')}"
        + (f"; only the last block for the first {expand_at:.0%}" if expand_at and args.depth > 1 else "")
    )

    # The parts
    optimizer = setup_optimizer(model, args, horizon.lr_scale, peak_weight_decay(args, horizon), **optimizer_switches)
    loader = TokenLoader(source, tokenizer, rows, args.max_seq_len, "train", rank, world_size, device)
    token_bytes = tokenizer.get_token_bytes()
    val_batches = batches_to_validate(args.eval_tokens, device, rows * args.max_seq_len * world_size)

    def evaluate() -> dict[str, float]:
        with TokenLoader(source, tokenizer, rows, args.max_seq_len, "val", rank, world_size, device, loop=False) as batches:
            return {"val/bpb": evaluate_bpb(model, itertools.islice(batches, val_batches), token_bytes)}

    evaluations = [(args.eval_every, evaluate)]
    if bundle is not None:
        evaluations.insert(0, (args.core_metric_every, core_evaluation(args, model, tokenizer, bundle)))

    def sample() -> list[dict[str, str]]:
        return continue_openings(Engine(model, tokenizer), source)

    trainer = Trainer(
        model, optimizer, loader,
        train_config(
            settings, device, stage_name="pretraining",
            grad_accum_steps=accumulation_steps(horizon.total_batch_size, rows, args.max_seq_len, world_size),
        ),
        stage.directory, open_metrics(stage, settings, args),
        {"tokenizer": tokenizer.fingerprint(), "settings": settings, "data": source.describe(), "parent": None},
        evaluations=evaluations, sample=sample, time_limit=time_limit(stage, settings, args, math.inf if by_time else None),
    )  # fmt: skip
    train(trainer, stage)
    stats = loader.stats()
    tokens = sum(gather_objects(stats["tokens"]))
    print0(f"{tokens:,} tokens of text read, no document cut short; rows {stats['filled']:.0%} full")
    stage.say_complete(trainer.config.num_iterations)
    loader.close()
    return 0


def open_text(args: Arguments, stage: Stage) -> tuple[Source, Tokenizer]:
    """The training text and its tokenizer; a resumed run keeps its own tokenizer."""
    source = get_source(default_source_name() if args.data is None else args.data)
    args.data = source.name  # as an absolute path: the next command may be given in another folder
    is_asked_for = "tokenizer" in args.given and args.tokenizer != args.defaults["tokenizer"]
    if stage.resume_step is not None and not is_asked_for:
        tokenizer = get_run_tokenizer(stage.tag)
    else:
        on_rank0(lambda: make_default_tokenizer(args.tokenizer, args.data))
        tokenizer = get_tokenizer(args.tokenizer)
        args.tokenizer = name_or_absolute_path(args.tokenizer)
    source.check_tokens(tokenizer)
    return source, tokenizer


def describe_config(args: Arguments, tokenizer: Tokenizer, switches: dict[str, Any]) -> GPTConfig:
    """The model that the flags ask for; switches: fields set with --set."""
    config = config_for_depth(
        args.depth, tokenizer.get_vocab_size(), args.max_seq_len, args.aspect_ratio, args.head_dim, args.window_pattern,
        args.num_kv_heads,
    )  # fmt: skip
    return replace(config, **switches)


def core_evaluation(args: Arguments, model: GPT, tokenizer: Tokenizer, bundle: Path) -> Callable[[], dict[str, float]]:
    """The evaluation for --core-metric-every."""

    def evaluate() -> dict[str, float]:
        results = evaluate_core(NanochatScorer(model, tokenizer), bundle, args.core_metric_max_per_task)
        return {f"val/{results['name']}": results["value"]}

    return evaluate


def make_default_tokenizer(name: str, data: str) -> None:
    """Train the default tokenizer on the same text if there is none, so that base_train works as the first command."""
    if name != "default" or (get_tokenizer_dir(name) / FILE_NAME).exists():
        return
    print("no tokenizer yet: training one")
    if not in_process_group():
        tok_train.main(["--data", data])
    else:  # in a subprocess: training blocks all threads of its process, so the other ranks would think this one dead
        subprocess.run([sys.executable, "-m", "scripts.tok_train", "--data", data], check=False)


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Fine-tune a base model on conversations: python -m scripts.chat_sft.

Reads the base checkpoint of --model-tag (default: the newest run) and writes into the same run's sft directory.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanochat.branch import branch_tag, copy_start
from nanochat.checkpoint_manager import find_run, read_config, read_meta
from nanochat.common import NanochatError, get_base_dir, print0, run_command
from nanochat.conversation_loader import ConversationLoader, check_answers, estimate_tokens
from nanochat.devices import compute_init
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import batches_to_validate, evaluate_bpb
from nanochat.pace import choose_device_batch_size, steps_in
from nanochat.ranks import from_rank0, on_rank0
from nanochat.runs import get_stage_dir, list_steps
from nanochat.same_run import check_mixture, check_settings
from nanochat.samples import sample_answers
from nanochat.scaling import accumulation_steps, fit_batch, learning_rate_scale
from nanochat.settings import Arguments, SettingsParser
from nanochat.stage import (
    Stage,
    begin,
    load_optimizer,
    make_model,
    open_metrics,
    open_stage,
    open_start,
    optimizer_switches,
    setup_optimizer,
    time_limit,
    train,
    train_config,
)
from nanochat.trainer import Trainer
from nanochat.training_flags import RATES, add_rate_arguments, add_schedule_arguments, add_training_arguments, chosen_loggers
from tasks import build_mixture, with_absolute_paths

DEFAULT_TASKS = "SmolTalk,MMLU*3,GSM8K*4,Identity*2,SimpleSpelling,SpellingBee"
LEAST_UPDATES = 50  # in a pass over the conversations: where there would be fewer, the batch is made smaller


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Fine-tune a base model on conversations.",
        examples=["%(prog)s --model-tag d12", '%(prog)s --tasks "GSM8K*4,MMLU:500" --target-minutes 30'],
    )
    data = parser.add_argument_group("data")
    data.add_argument("--model-step", type=int, default=None, help="base checkpoint to start from (default: the newest)")
    data.add_argument("--from-hf", default=None, metavar="DIR|NAME", help="import a Hugging Face model as a run to start from")
    data.add_argument("--tasks", default=None, metavar="NAME[*TIMES],...",
                      help="mixture; NAME:MOST takes at most MOST conversations "
                           f"(default: {DEFAULT_TASKS.replace(',', ', ')})")  # fmt: skip
    data.add_argument("--task-data", type=Path, default=None, metavar="DIR", help="read tasks from here, not from the hub")
    data.add_argument("--max-seq-len", type=int, default=-1, help="row length (-1: the base model's context)")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--num-iterations", type=int, default=-1, help="updates (-1: one pass over the mixture)")
    optimization.add_argument(
        "--target-minutes", type=float, default=-1.0, help="stop after about this long, if that is sooner"
    )
    optimization.add_argument(
        "--total-batch-size", type=int, default=-1, help="tokens in an update (-1: the base model's, fewer if a pass is short)"
    )
    add_rate_arguments(optimization)
    optimization.add_argument("--weight-decay", type=float, default=0.0, help="weight decay of matrices")
    optimization.add_argument("--init-lr-frac", type=float, default=0.6, help="multiply all learning rates by this")
    add_schedule_arguments(optimization, warmup_steps=0, warmdown_ratio=0.5, final_lr_frac=0.0)
    optimization.add_argument("--load-optimizer", type=int, choices=(0, 1), default=1, help="1: keep the base's state")
    optimization.add_argument("--seed", type=int, default=42, help="seed of the order of the conversations")
    add_training_arguments(parser, sample_every=0)
    args = parser.parse_args(argv)
    args.require_between(0, math.inf, *RATES, "weight_decay", "init_lr_frac", "warmup_steps")
    args.require_between(0, 1, "warmdown_ratio", "final_lr_frac")
    args.leave_open("max_seq_len", "num_iterations", "target_minutes", "total_batch_size")
    return args


def default_tasks() -> str:
    """The mixture without --tasks, with the user's own identity file if it lies where public recipes keep it.

    Raises NanochatError if a mixture cannot name that file.
    """
    path = get_base_dir() / "identity_conversations.jsonl"
    if not path.exists():
        return DEFAULT_TASKS
    if "," in str(path):
        raise NanochatError(
            f"{path} cannot be in the mixture, where a comma ends an entry: set NANOCHAT_BASE_DIR to a folder without one, or "
            "give --tasks"
        )
    print0(f"{path} takes the place of Identity in the mixture (--tasks chooses another)")
    return DEFAULT_TASKS.replace("Identity", str(path))


def choose_batch(usual: int, together: int, tokens_in_pass: int) -> int:
    """Tokens in an update: the base model's `usual`, or fewer if a pass over the conversations would be few updates.

    together: tokens that all ranks take at a time; the result is a multiple of it.
    """
    batch = fit_batch(usual, together) if usual % together else usual
    while batch * LEAST_UPDATES > tokens_in_pass and batch % (2 * together) == 0:
        batch //= 2
    return batch


def find_base(args: Arguments) -> str:
    """The run whose base model is fine-tuned, or that gets a copy of one; --from-hf imports it, unless that has begun."""
    if args.from_run is not None and args.from_hf is not None:
        raise NanochatError("--from-run and --from-hf both name a model to start from: leave one out")
    if args.from_run is not None:
        return branch_tag(args, "sft", args.resume)
    if args.from_hf is not None and (path := Path(os.path.expanduser(args.from_hf))).is_dir():
        args.from_hf = str(path.absolute())  # the next command may be given in another folder
    if args.from_hf is None or (args.resume != "none" and args.model_tag and began_with(args.from_hf, args.model_tag)):
        return find_run("base", args.model_tag, heir="sft" if args.resume != "none" else None)
    from nanochat.hf.load import import_run

    return on_rank0(lambda: import_run(args.from_hf, args.model_tag))


def began_with(name: str, tag: str) -> bool:
    """Whether fine-tuning the run has begun with this Hugging Face model, which may be gone by now."""
    stage_dir, base_dir = get_stage_dir(tag, "sft"), get_stage_dir(tag, "base")
    if not (steps := list_steps(stage_dir)):
        return False
    known = {read_meta(stage_dir, steps[-1])["settings"].get("from_hf")}
    known |= {read_meta(base_dir, step).get("imported", {}).get("from") for step in list_steps(base_dir)}
    return not known.isdisjoint([name, os.path.abspath(os.path.expanduser(name))])


def with_context(config: GPTConfig, sequence_len: int) -> GPTConfig:
    """A base model's config with another context; tells if this changes how far layers see."""
    changed = replace(config, sequence_len=sequence_len)
    before, after = config.windows(), changed.windows()
    if after != before:
        print0(f"layers see {min(after)} to {max(after)} tokens back, in the base model {min(before)} to {max(before)}")
    return changed


def plan(
    args: Arguments, stage: Stage, model: GPT, meta: dict[str, Any], tokens_in_pass: Callable[[], int], world_size: int
) -> tuple[int, int, int, int]:
    """(tokens in an update, rows in a micro-batch, updates, most of them); meta: of the checkpoint that the stage begins with.

    The most are one pass over the conversations, or what was asked for.
    """
    total_batch_size, num_iterations = max(0, args.total_batch_size), max(0, args.num_iterations)
    if not (total_batch_size and num_iterations):
        tokens = tokens_in_pass()
        together = model.config.sequence_len * world_size * max(1, args.device_batch_size)
        total_batch_size = total_batch_size or choose_batch(meta["settings"]["total_batch_size"], together, tokens)
        num_iterations = num_iterations or max(1, round(tokens / total_batch_size))
    optimizer, most = {"weight_decay": args.weight_decay, **optimizer_switches(meta)}, num_iterations
    rows = choose_device_batch_size(model, args.device_batch_size, total_batch_size, world_size, **optimizer)
    if args.target_minutes > 0:  # stop early if time is short; a resumed stage keeps the number decided at its start
        steps = stage.recorded_settings().get("num_iterations")
        steps = steps or steps_in(model, args.target_minutes, rows, total_batch_size, args.compile, optimizer)
        num_iterations = min(num_iterations, steps)
    return total_batch_size, rows, num_iterations, most


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    _, rank, _, world_size, device = compute_init(args.device_type, args.seed)
    base_tag = find_base(args)
    stage = open_stage("sft", base_tag, base_tag, args.resume, chosen_loggers(args))
    stage.adopt(args)

    # The starting point: the base model, its tokenizer, its settings
    start_dir, tokenizer, meta, base_step = open_start(stage, "base", args.model_step, args.from_run)
    config = read_config(meta["model_config"])
    if args.max_seq_len > 0:
        config = with_context(config, args.max_seq_len)
    sequence_len = config.sequence_len
    args.tasks = from_rank0(with_absolute_paths(default_tasks() if args.tasks is None else args.tasks))
    train_task = build_mixture(args.tasks, "train", args.task_data)
    val_task = build_mixture(args.tasks, "val", args.task_data)
    mixture = check_mixture(stage, train_task, args.tasks)
    if mixture is None:
        return 0
    check_answers(val_task, tokenizer, sequence_len)
    kept = {"total_batch_size": args.total_batch_size, "tokenizer_fingerprint": tokenizer.fingerprint()}
    check_settings(stage, kept, args)
    stage.check_batch(args.device_batch_size, sequence_len, world_size)
    model = make_model(config, device, args, (start_dir, meta["step"]))

    def tokens_in_pass() -> int:
        return estimate_tokens(train_task, tokenizer, sequence_len)

    total_batch_size, rows, num_iterations, most = plan(args, stage, model, meta, tokens_in_pass, world_size)
    decided = {
        **mixture, "num_iterations": num_iterations, "total_batch_size": total_batch_size, "device_batch_size": rows,
        "parent": f"base step {base_step}", "switches": meta["settings"].get("switches", []),
    }  # fmt: skip
    settings = begin(stage, model, tokenizer, args, decided)
    if settings is None:
        return 0
    copy_start(stage, start_dir, base_step)
    print0(f"fine-tuning {stage.tag}: {len(train_task):,} conversations, {num_iterations:,} steps")

    # The parts
    scale = args.init_lr_frac * learning_rate_scale(total_batch_size)
    optimizer = setup_optimizer(model, args, scale, args.weight_decay, **optimizer_switches(meta))
    if stage.resume_step is None and args.load_optimizer and "imported" not in meta:
        load_optimizer(optimizer, start_dir, base_step)
    loader = ConversationLoader(train_task, tokenizer, rows, sequence_len, rank, world_size, device, seed=args.seed)
    token_bytes = tokenizer.get_token_bytes()
    val_batches = batches_to_validate(args.eval_tokens, device, rows * sequence_len * world_size)

    def evaluate() -> dict[str, float]:
        batches = ConversationLoader(val_task, tokenizer, rows, sequence_len, rank, world_size, device, loop=False)
        return {"val/bpb": evaluate_bpb(model, itertools.islice(batches, val_batches), token_bytes)}

    def sample() -> list[dict[str, str]]:
        return sample_answers(Engine(model, tokenizer), val_task)  # a mixture: some of each kind

    trainer = Trainer(
        model, optimizer, loader,
        train_config(
            settings, device, stage_name="fine-tuning",
            grad_accum_steps=accumulation_steps(total_batch_size, rows, sequence_len, world_size),
        ),
        stage.directory, open_metrics(stage, settings, args),
        {"tokenizer": tokenizer.fingerprint(), "settings": settings, "parent": {"stage": "base", "step": base_step}},
        evaluations=[(args.eval_every, evaluate)], sample=sample,
        time_limit=time_limit(stage, settings, args, most if args.target_minutes > 0 else None),
    )  # fmt: skip
    train(trainer, stage)
    stats = loader.stats()
    print0(
        f"{stats['conversations']:,} conversations read, {stats['truncated']:,} truncated to {sequence_len} tokens, "
        f"{stats['skipped']:,} without an answer left; rows {stats['filled']:.0%} full"
    )
    stage.say_complete(trainer.config.num_iterations)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

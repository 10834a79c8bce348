"""Reinforce a chat model on a task with rewards: python -m scripts.chat_rl --task GSM8K.

Reads the SFT checkpoint of --model-tag (default: the newest run) and writes into the same run's rl directory.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

from nanochat.branch import branch_tag, copy_start
from nanochat.chat_eval import Answering, evaluate_task
from nanochat.checkpoint_manager import find_run, load_model, read_config
from nanochat.common import NanochatError, print0, run_command
from nanochat.devices import compute_init
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.pace import choose_answer_rows
from nanochat.rl import OBJECTIVES, RolloutLoader, RolloutSettings, make_policy_loss
from nanochat.same_run import check_mixture
from nanochat.samples import sample_answers
from nanochat.settings import Arguments, SettingsParser
from nanochat.stage import (
    Stage,
    begin,
    make_model,
    open_metrics,
    open_stage,
    open_start,
    optimizer_switches,
    setup_optimizer,
    train,
    train_config,
)
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import Trainer
from nanochat.training_flags import RATES, add_rate_arguments, add_training_arguments, chosen_loggers
from nanochat.trimming import prompt_room
from tasks import build_judged_task
from tasks.common import Task


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Reinforce a chat model on a task with rewards.",
        examples=["%(prog)s --task GSM8K --model-tag d12", "%(prog)s --task Arithmetic --objective grpo"],
    )
    data = parser.add_argument_group("data")
    data.add_argument("-i", "--source", default="sft", choices=("base", "sft"), help="stage of the model to start from")
    data.add_argument("--model-step", type=int, default=None, help="checkpoint to start from (default: the newest)")
    data.add_argument("--task", default="GSM8K", metavar="NAME", help="task to learn; its held-out part is for measuring")
    data.add_argument("--task-data", type=Path, default=None, metavar="DIR", help="read tasks from here, not from the hub")
    rollouts, usual = parser.add_argument_group("rollouts"), RolloutSettings()
    rollouts.add_argument("--objective", default=usual.objective, metavar="|".join(OBJECTIVES),
                          help="how answers are compared")  # fmt: skip
    rollouts.add_argument("--examples-per-step", type=int, default=usual.examples_per_step, help="problems in an update")
    rollouts.add_argument("--num-samples", type=int, default=usual.num_samples, help="answers to each problem")
    rollouts.add_argument("--max-new-tokens", type=int, default=usual.max_tokens, help="most tokens in an answer")
    rollouts.add_argument("--temperature", type=float, default=usual.temperature, help="sampling temperature")
    rollouts.add_argument("--top-k", type=int, default=usual.top_k, help="sample from the K likeliest tokens (0: from all)")
    rollouts.add_argument("--kl-weight", type=float, default=usual.kl_weight, help="penalty on KL from the starting model")
    rollouts.add_argument("--max-rows", type=int, default=64, help="answers generated at the same time")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--num-epochs", type=int, default=1, help="passes over the task")
    optimization.add_argument("--num-iterations", type=int, default=-1, help="updates, instead of epochs")
    add_rate_arguments(optimization)
    optimization.add_argument("--weight-decay", type=float, default=0.0, help="weight decay of matrices")
    optimization.add_argument("--init-lr-frac", type=float, default=0.05, help="multiply all learning rates by this")
    optimization.add_argument("--seed", type=int, default=usual.seed, help="seed of the sampling")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--eval-examples", type=int, default=400, help="held-out problems to answer")
    measuring.add_argument("--eval-samples", type=int, default=8, help="N answers to each, for pass@1 and pass@N")
    add_training_arguments(parser, eval_every=60, sample_every=0, generates=True)
    args = parser.parse_args(argv)
    args.prefer_typed("num_iterations", "num_epochs")
    args.require_positive("examples_per_step", "num_samples", "max_new_tokens", "max_rows", "eval_examples", "eval_samples")
    args.require_positive("num_epochs")
    args.require_between(0, math.inf, *RATES, "weight_decay", "init_lr_frac", "kl_weight")
    args.leave_open("num_iterations")
    return args


def load_reference(parent: dict[str, Any], tag: str, stage: Stage, device: torch.device) -> GPT:
    """The model that --kl-weight measures from. Raises NanochatError if its weights changed since this stage began."""
    model, _, meta = load_model(parent["stage"], device, "eval", tag, parent["step"])
    if parent.get("weights") != meta["weights"]:
        raise NanochatError(
            f"{parent['stage']} step {parent['step']} of run {tag!r} has other weights than when {stage.directory} was "
            "begun from it, and --kl-weight needs those: put them back, or remove that folder to start again"
        )
    return model


def check_room(task: Task, tokenizer: Tokenizer, max_new_tokens: int, sequence_len: int) -> None:
    """Raise NanochatError if --max-new-tokens leaves no room for most questions; say how many lose their beginning."""
    room, tried = prompt_room(sequence_len, max_new_tokens, context_share=1), range(min(100, len(task)))
    cut = sum(len(tokenizer.render_for_completion(task[i])) > room for i in tried)
    if cut > len(tried) / 2:
        raise NanochatError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a question in a context of {sequence_len}: choose fewer"
        )
    if cut:
        print0(
            f"{cut} of the first {len(tried)} questions lose their beginning: answers may have {max_new_tokens} tokens "
            f"(--max-new-tokens), and the context is {sequence_len}"
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    _, rank, _, world_size, device = compute_init(args.device_type, args.seed)
    if args.from_run is None:
        tag = find_run(args.source, args.model_tag, heir="rl" if args.resume != "none" else None)
    else:
        tag = branch_tag(args, "rl", args.resume)
    stage = open_stage("rl", tag, tag, args.resume, chosen_loggers(args))
    stage.adopt(args)
    rollout_settings = RolloutSettings(
        objective=args.objective, examples_per_step=args.examples_per_step, num_samples=args.num_samples,
        max_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, kl_weight=args.kl_weight,
        seed=args.seed,
    )  # fmt: skip

    # Where to start, and how long to train
    start_dir, tokenizer, meta, parent_step = open_start(stage, args.source, args.model_step, args.from_run)
    train_task, val_task = (build_judged_task(args.task, split, args.task_data) for split in ("train", "val"))
    if len(val_task) == 0:
        raise NanochatError(f"--task {args.task} has too few problems to hold some out for measuring: give more")
    config = read_config(meta["model_config"])
    check_room(train_task, tokenizer, args.max_new_tokens, config.sequence_len)
    mixture = check_mixture(stage, train_task, args.task)
    if mixture is None:
        return 0
    in_epochs = max(1, args.num_epochs * len(train_task) // args.examples_per_step)
    num_iterations = args.num_iterations if args.num_iterations > 0 else in_epochs
    model = make_model(config, device, args, (start_dir, meta["step"]))
    model.fixed_shape = False  # answers are of any length
    begun = stage.resume_step is not None
    parent = meta["parent"] if begun else {"stage": args.source, "step": parent_step, "weights": meta["weights"]}
    reference = load_reference(parent, meta["tag"], stage, device) if args.kl_weight > 0 else None
    rows = choose_answer_rows(model, args.device_batch_size, **optimizer_switches(meta))
    rows_per_rank = -(-args.examples_per_step // world_size) * args.num_samples
    decided = {
        **mixture, "tasks": args.task, "num_iterations": num_iterations, "device_batch_size": rows,
        "parent": f"{args.source} step {parent_step}", "switches": meta["settings"].get("switches", []),
    }  # fmt: skip
    settings = begin(stage, model, tokenizer, args, decided)
    if settings is None:
        return 0
    copy_start(stage, start_dir, parent_step)
    print0(f"reinforcing {stage.tag} on {args.task}: {num_iterations:,} updates of {args.examples_per_step} problems")

    # The parts
    optimizer = setup_optimizer(model, args, args.init_lr_frac, args.weight_decay, **optimizer_switches(meta))
    engine = Engine(model, tokenizer, max_rows=args.max_rows)
    if args.compile and (reason := engine.compile(frozen=False)) is not None:
        print0(f"answering without torch.compile: {reason}")
    loader = RolloutLoader(engine, train_task, rollout_settings, -(-rows_per_rank // rows), rank, world_size)
    loss_fn, count_fn = make_policy_loss(rollout_settings, reference)
    answering = Answering(args.eval_samples, args.max_new_tokens, args.temperature, args.top_k, context_share=1)

    def evaluate() -> dict[str, float]:
        engine.forget()
        problems = min(args.eval_examples, len(val_task))
        print0(f"measuring: {args.eval_samples} answers to each of {problems} held-out problems")
        result = evaluate_task(engine, val_task, args.eval_examples, args.max_rows, answering)
        return {f"val/pass@{k}": share for k, share in result.pass_at.items() if k in (1, args.eval_samples)}

    def sample() -> list[dict[str, str]]:
        engine.forget()
        return sample_answers(engine, val_task, max_tokens=args.max_new_tokens)

    trainer = Trainer(
        model, optimizer, loader,
        train_config(
            settings, device, stage_name="reinforcing", total_batch_size=0, grad_accum_steps=loader.micro_batches,
            warmup_steps=0, warmdown_ratio=1.0, final_lr_frac=0.0, eval_first=True, best_metric="val/pass@1", log_every=1,
            compile=False,  # row lengths keep changing, and most of the time goes into answering
        ),
        stage.directory, open_metrics(stage, settings, args),
        {"tokenizer": tokenizer.fingerprint(), "settings": settings, "parent": parent},
        evaluations=[(args.eval_every, evaluate)], sample=sample,
        loss_fn=loss_fn, count_fn=count_fn, step_metrics=loader.metrics,
    )  # fmt: skip
    train(trainer, stage)
    stage.say_complete(trainer.config.num_iterations)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

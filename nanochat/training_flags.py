"""Flags that all training scripts share, and functions that read them. A script defines its own flags itself."""

from __future__ import annotations

import argparse
import ast
import difflib
import shlex
from dataclasses import fields
from typing import Any

from nanochat.common import NanochatError
from nanochat.loggers import LOGGERS
from nanochat.optim import OptimizerSettings
from nanochat.schedules import Schedule
from nanochat.settings import add_device_argument, flag_of

RATES = {  # fields of OptimizerSettings, and flags
    "embedding_lr": "peak learning rate of embeddings, at width 768 and before the stage's scaling",
    "unembedding_lr": "the same for the head",
    "matrix_lr": "peak learning rate of matrices (Muon), before the stage's scaling",
    "scalar_lr": "the same for scalars",
}
# Fields of GPTConfig and OptimizerSettings that --set refuses, because their flags do more than set the field.
OF_FLAGS = {name: flag_of(name) for name in (*RATES, "weight_decay", "window_pattern")} | {
    "sequence_len": "--max-seq-len",
    "vocab_size": "--tokenizer",
}


def add_training_arguments(
    parser: argparse.ArgumentParser,
    eval_every: int = 250,
    sample_every: int = 2000,
    generates: bool = False,
    model_tag: str = "the run to start from, and to write into (default: the newest)",
) -> argparse._ArgumentGroup:
    """Add the flags that every training script has; returns the group "run", so that a script can add to it.

    generates: the stage learns from text that it generates, which takes an unsharded model. model_tag: help of that flag.
    """
    run = parser.add_argument_group("run")
    run.add_argument(
        "--run",
        default="dummy",
        metavar="NAME",
        help="the run's name in loggers; without --log-to it means wandb ('dummy': no logger)",
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
    run.add_argument("-g", "--model-tag", default=None, metavar="TAG", help=model_tag)
    run.add_argument("--from-run", default=None, metavar="TAG",
                     help="start a new run, named by --model-tag, from this run's model")  # fmt: skip
    run.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|STEP",
        help="auto: continue from the newest checkpoint, if any; none: start, but never over an existing run; "
        "STEP: continue from there",
    )
    run.add_argument("--save-every", type=int, default=-1, metavar="STEPS",
                     help="steps between checkpoints (0: only at the end; -1: before each evaluation)")  # fmt: skip
    run.add_argument("--keep-last", type=int, default=3, metavar="K", help="keep the newest K and the best (-1: all)")
    run.add_argument("--eval-every", type=int, default=eval_every, metavar="STEPS",
                     help=f"validate (-1: only {'before and after' if generates else 'at the end'})")  # fmt: skip
    run.add_argument("--sample-every", type=int, default=sample_every, metavar="STEPS",
                     help="show samples of the model's text (0: only at the end; -1: never)")  # fmt: skip
    if not generates:
        run.add_argument("--eval-tokens", type=int, default=None, metavar="N",
                         help="validation tokens to use, in whole batches of all ranks, at least one (default: 2^18, on a GPU "
                              "2^22; -1: all)")  # fmt: skip
    machine = parser.add_argument_group("machine")
    add_device_argument(machine)
    machine.add_argument("--device-batch-size", type=int, default=-1, metavar="ROWS",
                         help="rows in a micro-batch (-1: as many as fit)")  # fmt: skip
    if generates:
        parser.set_defaults(fsdp=False)
    else:
        machine.add_argument("--fsdp", action="store_true", help="shard the model over all ranks, if one GPU cannot hold it")
    machine.add_argument("--activation-checkpointing", action="store_true",
                         help="recompute blocks in the backward pass: a third slower, but less memory")  # fmt: skip
    machine.add_argument("--fp8", action="store_true", help="multiply in 8 bits (GPUs from Ada and Hopper on)")
    machine.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly")
    return run


def chosen_loggers(args: argparse.Namespace) -> list[str]:
    """The loggers that the flags name; --run without any means wandb."""
    return args.log_to or (["wandb"] if args.run != "dummy" else [])


def add_rate_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the peak learning rates, which stage.setup_optimizer reads."""
    for name, text in RATES.items():
        group.add_argument(flag_of(name), type=float, default=getattr(OptimizerSettings, name), help=text)


def add_schedule_arguments(group: argparse._ArgumentGroup, **defaults: float) -> None:
    """Add the flags of the learning rates' course; defaults: those that differ from Schedule's."""
    for name, kind, text in (
        ("warmup_steps", int, "steps until the rates reach their peak"),
        ("warmdown_ratio", float, "share of the run over which the rates fall"),
        ("final_lr_frac", float, "rate at the last step, as a share of the peak"),
    ):
        group.add_argument(flag_of(name), type=kind, default=defaults.get(name, getattr(Schedule, name)), help=text)


def parse_switches(pairs: list[str], *settings: type) -> list[dict[str, Any]]:
    """Turn NAME=VALUE pairs into keyword arguments, one dict for each dataclass in `settings`.

    Raises NanochatError for an unknown name, a name that has its own flag, or a value of the wrong kind.
    """
    parsed: list[dict[str, Any]] = [{} for _ in settings]
    known: dict[str, tuple[dict[str, Any], Any]] = {
        f.name: (target, f.default) for target, cls in zip(parsed, settings, strict=True) for f in fields(cls)
    }
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name in OF_FLAGS and name in known:
            raise NanochatError(f"--set {pair}: {name} has a flag of its own: use {OF_FLAGS[name]}")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(sorted(known))}"
            raise NanochatError(f"--set {pair}: there is no switch {name!r}; {hint}")
        target, default = known[name]
        try:
            if isinstance(default, bool):
                target[name] = {"true": True, "false": False}[text.lower()]
            elif isinstance(default, int):
                target[name] = int(text)  # 2.7 would be cut to 2
            else:
                target[name] = text if isinstance(default, str) else type(default)(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError, KeyError, OverflowError):
            example = shlex.quote(f"{name}={default}")
            raise NanochatError(f"--set {pair}: the value must be like {default!r}, as in --set {example}") from None
    return parsed

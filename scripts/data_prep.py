"""Raw text to shuffled, deduplicated, tokenized shards: python -m scripts.data_prep --input PATH --output DIR."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nanochat.common import NanochatError, run_command
from nanochat.files import atomic_write, read_json
from nanochat.listings import finds_below, is_remote
from nanochat.prep_input import estimate_tokens, list_inputs
from nanochat.prep_output import MAX_JOBS, PREPARED, OutputLayout, PrepSettings, describe_output, lock_output
from nanochat.settings import Arguments, SettingsParser
from nanochat.tokenizer import Tokenizer, get_tokenizer

OF_SLURM = ("partition", "time", "sbatch")  # whoever gives one expects a job, not hours of work on this machine


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Prepare text for pretraining: shuffle, deduplicate, tokenize.",
        examples=["%(prog)s --input raw/ --output prepared/", "%(prog)s --config prep.toml --executor slurm"],
    )
    parser.add_argument("--input", required=True, metavar="PATH",
                        help="a file, folder or glob of .parquet, .jsonl, .txt, .md; local or s3://...")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="where the shards go; all machines must see it")
    text = parser.add_argument_group("text")
    text.add_argument("--text-column", default=None, metavar="NAME", help="where the text is (default: text, content or body)")
    text.add_argument("--val-documents", type=int, default=None, help="validation documents (default: 2%%, at most 10,000)")
    text.add_argument("--seed", type=int, default=42, help="seed of the order")
    text.add_argument("--no-dedup", action="store_true", help="keep documents with the same text")
    text.add_argument("--min-hash", action="store_true", help="drop near-duplicates as well")
    shards = parser.add_argument_group("shards")
    shards.add_argument("--tokenizer", default="default", metavar="NAME|PATH", help="tokenizer of the shards")
    shards.add_argument("--no-tokenize", action="store_true", help="write shards of text")
    shards.add_argument("--shard-tokens", type=int, default=100_000_000, help="approximate tokens in a shard")
    machine = parser.add_argument_group("machines")
    machine.add_argument("--executor", default="local", choices=["local", "slurm", "ray"], help="who runs the tasks")
    machine.add_argument(
        "--tasks", type=int, default=None, help="tasks that share the input files (default: one per file, at most 1000)"
    )
    machine.add_argument("--workers", type=int, default=None, help="tasks at a time (default: all cores, or no limit)")
    machine.add_argument("--cpus-per-task", type=int, default=1, help="slurm, ray: cores of a task")
    machine.add_argument("--mem-per-cpu", type=int, default=4, metavar="GB", help="slurm, ray: memory of each core")
    machine.add_argument("--partition", default=None, metavar="NAME", help="slurm: partition of the cluster")
    machine.add_argument("--time", default="12:00:00", metavar="HH:MM:SS", help="slurm: time limit of one task")
    machine.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE",
                         help="slurm: another option, for example account=NAME; may be repeated")  # fmt: skip
    args = parser.parse_args(argv)
    if args.executor != "slurm" and (useless := args.typed_of(OF_SLURM)):
        raise NanochatError(f"only Slurm uses {useless}: give --executor slurm, or leave that out")
    args.require_positive("shard_tokens", "val_documents", "tasks", "workers", "cpus_per_task", "mem_per_cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    _check_installed(args)
    from nanochat.prep_stages import build_stages, run_here, submit

    if "://" not in args.input:
        args.input = str(Path(os.path.expanduser(args.input)).absolute())
    layout = OutputLayout(Path(os.path.expanduser(args.output)).absolute())
    inputs = _list_inputs(args, layout)
    tokenizer = None if args.no_tokenize else get_tokenizer(args.tokenizer)
    settings = _choose_settings(args, layout, inputs, tokenizer)
    if layout.manifest.exists():
        print(f"{layout.output} is complete: {describe_output(layout)}")
        return 0
    with contextlib.ExitStack() as stack:
        _open_output(stack, settings, layout, tokenizer)
        stages = build_stages(settings, layout)
        (submit if args.executor == "slurm" else run_here)(args, stages, layout)
    return 0


def _check_installed(args: Arguments) -> None:
    needed = {"datatrove": "data", **({"tokenizers": "data"} if args.min_hash else {})}
    needed |= {"ray": "data ray"} if args.executor == "ray" else {}
    for package, extra in needed.items():
        try:
            __import__(package)
        except ImportError as error:
            raise NanochatError(f"{package} is not installed: bash runs/setup.sh {extra}") from error
    from loguru import logger

    logger.remove()  # datatrove's log goes to work/log, not to the screen


def _list_inputs(args: Arguments, layout: OutputLayout) -> dict[str, int]:
    """The files to prepare, with their sizes. Raises NanochatError if the output's are, or will be, among them."""
    inputs = list_inputs(args.input)
    if is_remote(args.input):
        return inputs
    output = Path(os.path.realpath(layout.output))  # links and .. may lead into the other folder
    ours = any(output in Path(os.path.realpath(path)).parents for path in inputs)
    if ours or finds_below(args.input, output, "shard_00000.parquet"):
        raise NanochatError(f"--output {layout.output} and --input {args.input} overlap: choose another folder")
    return inputs


def _choose_settings(
    args: Arguments, layout: OutputLayout, inputs: dict[str, int], tokenizer: Tokenizer | None
) -> PrepSettings:
    """The settings of this output. Raises NanochatError if it was begun with others. Writes nothing."""
    begun = _begun(layout)
    num_shards = begun.get("num_shards")
    if num_shards is None:
        tokens = estimate_tokens(args.input, inputs, args.text_column, tokenizer)
        num_shards = max(1, round(tokens / args.shard_tokens))
        print(f"about {tokens:,} tokens in {len(inputs):,} files, for {num_shards:,} shards")
    settings = PrepSettings(
        input=args.input, inputs=inputs, text_column=args.text_column,
        tokenizer=tokenizer.fingerprint() if tokenizer else None,
        seed=args.seed, val_documents=args.val_documents, shard_tokens=args.shard_tokens, num_shards=num_shards,
        dedup=not args.no_dedup, min_hash=args.min_hash, tasks=args.tasks or min(len(inputs), MAX_JOBS),
    )  # fmt: skip
    if begun:
        _compare(settings, begun, layout)
    return settings


def _begun(layout: OutputLayout) -> dict[str, Any]:
    """The settings that an output was begun with, {} if it was not. Raises NanochatError if the folder is somebody else's."""
    begun = read_json(layout.settings)
    files = layout.output.glob("[!.]*")  # hidden ones are the system's, or what a killed process was writing
    if not begun.keys() >= PREPARED and any(path.name != "work" for path in files):
        raise NanochatError(f"--output {layout.output} holds files of another origin: choose an empty folder")
    return begun


def _compare(settings: PrepSettings, begun: dict[str, Any], layout: OutputLayout) -> None:
    """Raises NanochatError if an output was begun with other settings."""
    for field in fields(settings):
        before, now = begun.get(field.name), getattr(settings, field.name)
        if before != now:
            difference = f"with {field.name} {before}, not {now}" if field.name != "inputs" else "with other input files"
            raise NanochatError(f"{layout.output} was begun {difference}: use that again, or another --output")


def _open_output(
    stack: contextlib.ExitStack, settings: PrepSettings, layout: OutputLayout, tokenizer: Tokenizer | None
) -> None:
    """Lock the output for as long as the stack is open, and write its settings and tokenizer on the first call."""
    try:
        stack.enter_context(lock_output(layout))
        if begun := _begun(layout):  # another command may have begun it meanwhile
            _compare(settings, begun, layout)
        else:
            atomic_write(layout.settings, json.dumps(asdict(settings), indent=1))
        if tokenizer:  # keeps the tokenizer together with its shards
            tokenizer.save(layout.output)
    except OSError as error:
        raise NanochatError(f"--output {layout.output} cannot be written ({error.strerror}): choose another") from error


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Measure a base model: python -m scripts.base_eval --eval core,bpb,sample."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import load_model
from nanochat.common import NanochatError, get_base_dir, print0, run_command
from nanochat.core_bundle import find_bundle
from nanochat.core_eval import NUM_TASKS, NanochatScorer, Scorer, evaluate_core
from nanochat.dataloader import TokenLoader
from nanochat.dataset import Source, get_source
from nanochat.devices import compute_init
from nanochat.engine import Engine
from nanochat.eval_results import merge_eval
from nanochat.files import short_name
from nanochat.hf_scorer import HuggingFaceScorer
from nanochat.loss_eval import evaluate_bpb
from nanochat.progress import Progress
from nanochat.ranks import all_or_none, compare_ranks, from_rank0
from nanochat.runs import get_stage_dir
from nanochat.samples import continue_openings
from nanochat.scores import core_table, describe_mean
from nanochat.settings import Arguments, SettingsParser, add_device_argument
from nanochat.tables import print_table
from nanochat.tokenizer import Tokenizer

KINDS = ("core", "bpb", "sample")
OF_RUNS = ("model_tag", "step", "data", "split_tokens", "device_batch_size")  # what a Hugging Face model has no use for
LOOK_AHEAD = 128  # batches: by default all that are measured, 2^20 tokens in 16 MB
WORTH_COMPILING = 100  # questions of each CORE task; with fewer, compiling takes longer than it saves


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Measure a base model: the CORE metric, bits per byte, samples.",
        examples=[
            "%(prog)s --model-tag d12 --eval core,bpb,sample",
            "%(prog)s --hf-path openai-community/gpt2 --max-per-task 100",
        ],
    )
    model = parser.add_argument_group("model")
    model.add_argument("-g", "--model-tag", default=None, metavar="TAG", help="run (default: the newest)")
    model.add_argument("-s", "--step", type=int, default=None, help="checkpoint (default: the newest)")
    model.add_argument("--hf-path", default=None, metavar="DIR|NAME", help="measure CORE of a Hugging Face model instead")
    measures = parser.add_argument_group("what is measured")
    measures.add_argument("--eval", default=None, metavar="KIND,...",
                          help=f"any of {', '.join(KINDS)} (default: all, but core only if its data is here)")  # fmt: skip
    measures.add_argument("--data", default=None, metavar="NAME|PATH", help="text to measure on (default: the run's own)")
    measures.add_argument("--split-tokens", type=int, default=-1,
                          help="tokens of each split, in whole batches of all ranks, at least one (-1: 2^20, or the whole "
                               "split if shorter)")  # fmt: skip
    measures.add_argument("--eval-bundle", type=Path, default=None, metavar="DIR", help="CORE's data (default: downloaded)")
    measures.add_argument("--max-per-task", type=int, default=-1, help="questions of each CORE task (-1: all)")
    machine = parser.add_argument_group("machine")
    add_device_argument(machine)
    machine.add_argument(
        "--device-batch-size", type=int, default=-1, metavar="ROWS", help="rows at a time for bits per byte (-1: 8,192 tokens)"
    )
    machine.add_argument("--no-compile", dest="compile", action="store_false", help="run CORE eagerly")
    args = parser.parse_args(argv)
    args.require_some("max_per_task", "split_tokens")
    if args.eval is not None and not args.eval.strip():
        raise NanochatError("--eval is empty: name what to measure, or leave it out")
    if args.hf_path is not None and (useless := args.typed_of(OF_RUNS)):
        raise NanochatError(f"--hf-path {args.hf_path} is no run: leave out {useless}, or --hf-path")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    _, rank, _, world_size, device = compute_init(args.device_type)
    kinds = from_rank0((args.eval or "").replace(",", " ").split() or default_kinds(args))
    if unknown := set(kinds) - set(KINDS):
        raise NanochatError(f"--eval {', '.join(sorted(unknown))} is not measured here: choose from {', '.join(KINDS)}")
    results: dict[str, Any] = {}
    if args.hf_path is not None:
        if args.eval and kinds != ["core"]:
            raise NanochatError(f"--eval {args.eval}: only CORE is measured for a Hugging Face model: give --eval core")
        theirs = HuggingFaceScorer(args.hf_path, device)
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", args.hf_path)[-80:]
        folder = get_base_dir() / "core" / f"{name}_{theirs.fingerprint}"
        results = {"core": run_core(theirs, args.eval_bundle, args.max_per_task, folder)}
        if rank == 0:
            show(results)
        return 0
    model, tokenizer, meta = load_model("base", device, "eval", args.model_tag, args.step)
    source: Any = None
    of_text = ""
    if kinds != ["core"]:
        source = open_text(args.data, meta, tokenizer)
        compare_ranks(source.sizes())
        if args.data and meta.get("data", {}).get("source") != source.name:  # not in the place of the run's own numbers
            of_text = f" of {short_name(source.name)}"
    T = model.config.sequence_len
    rows = args.device_batch_size if args.device_batch_size > 0 else max(1, 8192 // T)
    most = max(1, (args.split_tokens if args.split_tokens > 0 else 2**20) // (rows * T * world_size))
    if "core" in kinds:
        folder = get_stage_dir(meta["tag"], "base") / "core" / f"step_{meta['step']:06d}_{meta['weights'][:8]}"
        scorer = NanochatScorer(model, tokenizer)
        if args.compile and not 0 < args.max_per_task < WORTH_COMPILING:
            scorer.compile()
        results["core"] = run_core(scorer, args.eval_bundle, args.max_per_task, folder)
    if "bpb" in kinds:
        results["bpb"] = {}
        for split in ("train", "val"):
            with TokenLoader(source, tokenizer, rows, T, split, rank, world_size, device, loop=False) as loader:
                batches, total = look_ahead(loader, most)
                with Progress(f"bits per byte of {split}", total, unit="batch") as progress:
                    watched = progress.watch(batches)
                    results["bpb"][split + of_text] = evaluate_bpb(model, watched, tokenizer.get_token_bytes())
    if "sample" in kinds:
        results["samples"] = continue_openings(Engine(model, tokenizer), source, temperature=0.7)
    if rank == 0:
        merge_eval(get_stage_dir(meta["tag"], "base"), meta["step"], results)
        show(results)
    return 0


def look_ahead(loader: Iterator[Any], most: int) -> tuple[Iterator[Any], int]:
    """(the first `most` batches, how many they are): a short split is known to have fewer once it is read."""
    first = all_or_none(lambda: list(itertools.islice(loader, min(most, LOOK_AHEAD))))
    total = most if len(first) == LOOK_AHEAD else len(first)
    return itertools.chain(first, itertools.islice(loader, most - len(first))), total


def open_text(data: str | None, meta: dict[str, Any], tokenizer: Tokenizer) -> Source:
    """The text to measure on: `data`, or else the run's own. What the run held out for validation stays so."""
    data = meta["settings"].get("data") if data is None else data
    if data is None:
        raise NanochatError(f"run {meta['tag']!r} was not pretrained here, so its text is not known: name one with --data")
    source = get_source(data)
    source.check_tokens(tokenizer)
    recorded = meta.get("data", {})
    if recorded.get("source") == source.name:
        source.keep_split(recorded)
    return source


def default_kinds(args: Arguments) -> list[str]:
    """All kinds, but CORE only if its data is here or a flag asks for it: do not download it unasked."""
    asked = args.hf_path is not None or args.eval_bundle is not None or args.max_per_task != -1
    if asked or (get_base_dir() / "eval_bundle" / "core.yaml").exists():
        return list(KINDS)
    print0("CORE is left out, because its data is not downloaded: --eval core fetches it and measures CORE")
    return [kind for kind in KINDS if kind != "core"]


def run_core(scorer: Scorer, bundle: Path | None, max_per_task: int, folder: Path) -> dict[str, Any]:
    """CORE with a live line for each task."""
    with Progress("CORE", total=NUM_TASKS, unit="task") as progress:
        done: set[str] = set()

        def report(label: str, questions: int, total: int) -> None:
            done.add(label)
            progress.update(len(done))
            if questions == total:
                progress.print(f"{label}: {total} questions")

        return evaluate_core(scorer, find_bundle(bundle), max_per_task, folder, report)


def show(results: dict[str, Any]) -> None:
    if "core" in results:
        core = results["core"]
        print_table(["task", "accuracy", "95% interval", "centred", "questions"], core_table(core))
        if core["missing"]:
            print(f"without data: {', '.join(core['missing'])}")
        value, interval = describe_mean(core)
        print(f"{core['name']}: {value} ({interval}), the mean over {len(core['tasks'])} of {NUM_TASKS} tasks")
    if "bpb" in results:
        print_table(["split", "bits per byte"], [[split, f"{value:.4f}"] for split, value in results["bpb"].items()])
    for sample in results.get("samples", []):
        print(f"{sample['prompt']!r} -> {sample['text']!r}")


if __name__ == "__main__":
    sys.exit(run_command(main))

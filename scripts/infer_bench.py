"""Measure how fast a model answers: python -m scripts.infer_bench [-g TAG].

For each batch size: time to the first token of one more prompt, time per token, throughput, memory, and the share of the
machine's memory bandwidth that decoding uses (MBU). Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import psutil
import torch

from nanochat.chosen_model import add_checkpoint_arguments, load_chosen_model
from nanochat.common import NanochatError, run_command
from nanochat.devices import compute_init, synchronize
from nanochat.engine import Engine
from nanochat.kv_cache import BLOCK_SIZE, KVBlocks
from nanochat.machine import measure_memory_rate
from nanochat.runner import prepare_for_inference
from nanochat.sampling import SamplingParams
from nanochat.scheduler import Scheduler
from nanochat.sequence import Sequence
from nanochat.settings import Arguments, SettingsParser, add_device_argument, add_sampling_arguments
from nanochat.tables import print_table


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Measure how fast a model answers.",
        examples=["%(prog)s --model-tag d12", "%(prog)s --batch-sizes 1,32 --weights int8"],
    )
    add_checkpoint_arguments(parser)
    add_device_argument(parser)
    add_measurement_arguments(parser)
    return parser.parse_args(argv)


def add_measurement_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32", metavar="B,B,...", help="texts at a time")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="prompt length of each text")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens generated for each text")
    add_sampling_arguments(parser, 0.0, 0)
    parser.add_argument("--weights", default="auto", choices=("auto", "int8"), help="int8: half the memory of bfloat16")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="decode without torch.compile")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    *_, device = compute_init(args.device_type)
    model, tokenizer, meta = load_chosen_model(args, device)
    report = {"model": f"{meta['tag']} ({meta['origin']})"}
    return run(model, tokenizer, args, report)


def run(model: Any, tokenizer: Any, args: argparse.Namespace, report: dict[str, Any]) -> int:
    """Measure every batch size and print the result; `report`: first entries of the JSON line."""
    try:
        batch_sizes = [int(size) for size in args.batch_sizes.split(",")]
    except ValueError:
        raise NanochatError(f"--batch-sizes {args.batch_sizes!r} is not a list of numbers such as 1,8,32") from None
    limit = model.config.sequence_len
    if min(batch_sizes) < 1 or args.prompt_tokens < 1 or args.new_tokens < 2:
        raise NanochatError("batch sizes and --prompt-tokens must be at least 1, --new-tokens at least 2")
    device = model.get_device()
    engine = Engine(prepare_for_inference(model, args.weights), tokenizer, max_rows=max(batch_sizes))
    ahead = -(-max(batch_sizes) * args.prompt_tokens // engine.scheduler.chunk)  # one token per chunk of prompts
    if args.prompt_tokens + ahead + args.new_tokens > limit:
        raise NanochatError(
            f"{args.prompt_tokens} prompt and {args.new_tokens} new tokens, and {ahead} that the first text is ahead of the "
            f"last, do not fit a context of {limit}: choose smaller --prompt-tokens, --new-tokens or --batch-sizes"
        )
    started = time.perf_counter()
    reason = engine.compile() if args.compile else "--no-compile"
    if args.compile and reason:
        print(f"decoding without torch.compile: {reason}")
    compile_s = 0.0 if reason else time.perf_counter() - started
    memory_rate = measure_memory_rate(device)
    rows = [measure(engine, B, args, memory_rate) for B in batch_sizes]
    report |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.get_compute_dtype()).removeprefix("torch."),
        "weights": args.weights,
        "compiled": reason is None,
        "compile_s": round(compile_s, 1),
        "memory_gb_per_s": round(memory_rate / 1e9, 1),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "temperature": args.temperature,
        "results": rows,
    }
    show(report)
    print(json.dumps(report))
    return 0


def measure(engine: Engine, B: int, args: argparse.Namespace, memory_rate: float) -> dict[str, float]:
    """Decode B prompts of random tokens together; their first tokens are timed separately.

    Raises NanochatError if B texts never run together.
    """
    device, vocab_size = engine.model.get_device(), engine.tokenizer.get_vocab_size()
    generator = torch.Generator().manual_seed(B)
    scheduler = engine.scheduler
    prompts = torch.randint(vocab_size, (2 * B + 3, args.prompt_tokens), generator=generator).tolist()

    def sequences(prompts: list[list[int]], max_tokens: int | None) -> list[Sequence]:
        params = SamplingParams(args.temperature, args.top_k, max_tokens=max_tokens, ignore_eos=True)
        result = [Sequence(prompt, params) for prompt in prompts]
        for sequence in result:
            scheduler.submit(sequence)
        return result

    firsts = []
    for prompt in prompts[:3]:  # alone, on an idle machine
        (sequence,) = sequences([prompt], 1)
        while sequence.finish_reason is None:
            scheduler.step()
        synchronize(device)
        firsts.append((sequence.first_token_at or 0.0) - sequence.created)
    rounds = []
    for first in (3, 3 + B):
        batch = sequences(prompts[first : first + B], None)  # no limit: those read first are ahead of the others
        steps = _time_steps(scheduler, batch, args.new_tokens - 1)
        kv_tokens = sum(sequence.length for sequence in batch) - B * len(steps) / 2  # in the middle of them
        for sequence in batch:
            scheduler.cancel(sequence)
        scheduler.take_messages()
        rounds.append((B / statistics.mean(steps), statistics.median(steps)))
    tokens_per_s, step_s = max(rounds)
    weights = sum(t.numel() * t.element_size() for t in (*engine.model.blocks.parameters(), *engine.model.blocks.buffers()))
    head = engine.model.lm_head.weight
    kv = kv_tokens * KVBlocks.bytes_per_block(engine.model.config, engine.model.get_compute_dtype()) / BLOCK_SIZE
    read = weights + head.numel() * head.element_size() + kv  # an upper bound where layers have windows
    return {
        "batch_size": B,
        "ttft_ms": round(1e3 * statistics.median(firsts), 2),
        "ms_per_token": round(1e3 * step_s, 3),
        "tokens_per_s": round(tokens_per_s, 1),
        "memory_mb": round(_memory_bytes(device) / 1e6, 1),
        "mbu": round(read / step_s / memory_rate, 4),
    }


def _time_steps(scheduler: Scheduler, batch: list[Sequence], count: int) -> list[float]:
    """Seconds of `count` steps that each compute one token of every text and no prompt; fewer if a text ends early.

    Other steps are not counted: a text that calls the calculator leaves the batch until the result is there.
    """
    steps: list[float] = []
    while len(steps) < count and all(sequence.finish_reason is None for sequence in batch):
        if scheduler.is_idle:
            scheduler.wait()
        whole, at = len(scheduler.rows) == len(batch), time.perf_counter()
        scheduler.step()
        if whole:
            steps.append(time.perf_counter() - at)
    if not steps:
        raise NanochatError(f"there is no memory for {len(batch)} texts at a time: choose smaller --batch-sizes")
    return steps


def _memory_bytes(device: torch.device) -> int:
    """Peak of the GPU's memory, or what the process holds now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def show(report: dict[str, Any]) -> None:
    compiled = f"compiled in {report['compile_s']} s" if report["compiled"] else "not compiled"
    print(f"{report['model']}: {report['device']}, {report['dtype']}, weights {report['weights']}, {compiled}")
    rows = [
        [
            str(row["batch_size"]), f"{row['ttft_ms']:.1f} ms", f"{row['ms_per_token']:.2f} ms",
            f"{row['tokens_per_s']:,.0f}", f"{row['memory_mb']:,.0f} MB", f"{row['mbu']:.0%}",
        ]
        for row in report["results"]
    ]  # fmt: skip
    print_table(["batch size", "first token", "each token", "tokens/s", "memory", "MBU"], rows)


if __name__ == "__main__":
    sys.exit(run_command(main))

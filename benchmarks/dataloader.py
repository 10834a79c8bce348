"""How fast text becomes rows of tokens: python -m benchmarks.dataloader [--seconds 10]

The loader alone, with no model to wait for, against tiktoken encoding the same documents with as many threads; how much of
the rows holds text; and how much of an uncompiled training step at depth 4 is spent waiting for it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time

import torch

from benchmarks.common import print_result, real_data
from nanochat.checkpoint_manager import build_model
from nanochat.common import run_command
from nanochat.dataloader import TokenLoader
from nanochat.dataset import get_source
from nanochat.scaling import config_for_depth
from nanochat.tokenizer import Tokenizer


def measure_share(loader: TokenLoader, tokenizer: Tokenizer, context: int, steps: int = 10) -> float:
    """The share of training time spent waiting for batches; the loader's own threads run meanwhile."""
    model = build_model(config_for_depth(4, tokenizer.get_vocab_size(), context, head_dim=64), None, "cpu").train()
    optimizer = model.setup_optimizer()
    waited = total = 0.0
    for step in range(steps + 2):  # two to warm up
        started = time.perf_counter()
        inputs, targets = next(loader)
        fetched = time.perf_counter()
        model(inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2:
            waited += fetched - started
            total += time.perf_counter() - started
    return waited / total


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the loader.")
    parser.add_argument(
        "--data", default=None, metavar="NAME|PATH", help="default: the pretraining text of NANOCHAT_TEST_DATA"
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args(argv)

    source = get_source(args.data or str(real_data("pretrain")))
    texts = list(itertools.islice(source.documents("train"), 3000))
    tokenizer = Tokenizer.train(iter(texts), args.vocab_size)
    threads = os.cpu_count() or 1
    started = time.perf_counter()
    tokens = sum(len(ids) for ids in tokenizer.encode(texts, num_threads=threads))
    bare = tokens / (time.perf_counter() - started)

    with TokenLoader(source, tokenizer, args.rows, args.context, "train", 0, 1, torch.device("cpu")) as loader:
        next(loader)
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < args.seconds:
            next(loader)
            count += args.rows * args.context
        stats = loader.stats()
        share = measure_share(loader, tokenizer, args.context)
    print_result(
        {
            "cores": threads,
            "share_of_step": round(share, 6),
            "tokens_per_s": round(count / elapsed),
            "tiktoken_tokens_per_s": round(bare),
            "ratio": round(count / elapsed / bare, 3),
            **{name: round(value, 4) for name, value in stats.items()},
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

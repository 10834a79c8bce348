"""What benchmarks share: where the real text is, what the machine can do, and how a result is printed."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from nanochat.common import NanochatError, find_test_data
from nanochat.devices import get_compute_dtype
from nanochat.gpt import GPT, GPTConfig
from nanochat.machine import measure_matmul_rate
from nanochat.scaling import config_for_depth
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer


def real_data(*parts: str) -> Path:
    """A path below NANOCHAT_TEST_DATA. Raises NanochatError if that does not exist."""
    folder = find_test_data()
    if folder is None:
        raise NanochatError("this benchmark needs real text: set NANOCHAT_TEST_DATA to its folder")
    return folder.joinpath(*parts)


def random_model(device: torch.device, config: GPTConfig) -> GPT:
    """Every matrix random: a new model's projections are zero, and zeros may be faster to multiply."""
    model = GPT(config).to(device)
    model.init_weights(seed=0)
    with torch.no_grad():
        if model.bigrams is not None:
            model.bigrams.weight.normal_(0, 0.1)
        for block in model.blocks:
            block.attn.c_proj.weight.normal_(0, 0.02)
            block.mlp.c_proj.weight.normal_(0, 0.02)
    return model


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a result depends on: processor, cores, versions, and the matmul rate of the compute dtype, in GFLOP/s."""
    dtype = get_compute_dtype(device)
    measure_matmul_rate.cache_clear()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_gflops": round(measure_matmul_rate(device, dtype, seconds=2.0) / 1e9, 1),
    }


def add_model_arguments(parser: argparse.ArgumentParser, depth: int, head_dim: int, max_seq_len: int, vocab_size: int) -> None:
    """Add flags for a model's shape, with these defaults; `shape_of` reads them."""
    parser.add_argument("--depth", type=int, default=depth)
    parser.add_argument("--head-dim", type=int, default=head_dim)
    parser.add_argument("--max-seq-len", type=int, default=max_seq_len)
    parser.add_argument("--vocab-size", type=int, default=vocab_size)


def shape_of(args: argparse.Namespace) -> GPTConfig:
    return config_for_depth(args.depth, args.vocab_size, args.max_seq_len, head_dim=args.head_dim)


def any_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with `vocab_size` tokens (265 to 65,000), bytes and pairs of bytes, for prompts of random ids."""
    single = [bytes([a]) for a in range(256)]
    pairs = (a + b for a in single for b in single)
    return Tokenizer([*single, *itertools.islice(pairs, vocab_size - len(single) - len(SPECIAL_TOKENS))])


def run_module(module: str, *flags: str, base_dir: Path, **environment: str) -> None:
    """Run a command of ours to its end, writing below base_dir, its output passed on. Raises NanochatError if it fails."""
    command = [sys.executable, "-m", module, *flags]
    variables = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), **environment}
    if code := subprocess.run(command, env=variables, stdout=sys.stderr, check=False).returncode:
        raise NanochatError(f"{module} failed with exit code {code}: its message stands above")


def print_result(result: dict[str, Any]) -> None:
    """Print a line for each number, then all of them as one JSON line, the last of the output."""
    for name, value in result.items():
        print(
            f"{name.replace('_', ' '):>28}  {value:,}" if isinstance(value, int) else f"{name.replace('_', ' '):>28}  {value}"
        )
    print(json.dumps(result))

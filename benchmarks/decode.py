"""How fast the engine generates: python -m benchmarks.decode [--depth 12] [--weights int8] [--temperature 0.8 --top-k 50]

A model with random weights, at depth 4 of width 256 with a context of 512 and a vocabulary of 4,096, otherwise of the shape
that pretraining gives it; prompts of 256 tokens. The measurement is that of scripts/infer_bench.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.common import any_tokenizer
from nanochat.common import compute_init, run_command
from nanochat.gpt import GPT
from nanochat.scaling import model_config
from scripts import infer_bench


def build_model(device: torch.device, depth: int = 4) -> GPT:
    """Every matrix random: a new model's projections are zero, and zeros may be faster to multiply."""
    small = model_config(4, vocab_size=4096, sequence_len=512, head_dim=64)
    model = GPT(small if depth == 4 else model_config(depth, vocab_size=32768)).to(device)
    model.init_weights(seed=0)
    with torch.no_grad():
        if model.bigrams is not None:
            model.bigrams.weight.normal_(0, 0.1)
        for block in model.blocks:
            block.attn.c_proj.weight.normal_(0, 0.02)
            block.mlp.c_proj.weight.normal_(0, 0.02)
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure generation.")
    parser.add_argument("--depth", type=int, default=4)
    infer_bench.add_measurement_arguments(parser)
    args = parser.parse_args(argv)
    *_, device = compute_init()
    model = build_model(device, args.depth)
    report = {"model": f"depth {args.depth}, width {model.config.n_embd}"}
    return infer_bench.run(model, any_tokenizer(model.config.vocab_size), args, report)


if __name__ == "__main__":
    sys.exit(run_command(main))

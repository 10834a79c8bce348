"""How fast the engine generates: python -m benchmarks.decode [--weights int8] [--temperature 0.8 --top-k 50]

A model with random weights, of depth 4, width 256, context 512 and vocabulary 4,096 unless flags say otherwise; prompts of
256 tokens. The measurement is that of scripts/infer_bench.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.common import add_model_arguments, any_tokenizer, shape_of
from nanochat.common import run_command
from nanochat.devices import compute_init
from nanochat.gpt import GPT, GPTConfig
from scripts import infer_bench


def build_model(device: torch.device, config: GPTConfig) -> GPT:
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure generation.")
    add_model_arguments(parser, depth=4, head_dim=64, max_seq_len=512, vocab_size=4096)
    infer_bench.add_measurement_arguments(parser)
    args = parser.parse_args(argv)
    *_, device = compute_init()
    model = build_model(device, shape_of(args))
    report = {"model": f"depth {args.depth}, width {model.config.n_embd}"}
    return infer_bench.run(model, any_tokenizer(model.config.vocab_size), args, report)


if __name__ == "__main__":
    sys.exit(run_command(main))

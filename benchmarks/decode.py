"""How fast the engine generates at depth 4: python -m benchmarks.decode [--weights int8] [--temperature 0.8 --top-k 50]

A model of width 256, context 512 and vocabulary 4,096 with random weights; prompts of 256 tokens. The measurement is that
of scripts/infer_bench.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys

import torch

from nanochat.common import compute_init, run_command
from nanochat.gpt import GPT
from nanochat.scaling import model_config
from nanochat.tokenizer import Tokenizer
from scripts import infer_bench


def build_model(device: torch.device) -> GPT:
    """Depth 4, every matrix random: a new model's projections are zero, and zeros may be faster to multiply."""
    model = GPT(model_config(4, vocab_size=4096, sequence_len=512, head_dim=64)).to(device)
    model.init_weights(seed=0)
    with torch.no_grad():
        if model.bigrams is not None:
            model.bigrams.weight.normal_(0, 0.1)
        for block in model.blocks:
            block.attn.c_proj.weight.normal_(0, 0.02)
            block.mlp.c_proj.weight.normal_(0, 0.02)
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure generation at depth 4.")
    infer_bench.add_measurement_arguments(parser)
    args = parser.parse_args(argv)
    *_, device = compute_init()
    tokenizer = Tokenizer.train(iter(pydoc_data.topics.topics.values()), 4096)
    return infer_bench.run(build_model(device), tokenizer, args, {"model": "depth 4, width 256"})


if __name__ == "__main__":
    sys.exit(run_command(main))

"""How fast the engine generates: python -m benchmarks.decode [--weights int8] [--temperature 0.8 --top-k 50]

A model with random weights, of depth 4, width 256, context 512 and vocabulary 4,096 unless flags say otherwise; prompts of
256 tokens. The measurement is that of scripts/infer_bench.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.common import add_model_arguments, any_tokenizer, random_model, shape_of
from nanochat.common import run_command
from nanochat.devices import compute_init
from scripts import infer_bench


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure generation.")
    add_model_arguments(parser, depth=4, head_dim=64, max_seq_len=512, vocab_size=4096)
    infer_bench.add_measurement_arguments(parser)
    args = parser.parse_args(argv)
    *_, device = compute_init()
    model = random_model(device, shape_of(args))
    report = {"model": f"depth {args.depth}, width {model.config.n_embd}"}
    return infer_bench.run(model, any_tokenizer(model.config.vocab_size), args, report)


if __name__ == "__main__":
    sys.exit(run_command(main))

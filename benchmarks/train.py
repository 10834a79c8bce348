"""How fast and how well a depth-4 model trains: python -m benchmarks.train [--steps 400]

Trains a model of width 256, context 512 and vocabulary 4,096 with the command that users type, on the text below
NANOCHAT_TEST_DATA, with an empty compile cache. Reports the share of this machine's own matmul rate that training reaches
(MFU), the seconds from the command to its first optimizer step and to its first compiled one, the same for a second run with
a filled cache, the peak memory of both, and the final validation bits per byte.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import describe_machine, print_result, real_data, run_module
from nanochat.common import run_command
from nanochat.devices import compute_init
from nanochat.metrics import METRICS_FILE, read_metrics

MODEL = ("--depth=4", "--head-dim=64", "--max-seq-len=512", "--total-batch-size=8192")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure training at depth 4.", allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--keep", type=Path, default=None, metavar="DIR", help="keep the run here")
    args, flags = parser.parse_known_args(argv)  # whatever else is given goes to base_train

    data = real_data("pretrain")
    *_, device = compute_init()
    with tempfile.TemporaryDirectory() as temporary:
        base_dir = args.keep or Path(temporary)
        run_module("scripts.tok_train", f"--data={data}", f"--vocab-size={args.vocab_size}", base_dir=base_dir)
        before = describe_machine(device)

        def train(tag: str, steps: int) -> tuple[float, float, list[dict[str, Any]], dict[str, Any]]:
            """(start time, seconds taken, metrics, settings) of a training run."""
            started = time.time()
            run_module(
                "scripts.base_train", f"--data={data}", *MODEL, f"--num-iterations={steps}", f"--model-tag={tag}",
                "--eval-every=-1", "--sample-every=-1", *flags, base_dir=base_dir,
                TORCHINDUCTOR_CACHE_DIR=str(Path(temporary) / "cache"),
            )  # fmt: skip
            seconds = time.time() - started
            stage_dir = base_dir / "runs" / tag / "base"
            settings = json.loads((stage_dir / "settings.json").read_text(encoding="utf-8"))
            return started, seconds, read_metrics(stage_dir / METRICS_FILE), settings

        started, seconds, rows, settings = train("bench", args.steps)
        after = describe_machine(device)
        started_warm, _, rows_warm, _ = train("warm", 2)

    updates, warm = ([row for row in found if "train/loss" in row] for found in (rows, rows_warm))
    matmul_gflops = max(before["matmul_gflops"], after["matmul_gflops"])  # other work on the machine only lowers it
    tokens_per_s = statistics.median(row["train/tok_per_s"] for row in updates[1:])
    gflops = tokens_per_s * settings["flops_per_token"] / 1e9
    print_result(
        {
            **before,
            "matmul_gflops": matmul_gflops,
            "steps": args.steps,
            "parameters": settings["num_params"],
            "tokens_per_s": round(tokens_per_s, 1),
            "train_gflops": round(gflops, 1),
            "mfu": round(gflops / matmul_gflops, 4),
            "first_step_s": round(updates[0]["timestamp"] - started, 2),
            "first_compiled_step_s": round(updates[1]["timestamp"] - started, 2),
            "first_step_warm_s": round(warm[0]["timestamp"] - started_warm, 2),
            "first_compiled_step_warm_s": round(warm[1]["timestamp"] - started_warm, 2),
            "training_s": updates[-1]["time_s"],
            "command_s": round(seconds, 1),
            "peak_memory_mb": updates[-1]["train/peak_memory_mb"],
            "peak_memory_warm_mb": warm[-1]["train/peak_memory_mb"],
            "val_bpb": round([row["val/bpb"] for row in rows if "val/bpb" in row][-1], 4),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

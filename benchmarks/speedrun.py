"""Measures how much is learned in a given time: python -m benchmarks.speedrun --budget 216 --seeds 3 [flags of base_train]

Trains from scratch, with the command that users type, on the text below NANOCHAT_TEST_DATA (or --data), until --budget seconds
after the command was given; each seed has an empty compile cache, so that the whole start-up counts. Reports validation bits
per byte against seconds, tokens and FLOPs for each seed, and the spread over seeds. Seconds include start-up and training,
but not the evaluations in between, which a user need not make.
"""

from __future__ import annotations

import argparse
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

MODEL = ("--depth=4", "--head-dim=64", "--max-seq-len=512")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bits per byte under a budget of wall-clock time.", allow_abbrev=False)
    parser.add_argument("--budget", type=float, default=216.0, metavar="SECONDS", help="from the command to the last step")
    parser.add_argument("--seeds", type=int, default=1, help="runs, with seeds 1, 2, ...")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--data", default=None, help="as base_train's (default: pretrain/ of NANOCHAT_TEST_DATA)")
    parser.add_argument("--device", default="", metavar="cuda|mps|cpu", help="default: the best one available")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="draw the curves, as .png or .svg")
    args, flags = parser.parse_known_args(argv)  # whatever else is given goes to base_train

    data = args.data or str(real_data("pretrain"))
    *_, device = compute_init(args.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run_module("scripts.tok_train", f"--data={data}", f"--vocab-size={args.vocab_size}", base_dir=folder)
        machine = describe_machine(device)
        flags = [f"--data={data}", f"--device-type={device.type}", *flags]
        curves = [run_seed(seed, args.budget, flags, folder) for seed in range(1, args.seeds + 1)]

    for seed, curve in enumerate(curves, 1):
        print(f"\n seed {seed}   seconds       tokens        FLOPs      bpb")
        for point in curve:
            print(f"{point['seconds']:17.1f} {point['tokens']:12,} {point['flops']:12.3g} {point['bpb']:8.4f}")
    print()
    if args.plot:
        draw(curves, args.plot)
    last = [curve[-1] for curve in curves]
    finals = [point["bpb"] for point in last]
    print_result(
        {
            **machine,
            "budget_s": args.budget,
            "seconds": [point["seconds"] for point in last],
            "tokens": [point["tokens"] for point in last],
            "val_bpb": finals,
            "mean_bpb": round(statistics.mean(finals), 4),
            "spread_bpb": round(statistics.stdev(finals), 4) if len(finals) > 1 else None,
            "mfu": [point["mfu"] for point in last],
        }
    )
    return 0


def run_seed(seed: int, budget: float, flags: list[str], folder: Path) -> list[dict[str, Any]]:
    """The points of one run's curve: {"seconds", "tokens", "flops", "bpb", "mfu"} at each evaluation."""
    started = time.time()
    run_module(
        "scripts.base_train", *MODEL, f"--target-minutes={budget / 60}", f"--seed={seed}", f"--model-tag=seed{seed}",
        "--eval-every=50", "--eval-tokens=-1", "--sample-every=-1", "--save-every=0", *flags, base_dir=folder,
        TORCHINDUCTOR_CACHE_DIR=str(folder / f"cache{seed}"),
    )  # fmt: skip
    stage_dir = folder / "runs" / f"seed{seed}" / "base"
    rows = read_metrics(stage_dir / METRICS_FILE)
    train = [row for row in rows if "train/loss" in row]
    before_training = train[0]["timestamp"] - train[0]["time_s"] - started
    rates = [row["train/mfu"] for row in train if "train/mfu" in row]
    curve = []
    for row in rows:
        if "val/bpb" in row:
            done = next(step for step in reversed(train) if step["step"] <= row["step"])
            curve.append(
                {"seconds": round(before_training + row["time_s"], 1), "tokens": done["train/tokens"],
                 "flops": float(done["train/flops"]), "bpb": round(row["val/bpb"], 4),
                 "mfu": round(statistics.median(rates), 4)}
            )  # fmt: skip
    return curve


def draw(curves: list[list[dict[str, Any]]], path: Path) -> None:
    """Bits per byte against seconds, tokens and FLOPs, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("seconds", "tokens", "flops"), strict=True):
        for seed, curve in enumerate(curves, 1):
            axis.plot([point[name] for point in curve], [point["bpb"] for point in curve], marker=".", label=f"seed {seed}")
        axis.set_xlabel(name if name != "flops" else "FLOPs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation bits per byte")
    axes[0].legend()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(main))

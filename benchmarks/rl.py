"""Measures whether rewards teach: python -m benchmarks.rl [--seeds 1,2,3] [--base-dir DIR]

Pretrains the demo's model on the builtin text, fine-tunes it for only 28 steps, so that it can hardly do sums, and reinforces
it on arithmetic with the calculator, once for each seed: 30 to 45 minutes on two cores. Prints the share of right answers to
unseen problems before and after; rl.png in the base directory has the curves. If it is run again with the same directory, it
continues where it was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.common import describe_machine, print_result, run_module
from nanochat.common import run_command
from nanochat.devices import compute_init
from nanochat.metrics import METRICS_FILE, read_metrics, smooth

SOURCE = ["--data=builtin", "--tokenizer=demo"]
BASE = "--depth=4 --aspect-ratio=48 --head-dim=64 --max-seq-len=512 --total-batch-size=2048 --num-iterations=900"
BASE += " --warmup-steps=10 --eval-every=-1 --eval-tokens=32768 --sample-every=-1"
SFT = "--tasks=Arithmetic:20000,Identity:2000 --num-iterations=28 --eval-every=-1 --eval-tokens=16384 --no-compile"
RL = "--task=Arithmetic --num-iterations=240 --examples-per-step=16 --num-samples=16 --max-new-tokens=40"
RL += " --init-lr-frac=0.2 --eval-every=40 --eval-examples=100"


def train(base_dir: Path, seed: int) -> Path:
    """Reinforce a copy of the fine-tuned model; returns the stage's directory."""
    runs = base_dir / "runs"
    if not (runs / f"seed{seed}").exists():
        shutil.copytree(runs / "weak", runs / f"seed{seed}")
    run_module("scripts.chat_rl", f"--model-tag=seed{seed}", f"--seed={seed}", "--resume=auto", *RL.split(), base_dir=base_dir)
    return runs / f"seed{seed}" / "rl"


def plot(curves: dict[int, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for seed, rows in curves.items():
        rewards = [(row["step"], row["rl/reward"]) for row in rows if "rl/reward" in row]
        passed = [(row["step"], row["val/pass@1"]) for row in rows if "val/pass@1" in row]
        axes[0].plot([step for step, _ in rewards], smooth([value for _, value in rewards]), label=f"seed {seed}")
        axes[1].plot(*zip(*passed, strict=True), marker="o", label=f"seed {seed}")
    axes[0].set(title="reward of the update's answers (smoothed)", xlabel="update", ylim=(0, 1))
    axes[1].set(title="pass@1 on problems never seen", xlabel="update")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Reinforce a weak model on arithmetic.")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--base-dir", type=Path, default=None, help="keep everything here (default: a temporary folder)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        base_dir = args.base_dir or Path(temporary)
        run_module("scripts.tok_train", *SOURCE, "--vocab-size=4096", base_dir=base_dir)
        run_module("scripts.base_train", *SOURCE, "--model-tag=weak", "--resume=auto", *BASE.split(), base_dir=base_dir)
        run_module("scripts.chat_sft", "--model-tag=weak", "--resume=auto", *SFT.split(), base_dir=base_dir)
        curves = {seed: read_metrics(train(base_dir, seed) / METRICS_FILE) for seed in map(int, args.seeds.split(","))}
        plot(curves, base_dir / "rl.png")
        passed = {seed: [row["val/pass@1"] for row in rows if "val/pass@1" in row] for seed, rows in curves.items()}
        rewards = {seed: [row["rl/reward"] for row in rows if "rl/reward" in row] for seed, rows in curves.items()}
        *_, device = compute_init()
        print_result({
            **describe_machine(device),
            **{f"seed_{seed}_pass_at_1": [round(values[0], 3), round(values[-1], 3)] for seed, values in passed.items()},
            **{f"seed_{seed}_reward": [round(sum(part) / len(part), 3) for part in (values[:5], values[-10:])]
               for seed, values in rewards.items()},
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

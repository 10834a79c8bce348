"""Measure training updates at any depth, without text: python -m benchmarks.passes --depth 12 [--fp8] [--profile FILE]

A new model of the default shape learns random tokens, drawn as unevenly as in a text (Zipf), in updates of the size that
pretraining would choose. Reports tokens per second, the share of the device's own matmul rate (MFU), milliseconds of a
forward and backward pass and of the optimizer's step, peak memory and, with --profile, the kernels that took longest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import add_model_arguments, describe_machine, print_result, shape_of
from nanochat.checkpoint_manager import build_model
from nanochat.common import run_command
from nanochat.compilation import can_compile
from nanochat.devices import compute_init, peak_memory_bytes, synchronize
from nanochat.fp8 import enable_fp8
from nanochat.machine import seconds_of
from nanochat.passes import Passes
from nanochat.scaling import accumulation_steps, default_device_batch_size, plan_horizon
from nanochat.settings import add_device_argument


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure updates of a model of any depth.")
    add_model_arguments(parser, depth=12, head_dim=128, max_seq_len=2048, vocab_size=32768)
    parser.add_argument("--total-batch-size", type=int, default=-1, help="tokens in an update (-1: as base_train)")
    parser.add_argument("--device-batch-size", type=int, default=32, metavar="ROWS", help="most rows in a pass")
    add_device_argument(parser)
    parser.add_argument("--updates", type=int, default=3, help="updates to take the median of")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--profile", type=Path, default=None, metavar="FILE", help="write a table of the longest kernels")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    *_, device = compute_init(args.device_type)
    update = Update(args, device)
    machine = describe_machine(device)
    print_result({**machine, **update.prepare(), **update.measure(args.updates, 1e9 * machine["matmul_gflops"])})
    if args.profile:
        args.profile.write_text(update.profile(), encoding="utf-8")
    return 0


class Update:
    """A model, its optimizer and a batch of random tokens: what the trainer does at each step, and nothing else."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device, self.name = device, f"depth {args.depth}{', fp8' if args.fp8 else ''}"
        config = shape_of(args)
        self.model = build_model(config, None, device, seed=0)
        if args.fp8:
            enable_fp8(self.model, device)
        if can_compile(device) is None:
            self.model.compile()
        self.flops_per_token = self.model.estimate_flops()
        self.tokens = plan_horizon(config, self.flops_per_token, total_batch_size=args.total_batch_size).total_batch_size
        T = args.max_seq_len
        self.rows = default_device_batch_size(self.tokens, T, 1, args.device_batch_size * T)
        self.passes = accumulation_steps(self.tokens, self.rows, T, 1)
        self.optimizer = self.model.setup_optimizer()
        self.gradients = Passes(self.model)
        likely = 1 / torch.arange(10.0, args.vocab_size + 10)
        ids = torch.multinomial(likely, self.rows * T + 1, replacement=True).to(device)
        self.batch = ids[:-1].view(self.rows, T), ids[1:].view(self.rows, T)
        self.count = torch.tensor(self.tokens, device=device)

    def forward_backward(self, times: int = 1) -> None:
        self.optimizer.zero_grad()
        self.gradients.run([self.batch] * times, self.count)

    def run(self) -> None:
        self.forward_backward(self.passes)
        self.optimizer.step()

    def prepare(self) -> dict[str, Any]:
        """Compile, and let the allocator see everything once."""
        started = time.perf_counter()
        for _ in range(2):
            self.forward_backward()
            self.optimizer.step()
        synchronize(self.device)
        return {"model": self.name, "parameters": self.model.num_scaling_params()["total"],
                "compile_s": round(time.perf_counter() - started, 1)}  # fmt: skip

    def measure(self, updates: int, matmul_rate: float) -> dict[str, Any]:
        """Medians over that many updates; matmul_rate: the device's, in FLOP/s."""
        self.run()
        works = (self.run, self.forward_backward, self.optimizer.step)
        seconds, pass_s, step_s = (statistics.median(seconds_of(work, self.device) for _ in range(updates)) for work in works)
        return {
            "rows": self.rows,
            "passes": self.passes,
            "tokens_per_s": round(self.tokens / seconds),
            "mfu": round(self.tokens * self.flops_per_token / seconds / matmul_rate, 4),
            "update_ms": round(1e3 * seconds, 1),
            "pass_ms": round(1e3 * pass_s, 2),
            "optimizer_ms": round(1e3 * step_s, 2),
            "peak_memory_mb": round(peak_memory_bytes(self.device) / 1e6),
        }

    def profile(self, rows: int = 60) -> str:
        """A table of where one pass and one optimizer step spent their time, the longest first."""
        from torch.profiler import ProfilerActivity, profile

        gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        with profile(activities=activities) as profiler:
            self.forward_backward()
            self.optimizer.step()
            synchronize(self.device)
        order = "self_device_time_total" if gpu else "self_cpu_time_total"
        return str(profiler.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=110))


if __name__ == "__main__":
    sys.exit(run_command(main))

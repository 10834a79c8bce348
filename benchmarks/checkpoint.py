"""What a checkpoint costs training: python -m benchmarks.checkpoint [--depth 4] [--no-compile]

The trainer saves at regular intervals, on random tokens. Reports how long a step waits for the snapshot (the first time,
when its buffers are new, and later), how long the checkpoint is then written in the background, and how much longer steps
take meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import describe_machine, print_result
from nanochat.checkpoint_manager import build_model
from nanochat.checkpoint_writer import CheckpointWriter
from nanochat.common import run_command
from nanochat.devices import compute_init
from nanochat.metrics import MetricsLog
from nanochat.scaling import config_for_depth
from nanochat.trainer import Batch, TrainConfig, Trainer

CONTEXT, VOCAB_SIZE, WARMUP_STEPS = 512, 4096, 4


class RandomTokens:
    """A loader that costs nothing: it repeats one batch."""

    def __init__(self, rows: int, device: torch.device) -> None:
        tokens = torch.randint(VOCAB_SIZE, (rows, CONTEXT + 1), device=device)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        pass


class TimedWriter(CheckpointWriter):
    """Records how long each checkpoint takes to reach the disk."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seconds: list[float] = []

    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, *args: Any) -> None:
        started = time.perf_counter()
        super()._write(*args)
        self.seconds.append(time.perf_counter() - started)


class TimedTrainer(Trainer):
    """Records how long training waits for each save, and the time of each step, with and without a write in progress."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writer: TimedWriter = TimedWriter(self.stage_dir, self.config.keep_last)
        self.saves: list[float] = []
        self.steps: dict[bool, list[float]] = {False: [], True: []}

    def save(self, *args: Any, **kwargs: Any) -> None:
        self._writer.wait()  # for the one before, so that what is timed is this one
        started = time.perf_counter()
        super().save(*args, **kwargs)
        if not kwargs.get("wait"):
            self.saves.append(time.perf_counter() - started)

    def _train_step(self) -> None:
        writing = self._writer.is_writing()
        started = time.perf_counter()
        super()._train_step()
        if self.step > WARMUP_STEPS:
            self.steps[writing].append(time.perf_counter() - started)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what checkpoints cost training.")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2, help="of 512 tokens in a step; few, to see a write in it")
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=8)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dir", type=Path, default=None, help="on the disk to measure (default: that of temporary files)")
    args = parser.parse_args(argv)
    *_, device = compute_init()
    config = config_for_depth(args.depth, VOCAB_SIZE, CONTEXT, head_dim=64)
    model = build_model(config, None, device).train()
    train_config = TrainConfig(
        num_iterations=(args.saves + 1) * args.save_every, total_batch_size=args.rows * CONTEXT, sample_every=-1,
        save_every=args.save_every, keep_last=2, compile=args.compile, stage_name="checkpoints",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        stage_dir = Path(temporary) / "runs" / "bench" / "base"
        metrics = MetricsLog(stage_dir, {})
        loader = RandomTokens(args.rows, device)
        trainer = TimedTrainer(model, model.setup_optimizer(), loader, train_config, stage_dir, metrics, meta={})
        trainer.train()
        written = sum(path.stat().st_size for path in next(stage_dir.glob("step_*")).iterdir())

    step, during = (statistics.median(trainer.steps[writing]) for writing in (False, True))
    snapshot, write = statistics.median(trainer.saves[1:]), statistics.median(trainer._writer.seconds)
    print_result(
        {
            **describe_machine(device),
            "threads": torch.get_num_threads(),
            "depth": args.depth,
            "checkpoint_mb": round(written / 1e6, 1),
            "step_ms": round(1e3 * step, 1),
            "snapshot_ms": round(1e3 * snapshot, 2),
            "first_snapshot_ms": round(1e3 * trainer.saves[0], 2),
            "snapshot_share_of_step": round(snapshot / step, 4),
            "write_s": round(write, 3),
            "write_mb_per_s": round(written / 1e6 / write, 1),
            "steps_while_writing": len(trainer.steps[True]),
            "step_ms_while_writing": round(1e3 * during, 1),
            "slowdown_while_writing": round(during / step, 3),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

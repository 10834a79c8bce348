"""The one door by which numbers leave a run: metrics.jsonl always, Weights & Biases and TensorBoard where asked for.

Used by trainer.py; read by report.py. One JSON object a line, always with "step", "time_s" (seconds of training)
and "timestamp" (of the row, seconds since 1970).
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from nanochat.common import NanochatError


class MetricsLog:
    """Appends rows to `<stage_dir>/metrics.jsonl` on rank 0 and does nothing on the others.

    run: the name of a Weights & Biases run, or "dummy" for none; tensorboard: whether to write event files as well.
    Raises NanochatError if one is asked for that is not installed.
    """

    def __init__(self, stage_dir: Path, settings: dict[str, Any], run: str, tensorboard: bool, rank: int) -> None:
        self._file = self._wandb = self._tensorboard = None
        if rank != 0:
            return
        stage_dir.mkdir(parents=True, exist_ok=True)
        path = stage_dir / "metrics.jsonl"
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the life of the run
        # A crash may have cut the last line short: what follows must not be glued to it.
        self._unwritten = b"\n" if torn else b""
        if run != "dummy":
            try:
                import wandb
            except ImportError:
                raise NanochatError(f"--run={run} needs Weights & Biases: pip install wandb, or leave --run out") from None
            self._wandb = wandb.init(project="nanochat", name=run, config=settings)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise NanochatError("--tensorboard needs it installed: pip install tensorboard") from None
            self._tensorboard = SummaryWriter(str(stage_dir / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        """Write one row; it is with the system when this returns, or, if the disk is full, tried again with the next."""
        if self._file is None:
            return
        row = {"timestamp": round(time.time(), 3), **row}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._write(json.dumps(finite) + "\n")
        place = ("step", "timestamp")
        numbers = {k: v for k, v in finite.items() if isinstance(v, int | float) and k not in place}
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, row["step"])

    def _write(self, line: str) -> None:
        complained = bool(self._unwritten.strip())
        self._unwritten += line.encode("utf-8")
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not complained:
                print(f"metrics cannot be written now ({error.strerror}); training goes on and they are kept", file=sys.stderr)

    def close(self) -> None:
        if self._file is not None:
            if self._unwritten.strip():
                self._write("")
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()

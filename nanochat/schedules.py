"""What changes over a run, step by step: learning rates, weight decay, Muon's momentum, which blocks learn.

Used by trainer.py, whose TrainConfig is a Schedule and more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Schedule:
    """The course of a run of `num_iterations` updates. A step is the number of updates done, from 0."""

    num_iterations: int
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65  # the share of the updates in which the rates fall
    final_lr_frac: float = 0.05
    expand_at: float = 0.0  # the share of the updates in which only the last block learns

    @property
    def warmdown_steps(self) -> int:
        return round(self.warmdown_ratio * self.num_iterations)

    @property
    def expansion_step(self) -> int:
        """The first step at which all blocks learn; a run of two or more updates has at least one such step."""
        return min(round(self.expand_at * self.num_iterations), max(1, self.num_iterations - 1))

    def replanned(self, num_iterations: int, expansion_step: int) -> Self:
        """The same course over another number of updates, in which the blocks join at this step."""
        return replace(self, num_iterations=num_iterations, expand_at=expansion_step / num_iterations)

    def learning_rate_factor(self, step: int) -> float:
        """The share of the peak learning rate: linear warm-up, constant, linear warm-down to final_lr_frac.

        With n warm-up steps, step 0 has 1/n. The warm-down would reach final_lr_frac one step after the last. Where both
        overlap in a short run, the lower factor counts.
        """
        warmup_steps = min(self.warmup_steps, self.num_iterations // 2)
        up = (step + 1) / warmup_steps if step < warmup_steps else 1.0
        left = self.num_iterations - step
        progress = left / self.warmdown_steps if left < self.warmdown_steps else 1.0
        return min(up, progress + (1 - progress) * self.final_lr_frac)

    def weight_decay_factor(self, step: int) -> float:
        """The share of the peak weight decay: half a cosine wave, from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * step / self.num_iterations))

    def muon_momentum(self, step: int, peak: float) -> float:
        """Muon's momentum: from 0.85 up to its peak over 300 steps (or a quarter of the run), less in the warm-down."""
        ramp = min(step / max(1, min(300, self.num_iterations // 4)), 1)
        cooling = max(0.0, 1 - (self.num_iterations - step) / self.warmdown_steps) if self.warmdown_steps else 0.0
        return min(0.85 + ramp * (peak - 0.85), peak - cooling * (peak - 0.85) / 2)

"""Training in float16, whose numbers end at 6e-8: the loss is multiplied before the backward pass, gradients divided after it.

Used by trainer.py. float16 is for GPUs that do not multiply bfloat16 (before Ampere), by NANOCHAT_DTYPE=float16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nanochat.common import NanochatError
from nanochat.ranks import any_rank

FIRST_FACTOR = 2.0**16
GROWTH_STEPS = 2000  # good updates after which the factor is doubled


class LossScale:
    """The factor of the loss: halved when gradients leave float16's range, doubled when they have not for long.

    For other dtypes it is 1 and stays so. Method: arXiv 1710.03740, section 3.2.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.enabled = dtype == torch.float16
        self.factor = FIRST_FACTOR if self.enabled else 1.0
        self._good_steps = 0

    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> bool:
        """Divide the gradients by the factor, then adapt it; False if this update is to be passed over.

        That is where a gradient is not finite on any rank (a collective call that waits for the device, in float16 alone).
        Raises NanochatError if that is so with a factor of 1.
        """
        if not self.enabled:
            return True
        gradients = [_numbers(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_div_(gradients, self.factor)
        finite = bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all()) if gradients else True
        if any_rank(not finite):
            if self.factor == 1:
                raise NanochatError(
                    "gradients leave float16's range as they are: go on with NANOCHAT_DTYPE=float32, or with lower rates "
                    "(--matrix-lr, --embedding-lr)"
                )
            self.factor, self._good_steps = self.factor / 2, 0
            return False
        self._good_steps += 1
        if self._good_steps == GROWTH_STEPS:
            self.factor, self._good_steps = self.factor * 2, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """What decides the next scale, JSON; {} in any other dtype than float16."""
        return {"factor": self.factor, "good_steps": self._good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as that one would have, if both are of float16: a run may be resumed in another dtype."""
        if self.enabled and state:
            self.factor, self._good_steps = state["factor"], state["good_steps"]


def _numbers(gradient: torch.Tensor) -> torch.Tensor:
    """What a gradient holds here: the rows of one that has few, this rank's part of one that is shared out."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local._values() if local.is_sparse else local

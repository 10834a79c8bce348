"""Loss scaling for float16, which has no numbers below 6e-8: multiply the loss, then divide the gradients by the same factor.

Used by trainer.py. float16 is for GPUs without bfloat16 (before Ampere); NANOCHAT_DTYPE=float16 chooses it.
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
    """The factor of the loss: halved when gradients leave float16's range, doubled when they have not for a long time.

    For other dtypes it is always 1. Method: arXiv 1710.03740, section 3.2.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.enabled = dtype == torch.float16
        self.factor = FIRST_FACTOR if self.enabled else 1.0
        self._good_steps = 0

    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> bool:
        """Divide the gradients by the factor, then adapt it; False if this update must be skipped.

        It must be when any rank has a gradient that is not finite (in float16, a collective call that waits for the device).
        Raises NanochatError if that happens with a factor of 1.
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
        """The factor and its counter, as JSON; {} for other dtypes than float16."""
        return {"factor": self.factor, "good_steps": self._good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that state, if both are float16: a run may be resumed in another dtype."""
        if self.enabled and state:
            self.factor, self._good_steps = state["factor"], state["good_steps"]


def _numbers(gradient: torch.Tensor) -> torch.Tensor:
    """The values of a gradient on this rank: the rows present in a sparse one, the local part of a sharded one."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local._values() if local.is_sparse else local

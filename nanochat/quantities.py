"""The numbers that a run logs: their titles, and how they are printed and drawn. One line for each.

Used by trainer.py, report.py, runs_api.py and scripts/compare.py. A number without a line here is shown by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Quantity:
    """title: of its curve. noisy: smooth the curve. divisor: from the value to the title's unit.

    form: format of the value in tables, in that unit. line: format for the progress line, with {name} (the part after the
    slash) and {value}; "": not shown.
    """

    title: str
    form: str = "{:.4f}"
    noisy: bool = False
    divisor: float = 1
    line: str = ""

    def show(self, value: float) -> str:
        """The value as a table shows it."""
        return self.form.format(value / self.divisor)


# By name in metrics.jsonl, or by its beginning, before *; the progress line has this order.
QUANTITIES = {
    "train/loss": Quantity("training loss, nats per token", noisy=True, line="loss {value:.4f}"),
    "rl/reward": Quantity("reward of the sampled answers", "{:.3f}", noisy=True, line="reward {value:.3f}"),
    "train/tok_per_s": Quantity("tokens per second", "{:,.0f}", noisy=True, line="tok/s {value:,.0f}"),
    "train/mfu": Quantity("MFU, share of the matmul rate", "{:.1%}", noisy=True, line="MFU {value:.0%}"),
    "val/bpb": Quantity("validation bits per byte", line="bpb {value:.4f}"),
    "val/core*": Quantity("CORE"),
    "val/pass@*": Quantity("held-out problems solved", "{:.1%}", line="{name} {value:.1%}"),
    "train/lrm": Quantity("learning rate, share of its peak"),
    "train/peak_memory_mb": Quantity("most memory held, GB", "{:.2f} GB", divisor=1000),
    "train/tokens": Quantity("tokens trained on", "{:,.0f}"),
    "train/flops": Quantity("FLOPs of training", "{:.3g}"),
    "rl/mixed_groups": Quantity("groups with right and wrong answers", noisy=True),
    "rl/answer_tokens": Quantity("tokens in an answer", noisy=True),
    "rl/unfinished": Quantity("answers cut off", noisy=True),
    "rl/shortened_prompts": Quantity("problems cut short to fit", noisy=True),
    "rl/rollout_tok_per_s": Quantity("tokens sampled per second", noisy=True),
}


@functools.lru_cache
def kind_of(name: str) -> str:
    """The key of QUANTITIES that a number belongs to, else its own name."""
    return next((key for key in QUANTITIES if fnmatchcase(name, key)), name)


def quantity(name: str) -> Quantity:
    return QUANTITIES.get(kind_of(name), Quantity(name.partition("/")[2] or name))


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Each name once, with those of its kind, which share a picture: pass@1 and pass@8."""
    kinds: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        kinds.setdefault(kind_of(name), []).append(name)
    return kinds


def describe_line(numbers: Mapping[str, float]) -> list[str]:
    """The parts of a progress line for these numbers, given by their names in metrics.jsonl."""
    return [
        shown.line.format(name=name.partition("/")[2], value=value)
        for kind, shown in QUANTITIES.items()
        for name, value in numbers.items()
        if shown.line and kind_of(name) == kind
    ]

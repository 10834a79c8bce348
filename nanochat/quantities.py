"""The numbers that a run logs: their titles, and how they are printed and drawn. One line for each.

Used by trainer.py, metrics.py, report.py, runs_api.py and scripts/compare.py. A number without a line here is shown by its
name, and drawn like the others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Quantity:
    """title: of its curve. noisy: smooth the curve. divisor: from the value to the title's unit.

    form: format of the value in tables, in that unit; "": its last value is nothing to compare. line: format for the progress
    line, with {name} (the part after the slash) and {value}; "": not shown. curve: whether it is drawn.
    """

    title: str
    form: str = "{:.4f}"
    noisy: bool = False
    divisor: float = 1
    line: str = ""
    curve: bool = True

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
    "val/core_metric": Quantity("CORE"),
    "val/core_partial": Quantity("CORE over some of its tasks"),
    "val/pass@*": Quantity("held-out problems solved", "{:.1%}", line="{name} {value:.1%}"),
    "train/lrm": Quantity("learning rate, share of its peak", ""),
    "train/peak_memory_mb": Quantity("most memory held, GB", "{:.2f} GB", divisor=1000),
    "train/tokens": Quantity("tokens trained on", "{:,.0f}", curve=False),
    "train/flops": Quantity("FLOPs of training", "{:.3g}", curve=False),
    "rl/mixed_groups": Quantity("groups with right and wrong answers", "{:.1%}", noisy=True),
    "rl/answer_tokens": Quantity("tokens in an answer", "{:,.1f}", noisy=True),
    "rl/unfinished": Quantity("answers cut off", "{:.1%}", noisy=True),
    "rl/shortened_prompts": Quantity("problems cut short to fit", "{:.1f}", noisy=True),
    "rl/rollout_tok_per_s": Quantity("tokens sampled per second", "{:,.0f}", noisy=True),
    "step": Quantity("updates", "{:,}", curve=False),
    "time_s": Quantity("seconds of training", "{:,.1f}", curve=False),
    "timestamp": Quantity("seconds since 1970", "{:.3f}", curve=False),
}


@functools.lru_cache
def kind_of(name: str) -> str:
    """The key of QUANTITIES that a number belongs to, else its own name."""
    return next((key for key in QUANTITIES if fnmatchcase(name, key)), name)


def quantity(name: str) -> Quantity:
    return QUANTITIES.get(kind_of(name), Quantity(name, "{:,.6g}"))


def title_of(name: str) -> str:
    """A number's title; where several numbers share it, with what tells them apart: "held-out problems solved, pass@8"."""
    title = quantity(name).title
    return title if kind_of(name) == name else f"{title}, {name.partition('/')[2]}"


def is_result(name: str) -> bool:
    """Whether evaluations give it, now and then, and not each update."""
    return name.startswith("val/")


def starts_at_zero(name: str) -> bool:
    """Whether its picture shows where 0 is; of losses and results, it would hide the differences."""
    return not is_result(name) and name != "train/loss"


def in_order(names: Iterable[str]) -> list[str]:
    """Names as pictures and tables follow each other: reward, loss, results, the rest of QUANTITIES, other numbers by name."""
    order = list(QUANTITIES)

    def place(name: str) -> tuple[Any, ...]:
        kind = kind_of(name)
        rank = order.index(kind) if kind in QUANTITIES else len(order)
        return kind != "rl/reward", kind != "train/loss", not is_result(name), rank, kind, len(name), name  # pass@8, pass@16

    return sorted(names, key=place)


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

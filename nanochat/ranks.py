"""What the processes of a run do together: exchange values, and fail together. They also work in a single process.

Used by whatever several ranks run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from nanochat.common import NanochatError, get_dist_info
from nanochat.devices import in_process_group

T = TypeVar("T")


def from_rank0(value: T) -> T:
    """Rank 0's value, on every rank (a collective call): for what must be decided once."""
    if not in_process_group():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_rank0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank (a collective call).

    If it fails it raises on all of them: its own error on rank 0 and, if that is a NanochatError, elsewhere.
    """
    result: T | None = None
    failure: Exception | None = None
    if get_dist_info().rank == 0:
        try:
            result = work()
        except Exception as error:
            failure = error
    hidden = failure is not None and not isinstance(failure, NanochatError)
    told = NanochatError("rank 0 has failed: its reason stands above") if hidden else failure
    result, told = from_rank0((result, told))
    if (cause := failure or told) is not None:
        raise cause
    return cast("T", result)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank (a collective call on the hosts, which does not wait for a device)."""
    if not in_process_group():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def sum_over_ranks(tensor: torch.Tensor) -> None:
    """Add up, in place, what all ranks have (a collective call)."""
    if in_process_group():
        dist.all_reduce(tensor)


def all_or_none(work: Callable[[], T]) -> T:
    """This rank's share of something that all ranks do (a collective call).

    `work` may contain collectives only if either all ranks reach them or all have raised before. If it fails on any rank, it
    raises on all of them, so that they can save together: the error itself where it happened, NanochatError elsewhere.
    """
    failure = None
    try:
        result = work()
    except Exception as error:
        failure = error
    if any_rank(failure is not None):
        raise failure or NanochatError("another rank has failed: its reason stands above")
    return result


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank (a collective call)."""
    if not in_process_group():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def compare_ranks(seen: dict[str, Any]) -> None:
    """Raise NanochatError on every rank if a named value differs between ranks (a collective call)."""
    first, *others = gather_objects(seen)
    for rank, other in enumerate(others, 1):
        for name in first | other:
            here, there = (str(values.get(name, "absent")) for values in (first, other))
            if here != there:
                raise NanochatError(
                    f"{name} is {here} on rank 0, but {there} on rank {rank}: give all machines the same files and flags"
                )

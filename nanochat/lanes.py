"""Deals training data to a fixed number of lanes, so that its order does not depend on the number of ranks.

Used by dataloader.py and conversation_loader.py; rl.py takes the order of an epoch from here. Each lane packs what it was
dealt independently; row g of the whole training is the next one of lane g % lanes. A rank runs the lanes rank, rank +
world_size, ... and so makes every world_size-th row. Any number of ranks that divides the lanes reads the same rows for the
same update, and can take over from any other such number.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from nanochat.common import NanochatError

LANES = 16


def count_lanes(world_size: int) -> int:
    """The number of lanes: LANES, or the next number that is divisible by the ranks."""
    return math.lcm(LANES, world_size)


def rank_lanes(lanes: int, rank: int, world_size: int) -> list[int]:
    """The lanes of a rank, in the order of their rows. Raises NanochatError if the ranks do not divide the lanes."""
    if lanes % world_size:
        fitting = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        raise NanochatError(
            f"this run's data is dealt to {lanes} lanes, which {world_size} processes cannot share evenly: "
            f"go on with one of {fitting}"
        )
    return list(range(rank, lanes, world_size))


def lightest_lane(loads: Sequence[int], epoch: int, number: int) -> int:
    """The lane that was dealt the least; of several, one chosen by a hash of the document's epoch and number.

    If ties went to the lanes in turn, equally long documents of two kinds in turn would fill each lane with a single kind.
    """
    least = min(loads)
    lightest = [lane for lane, load in enumerate(loads) if load == least]
    if len(lightest) == 1:
        return lightest[0]
    digest = hashlib.blake2b(f"{epoch} {number}".encode(), digest_size=8).digest()
    return lightest[int.from_bytes(digest, "little") % len(lightest)]


def rows_of_rank(rows: Sequence[int], world_size: int) -> int:
    """The number of rows that each of world_size ranks counts as made, from the counts of the ranks that saved.

    Raises NanochatError if they cannot be shared evenly.
    """
    if sum(rows) % world_size:
        raise NanochatError(f"{sum(rows)} rows cannot be shared among {world_size} processes: go on with {len(rows)}")
    return sum(rows) // world_size


@functools.lru_cache(4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of a pass over n things: a permutation of 0 to n - 1, different for each epoch."""
    order = np.random.default_rng([seed % 2**64, epoch]).permutation(n)
    order.flags.writeable = False  # it is shared
    return order

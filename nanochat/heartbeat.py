"""Meets the other ranks, and ends this process when one of them has gone. Used by devices.compute_init.

A collective that waits for a dead process or over a cut link may hang for ten minutes, and says little when it gives up. So
every rank increments a counter in the rendezvous store and watches those of the others. If one stands still, or the store
cannot be reached, the process ends with one sentence, and torchrun restarts the job or gives up.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from nanochat.common import NanochatError, first_line

BEAT_S = 2.0
LIMIT_S = 40.0  # how long a rank may be silent, unless NANOCHAT_HEARTBEAT_S says
EXIT_CODE = 75  # EX_TEMPFAIL: to be tried again
RESTART = "start the same command again with --resume auto (torchrun --max-restarts=3 does so by itself)"
LEFT = 1 << 40  # added to the number of a rank that has left as it should


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout_s: float = 600.0) -> dist.Store:
    """A part of the rendezvous store that only the ranks of this attempt use.

    torchrun keeps one store for all attempts of a job. After a restart it still holds the addresses of dead processes, and
    a rank that reads them before they are overwritten never connects. So rank 0 draws a name for the attempt and sends it to
    each rank that asks with a token of its own, until all have confirmed. Raises TimeoutError.
    """
    token = uuid.uuid4().hex
    if rank != 0:
        store.set(f"hello/{rank}", token)
        attempt = store.get(f"welcome/{rank}/{token}").decode()  # waits for it
        store.set(f"here/{rank}/{attempt}", "")
        return dist.PrefixStore(attempt, store)
    missing = set(range(1, world_size))
    deadline = time.monotonic() + timeout_s
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):  # perhaps left by a dead process; then nobody waits for its token
                store.set(f"welcome/{other}/{store.get(f'hello/{other}').decode()}", token)
            if store.check([f"here/{other}/{token}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {', '.join(map(str, sorted(missing)))} did not come within {timeout_s:.0f} s: {RESTART}")
        time.sleep(0.02)
    return dist.PrefixStore(token, store)


def silence_limit_s() -> float:
    """NANOCHAT_HEARTBEAT_S or LIMIT_S. Raises NanochatError if it is not a number of seconds."""
    text = os.environ.get("NANOCHAT_HEARTBEAT_S") or str(LIMIT_S)
    with contextlib.suppress(ValueError):
        if 0 < (limit_s := float(text)) <= 86400:
            return limit_s
    raise NanochatError(
        f"NANOCHAT_HEARTBEAT_S is {text!r}: set it to a number of seconds from above 0 to 86400, {LIMIT_S:g} for example"
    )


class Heartbeat:
    """Daemon threads of this rank. `give_up(reason)` is called once if another rank is gone; the default exits.

    Raises NanochatError if no `limit_s` is given and NANOCHAT_HEARTBEAT_S is not valid.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, give_up: Callable[[str], None] | None = None,
        beat_s: float = BEAT_S, limit_s: float | None = None,
    ) -> None:  # fmt: skip
        self.rank, self.world_size = rank, world_size
        self.beat_s, self.limit_s = beat_s, silence_limit_s() if limit_s is None else limit_s
        # A separate connection, because other threads block on theirs. torch's stub lacks the method.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=self.limit_s))
        self._give_up = give_up or self._exit
        self._stopped, self._ending = threading.Event(), threading.Lock()
        self._answered_at = time.monotonic()  # a clock that nobody can set
        self._threads = [threading.Thread(target=work, name="heartbeat", daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Tell the others that this rank is leaving properly."""
        self._stopped.set()
        # A thread that returns from the store's C++ once the interpreter has ended aborts the process.
        for thread in self._threads:
            thread.join(self.limit_s)
        with contextlib.suppress(RuntimeError, ConnectionError):  # the store may have left before
            self._store.add(f"beat/{self.rank}", LEFT)

    def _beat(self) -> None:
        try:
            self._count()
        except (RuntimeError, ConnectionError) as error:
            self._end(f"the rendezvous store cannot be reached ({first_line(error)})")

    def _count(self) -> None:
        keys = [f"beat/{rank}" for rank in range(self.world_size)]
        counts, changed_at = [0] * self.world_size, [time.monotonic()] * self.world_size
        if self.rank == 0:  # the store does not answer for counters that do not exist yet, and a rank may die before its first
            for key in keys:
                self._store.add(key, 0)
        while not self._stopped.wait(self.beat_s):
            self._store.add(keys[self.rank], 1)
            for other, count in enumerate(map(int, self._store.multi_get(keys))):  # one request, however many ranks
                if count != counts[other] or count >= LEFT:
                    counts[other], changed_at[other] = count, time.monotonic()
            self._answered_at = now = time.monotonic()
            silent = [str(other) for other in range(self.world_size) if now - changed_at[other] > self.limit_s]
            if silent:
                self._end(f"nothing was heard of rank {', '.join(silent)} for {self.limit_s:.0f} s")
                return

    def _watch(self) -> None:
        """End the process if the store does not answer: behind a cut link, calls may not even time out."""
        while not self._stopped.wait(self.beat_s):
            if time.monotonic() - self._answered_at > self.limit_s + 3 * self.beat_s:
                self._end(f"the rendezvous store did not answer for {self.limit_s:.0f} s")
                return

    def _end(self, reason: str) -> None:
        with self._ending:  # either thread may be first
            if self._stopped.is_set():
                return
            self._stopped.set()
        self._give_up(reason)

    def _exit(self, reason: str) -> None:
        print(f"error: rank {self.rank} ends, since {reason}: {RESTART}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)

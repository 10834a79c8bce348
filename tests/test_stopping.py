"""The garbage collector during training: what it frees, and what it leaves alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from nanochat.stopping import collect_garbage, frozen_garbage


class Loop:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_garbage_is_freed_and_the_rest_is_not_looked_at_again() -> None:
    kept, freed = Loop(), weakref.ref(Loop())
    collect_garbage()
    assert freed() is None
    assert not any(thing is kept for thing in gc.get_objects())
    late = Loop()
    assert any(thing is late for thing in gc.get_objects())


def test_the_collector_rests_while_a_model_trains() -> None:
    """And afterwards looks at everything again."""
    kept = Loop()
    with frozen_garbage():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert any(thing is kept for thing in gc.get_objects())

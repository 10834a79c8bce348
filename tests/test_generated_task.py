"""A task that makes its problems says which splits it has."""

from __future__ import annotations

from typing import ClassVar

import pytest

from nanochat.common import NanochatError
from tasks.common import Conversation, GeneratedTask


class WithoutVal(GeneratedTask):
    SIZES: ClassVar[dict[str, int]] = {"train": 8, "test": 2}

    def get_example(self, index: int) -> Conversation:
        return {"messages": []}


def test_a_split_that_is_missing_is_named() -> None:
    assert [len(WithoutVal(split)) for split in ("train", "test")] == [8, 2]
    with pytest.raises(NanochatError, match="WithoutVal has no val split, only train, test: add it to its SIZES"):
        WithoutVal("val")

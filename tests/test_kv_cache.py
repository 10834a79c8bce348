"""Blocks of keys and values: which are reused first, and what they take."""

from __future__ import annotations

import torch

from nanochat.kv_cache import BLOCK_SIZE, BlockAllocator, KVBlocks
from tests.helpers import make_model


def test_the_longest_unused_block_is_reused_first() -> None:
    """So that what many texts begin with stays findable."""
    allocator = BlockAllocator(4)
    blocks = [allocator.allocate() for _ in range(3)]
    texts = [[i] * BLOCK_SIZE for i in range(3)]
    for block, text in zip(blocks, texts, strict=True):
        allocator.publish(block, 0, tuple(text))
        allocator.release([block])
    allocator.release(allocator.share(texts[0])[0])  # used once more, so that the second is the oldest
    assert [allocator.allocate(), allocator.allocate()] == blocks[1:]
    assert [allocator.share(text)[0] for text in texts] == [blocks[:1], [], []]


def test_what_no_text_can_find_is_reused_before_what_texts_may_share() -> None:
    """And a text's end before its beginning, however they were released."""
    allocator = BlockAllocator(5)
    first, second, unpublished, another = (allocator.allocate() for _ in range(4))
    assert allocator.allocate() is None
    beginning, end = (0,) * BLOCK_SIZE, (1,) * BLOCK_SIZE
    content = allocator.publish(first, 0, beginning)
    allocator.publish(second, content, end)
    allocator.release([first, second])
    allocator.release([unpublished, another])
    assert {allocator.allocate(), allocator.allocate()} == {unpublished, another}
    assert allocator.share([*beginning, *end])[0] == [first, second]
    allocator.release([first, second])
    assert allocator.allocate() == second
    assert allocator.share([*beginning, *end])[0] == [first]


def test_a_block_takes_what_is_planned_for_it() -> None:
    config = make_model(n_kv_head=1).config
    for dtype in (torch.float32, torch.bfloat16):
        memory = KVBlocks(config, 3, torch.device("cpu"), dtype)
        assert sum(tensor.nbytes for tensor in (*memory.keys, *memory.values)) == 3 * KVBlocks.bytes_per_block(config, dtype)

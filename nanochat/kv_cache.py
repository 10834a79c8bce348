"""Keys and values of the tokens seen so far, in two forms.

`KVCache` is one tensor for a batch of texts of one length: `GPT.forward(kv_cache=...)` takes it, for experiments and tests.
Generation uses `KVBlocks`, for any number of texts that come and go, in blocks of BLOCK_SIZE tokens: runner.py attends
through `PrefillView` and `DecodeView`; scheduler.py asks `BlockAllocator` for blocks, and for those that texts share.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanochat.block_attention import heads_first
from nanochat.gpt import GPT, GPTConfig

BLOCK_SIZE = 16  # tokens in a block


class KVCache:
    """A cache for batch_size rows of at most seq_len tokens, with num_heads key/value heads of head_dim channels."""

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        seq_len: int,
        head_dim: int,
        num_layers: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.batch_size, self.seq_len = batch_size, seq_len
        self.length = 0  # tokens in each row
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens = torch.zeros(batch_size, seq_len, dtype=torch.long, device=device)

    @classmethod
    def for_model(cls, model: GPT, batch_size: int, seq_len: int | None = None) -> KVCache:
        """An empty cache that fits a GPT, in its compute dtype."""
        config = model.config
        seq_len = seq_len or config.sequence_len
        device, dtype = model.get_device(), model.get_compute_dtype()
        return cls(batch_size, config.n_kv_head, seq_len, config.head_dim, config.n_layer, device, dtype)

    # ------------------------------------------------------------------------- positions

    def get_pos(self) -> int:
        """Tokens in each row."""
        return self.length

    def positions(self, T: int) -> torch.Tensor:
        """(batch_size, T): the positions of the next T tokens of each row. Raises ValueError beyond seq_len."""
        if self.length + T > self.seq_len:
            raise ValueError(f"{self.length + T} tokens do not fit in a cache of {self.seq_len}")
        return torch.arange(self.length, self.length + T, device=self.tokens.device).expand(self.batch_size, T)

    def remember(self, idx: torch.Tensor) -> torch.Tensor:
        """Store the next tokens (batch_size, T); returns the token before each one (a row's first stands before itself)."""
        positions = self.positions(idx.size(1))
        self.tokens.scatter_(1, positions, idx)
        return self.tokens.gather(1, (positions - 1).clamp(min=0))

    def advance(self, T: int) -> None:
        """Count T more tokens in every row, after all layers have stored theirs."""
        self.length += T

    def reset(self) -> None:
        """Forget all tokens; the memory is kept."""
        self.length = 0

    # ------------------------------------------------------------------------- contents

    def prefill(self, other: KVCache) -> None:
        """Copy a cache with one row into every row of this one, which must be empty."""
        if self.length or other.batch_size != 1:
            raise ValueError("prefill copies a cache of one row into an empty one")
        self.length = length = other.length
        self.keys[:, :, :length] = other.keys[:, :, :length]
        self.values[:, :, :length] = other.values[:, :, :length]
        self.tokens[:, :length] = other.tokens[:, :length]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Store the keys and values of T new tokens, then attend to them and to earlier ones.

        q: (B, T, H, D); k, v: (B, T, num_heads, D). A token sees itself and the `window` tokens before it in its row.
        Returns (B, T, H, D).
        """
        T = q.size(1)
        end = self.length + T
        keys, values = self.keys[layer], self.values[layer]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        begin = max(0, self.length - window)  # no query reaches back further than the first one
        q, keys, values = heads_first(q, keys[:, begin:end].to(q.dtype), values[:, begin:end].to(q.dtype))
        if T == 1:  # only keys within the window are left: nothing to mask
            return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2)
        places = torch.arange(begin, end, device=q.device)
        distance = places[self.length - begin :, None] - places  # (T, keys)
        visible = (distance >= 0) & (distance <= window)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible).transpose(1, 2)


# ----------------------------------------------------------------------------- blocks


class BlockAllocator:
    """Tracks which blocks are free, and which hold prefixes that several texts may share.

    A full block is published under its tokens and the content before it. A published block that nobody uses can still be
    found until its memory is needed; the one unused longest goes first. Block 0 is never allocated: the empty rows of a
    batch write there. Not thread-safe.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # taken from the front
        self._users = [0] * num_blocks
        self._published: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (parent, tokens): (block, content)
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._contents = 0  # numbers the contents
        self._empty = 0  # the empty text's, with which every prefix begins

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int | None:
        """A block to write to, or None if all are in use."""
        if not self._free:
            return None
        block, _ = self._free.popitem(last=False)
        if (key := self._key_of.pop(block, None)) is not None:
            del self._published[key]
        self._users[block] = 1
        return block

    def release(self, blocks: list[int]) -> None:
        """Give up one use of each block. A text's last blocks are reused before its first, which others may share."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def share(self, tokens: list[int]) -> tuple[list[int], int]:
        """(blocks, content) of the longest published prefix of `tokens`; counts one more use of these blocks."""
        blocks, content = [], self._empty
        for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE):
            found = self._published.get((content, tuple(tokens[end - BLOCK_SIZE : end])))
            if found is None:
                break
            block, content = found
            blocks.append(block)
        self.use(blocks)
        return blocks, content

    def use(self, blocks: list[int]) -> None:
        """Count one more use of each block."""
        for block in blocks:
            self._users[block] += 1
            self._free.pop(block, None)

    def publish(self, block: int, parent: int, tokens: tuple[int, ...]) -> int:
        """Let others find a full block by its tokens and the content before it; returns the number of its content."""
        key = (parent, tokens)
        if key not in self._published:
            self._contents += 1
            self._published[key] = (block, self._contents)
            self._key_of[block] = key
        return self._published[key][1]

    def forget(self) -> None:
        """Forget what blocks hold, so that no text finds it.

        Blocks in use stay with their users, and what those publish later cannot be found either.
        """
        self._published.clear()
        self._key_of.clear()
        self._contents += 1
        self._empty = self._contents


class KVBlocks:
    """The memory itself: for each layer keys and values (num_blocks, BLOCK_SIZE, n_kv_head, head_dim).

    One tensor for each layer: a compiled step that writes through a view of a larger tensor copies that tensor.
    """

    def __init__(self, config: GPTConfig, num_blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (num_blocks, BLOCK_SIZE, config.n_kv_head, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]

    @torch.inference_mode()
    def clear(self) -> None:
        for memory in (*self.keys, *self.values):
            memory.zero_()

    @staticmethod
    def bytes_per_block(config: GPTConfig, dtype: torch.dtype) -> int:
        return 2 * config.n_layer * BLOCK_SIZE * config.n_kv_head * config.head_dim * dtype.itemsize


class PrefillView:
    """Attention for T more tokens of one text whose first `start` tokens are in its blocks already."""

    def __init__(self, memory: KVBlocks, blocks: list[int], start: int, T: int) -> None:
        self.memory, self.start, self.T = memory, start, T
        device = memory.keys[0].device
        slots = torch.tensor(blocks, device=device)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=device)
        self.slots = slots.flatten()[: start + T]
        self._masks: dict[int, torch.Tensor | None] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Store k, v (1, T, KV, D) and attend with q (1, T, H, D), each token to itself and `window` before it."""
        keys, values = (x[layer].flatten(0, 1) for x in (self.memory.keys, self.memory.values))
        written = self.slots[self.start :]
        keys[written], values[written] = k[0], v[0]
        if self.start:
            begin = max(0, self.start - window)  # no query reaches back further than the first one's window
            k, v = keys[self.slots[begin:]][None], values[self.slots[begin:]][None]
        mask = self._mask(window, q)
        q, k, v = heads_first(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)

    def _mask(self, window: int, q: torch.Tensor) -> torch.Tensor | None:
        """The mask to add to the scores, made once for all layers with this window; None where a causal mask is enough."""
        if window not in self._masks:
            begin, end = max(0, self.start - window), self.start + self.T
            mask = None
            if self.start or window < self.T - 1:
                positions = torch.arange(self.start, end, device=q.device)
                distance = positions[:, None] - torch.arange(begin, end, device=q.device)
                mask = torch.where((distance >= 0) & (distance <= window), 0.0, float("-inf")).to(q.dtype)
            self._masks[window] = mask
        return self._masks[window]


class DecodeView(NamedTuple):
    """Attention for one more token in each of B texts of any lengths.

    keys, values: from KVBlocks; table: (B, at least max_blocks) int64, the blocks of each text; positions: (B,) int64, of
    the new tokens; columns: (n,), used only for its length n, the most blocks of any text (a tensor, so that a compiled
    step takes any n); max_blocks: blocks of the longest text that the model takes.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    table: torch.Tensor
    positions: torch.Tensor
    columns: torch.Tensor
    max_blocks: int

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Store k, v (B, 1, KV, D) and attend with q (B, 1, H, D) -> (B, 1, H, D).

        Elementwise products and sums instead of a matrix product: the compiler fuses them with the gather of blocks, so
        keys and values are read once and never copied.
        """
        B, _, H, D = q.shape
        KV = k.size(2)
        keys, values, positions = self.keys[layer], self.values[layer], self.positions
        own = self.table.gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0]
        keys[own, positions % BLOCK_SIZE] = k[:, 0]
        values[own, positions % BLOCK_SIZE] = v[:, 0]
        blocks, visible = self._reach(window)
        k, v = (x[blocks].flatten(1, 2).unsqueeze(3).float() for x in (keys, values))  # (B, L, KV, 1, D)
        q = materialized(q.view(B, 1, KV, H // KV, D).float())
        scores = ((q * k).sum(-1) * D**-0.5).masked_fill(~visible, float("-inf"))  # (B, L, KV, G)
        weights = (scores - scores.amax(1, keepdim=True)).exp()
        y = (weights.unsqueeze(-1) * v).sum(1) / weights.sum(1).unsqueeze(-1)
        return y.reshape(B, 1, H, D).to(keys.dtype)

    def _reach(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks that a window can touch, (B, n) int64, and which of their L tokens are in it, (B, L, 1, 1) bool."""
        positions, device = self.positions, self.positions.device
        within = torch.arange(BLOCK_SIZE, device=device)
        reach = window // BLOCK_SIZE + 2  # blocks that a window can touch
        if reach >= self.max_blocks:
            blocks = self.table[:, : self.columns.size(0)]
            at = torch.arange(self.columns.size(0) * BLOCK_SIZE, device=device)[None]
        else:
            first = (positions - window).clamp(min=0) // BLOCK_SIZE
            columns = first[:, None] + torch.arange(reach, device=device)
            blocks = materialized(self.table.gather(1, columns.clamp(max=self.max_blocks - 1)))
            at = (columns[:, :, None] * BLOCK_SIZE + within).flatten(1)
        distance = positions[:, None] - at
        visible = ((distance >= 0) & (distance <= window))[:, :, None, None]
        return blocks, visible


def materialized(x: torch.Tensor) -> torch.Tensor:
    """x itself. On a CPU, `cat` makes the compiler write it to memory, instead of recomputing it at each use."""
    return torch.cat((x[..., :1], x[..., 1:]), dim=-1) if x.device.type == "cpu" else x

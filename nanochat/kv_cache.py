"""Keys and values of the tokens seen so far. Used by gpt.py to attend and by engine.py to generate.

Rows of a batch may have different lengths: each has its own position. Memory grows by doubling, by copying.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanochat.flash_attention import repeat_kv

INITIAL_LENGTH = 128


class KVCache:
    """A cache of at most seq_len tokens for each of batch_size rows, num_heads key/value heads of head_dim channels."""

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
        self.batch_size, self.num_heads, self.seq_len = batch_size, num_heads, seq_len
        self.head_dim, self.num_layers = head_dim, num_layers
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # tokens in each row
        self._longest = 0  # max of lengths, known without asking the device
        self._uniform = True  # all rows have the same length
        shape = (num_layers, batch_size, min(INITIAL_LENGTH, seq_len), num_heads, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @classmethod
    def for_model(cls, model: torch.nn.Module, batch_size: int, seq_len: int | None = None) -> KVCache:
        """An empty cache that fits a GPT, in its compute dtype."""
        config = model.config
        seq_len = seq_len or config.sequence_len
        device, dtype = model.get_device(), model.get_compute_dtype()
        return cls(batch_size, config.n_kv_head, seq_len, config.head_dim, config.n_layer, device, dtype)

    # ------------------------------------------------------------------------- positions

    def get_pos(self) -> int:
        """Tokens in the longest row."""
        return self._longest

    def positions(self, T: int) -> torch.Tensor:
        """(batch_size, T): the positions of the next T tokens of each row. Raises ValueError beyond seq_len."""
        if self._longest + T > self.seq_len:
            raise ValueError(f"{self._longest + T} tokens do not fit in a cache of {self.seq_len}")
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def advance(self, T: int) -> None:
        """Count T more tokens in every row, after all layers have stored theirs."""
        self.lengths += T
        self._longest += T

    def reset(self) -> None:
        """Forget all tokens; the memory is kept."""
        self.set_lengths([0] * self.batch_size)

    def set_lengths(self, lengths: list[int]) -> None:
        """Keep only the first lengths[i] tokens of row i: what was padding, or what another text does not share."""
        self.lengths = torch.tensor(lengths, dtype=torch.long, device=self.lengths.device)
        self._longest = max(lengths)
        self._uniform = min(lengths) == self._longest

    # ------------------------------------------------------------------------- contents

    def prefill(self, other: KVCache) -> None:
        """Copy a cache of one row into every row of this one, which must be empty."""
        if self._longest or other.batch_size != 1:
            raise ValueError("prefill copies a cache of one row into an empty one")
        length = other.get_pos()
        self._reserve(length)
        self.keys[:, :, :length] = other.keys[:, :, :length]
        self.values[:, :, :length] = other.values[:, :, :length]
        self.set_lengths([length] * self.batch_size)

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows but these: finished ones leave the batch."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys.index_select(1, index), self.values.index_select(1, index)
        self.lengths = self.lengths[index]
        self.batch_size = len(rows)

    def _reserve(self, length: int) -> None:
        """Make room for rows of that length."""
        allocated = self.keys.size(2)
        if length > allocated:
            more = min(max(length, 2 * allocated), self.seq_len) - allocated
            self.keys, self.values = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.keys, self.values))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Store the keys and values of T new tokens and attend to them and to what came before.

        q: (B, T, H, D); k, v: (B, T, num_heads, D). A token sees itself and the `window` tokens before it in its row.
        Returns (B, T, H, D).
        """
        B, T, H, D = q.shape
        self._reserve(self._longest + T)
        end = self._longest + T
        keys, values = self.keys[layer], self.values[layer]
        if self._uniform:
            keys[:, self._longest : end] = k
            values[:, self._longest : end] = v
            # No query reaches back further than the first one's window.
            begin = max(0, self._longest - window)
        else:
            rows = torch.arange(B, device=q.device)[:, None]
            positions = self.positions(T)
            keys[rows, positions] = k
            values[rows, positions] = v
            begin = 0
        keys, values = (repeat_kv(x[:, begin:end].to(q.dtype), H).transpose(1, 2) for x in (keys, values))
        q = q.transpose(1, 2)
        if self._uniform and T == 1:  # the window is all there is: nothing to mask
            return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2)
        distance = self.positions(T)[:, :, None] - torch.arange(begin, end, device=q.device)  # (B, T, keys)
        visible = (distance >= 0) & (distance <= window)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible[:, None]).transpose(1, 2)

"""The model: a decoder transformer, short enough to read in one sitting. Used by everything that trains or generates.

What differs from a textbook GPT: rotary positions, normalized queries and keys, grouped key/value heads, sliding
windows, ReLU squared, value embeddings on alternating layers, bigram embeddings, a learned share of the first embedding
in every block, no biases and no learned norm weights, an untied head with soft-capped logits.

Weights are stored in float32 and multiplied in the compute dtype (devices.get_compute_dtype); a model used only for
inference may be cast as a whole with `.to(torch.bfloat16)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.block_attention import QK_SCALE, lay_out
from nanochat.common import NanochatError
from nanochat.cross_entropy import ChunkLoss, chunk_loss, softcap, softcapped_cross_entropy, softmax_gradient
from nanochat.devices import get_compute_dtype
from nanochat.flash_attention import Attention, AttentionPlan, plan_attention
from nanochat.layers import Embedding, Linear, make_heads, norm

if TYPE_CHECKING:
    from nanochat.kernels import Heads
    from nanochat.kv_cache import KVCache
    from nanochat.lookup_kernel import Order
    from nanochat.optim import MuonAdamW

ROTARY_BASE = 100_000
LOGIT_CAP = 15.0
PAIR_FACTOR = 1_000_003  # hashes two tokens; a prime, so that pairs spread evenly whatever the table's size
GATE_CHANNELS = 32  # the value-embedding gate reads only the first channels of its input
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {  # by annotation in GPTConfig: the types of values, what they are called
    "int": ((int,), "a whole number above 0"),
    "float": ((int, float), "a number above 0"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
}


@dataclass(frozen=True)
class GPTConfig:
    """Everything that determines the model's shape; stored in each checkpoint.

    `window_pattern` is repeated over the layers: "L" attends to the whole context, "S" to a quarter of it (rounded up
    to a multiple of 128); the last layer always sees the whole context.
    """

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"
    bigrams: int = 0  # rows of the bigram table, as a multiple of the vocabulary size; 0: no table
    value_embeddings: bool = True  # this and the fields below differ only in models made elsewhere
    qk_scale: float = QK_SCALE
    rotary_base: float = ROTARY_BASE

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            types, wanted = KINDS.get(field.type, ((type(value),), "a value"))
            if value == field.default and type(value) in types:
                continue  # a switch may be off at 0
            if type(value) not in types or (wanted.endswith("above 0") and not 0 < value < 1 << 31):
                raise NanochatError(f"{field.name} {value!r:.50} is not {wanted}, nor the default, {field.default}")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 8:
            raise NanochatError(
                f"n_embd {self.n_embd} over n_head {self.n_head} does not give a head size divisible by 8: "
                f"choose n_embd as a multiple of {8 * self.n_head}"
            )
        if self.n_head % self.n_kv_head:
            raise NanochatError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}: choose a divisor")
        if not self.window_pattern or set(self.window_pattern.upper()) - {"S", "L"}:
            raise NanochatError(f"window_pattern {self.window_pattern!r} may hold only S and L, for example SSSL")
        if not 0 < self.qk_scale <= QK_SCALE:  # attention relies on this bound
            raise NanochatError(f"qk_scale {self.qk_scale} must be above 0 and at most {QK_SCALE}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and head: a multiple of 64, which matrix units prefer."""
        return -(-self.vocab_size // 64) * 64

    def windows(self) -> list[int]:
        """How many tokens back each layer sees."""
        short = -(-self.sequence_len // 4 // 128) * 128
        sizes = {"S": min(short, self.sequence_len), "L": self.sequence_len}
        pattern = self.window_pattern.upper()
        windows = [sizes[pattern[i % len(pattern)]] for i in range(self.n_layer)]
        return [*windows[:-1], self.sequence_len]

    def has_value_embedding(self, layer: int) -> bool:
        """True for every other layer, counted back from the last one."""
        return self.value_embeddings and (self.n_layer - 1 - layer) % 2 == 0


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.windows()[layer]
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.qk_scale = config.qk_scale
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.has_value_embedding = config.has_value_embedding(layer)
        if self.has_value_embedding:
            self.ve_gate = Linear(min(GATE_CHANNELS, config.n_embd), self.n_kv_head)
        self.fused: Heads | None = None  # see kernels.py

    def project(
        self, x: torch.Tensor, value_embedding: torch.Tensor | None, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, KV, D)."""
        q, k, v = make_heads(x, (self.c_q, self.c_k, self.c_v), self.qk_scale, rotary, self.fused)
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.ve_gate.in_features]))  # (B, T, KV), 1 at the start
            v = v + gate.unsqueeze(-1) * value_embedding.view_as(v)
        return q, k, v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
        """The output of attention (B, T, H, D), before c_proj."""
        return attention.attend(self.layer, q, k, v, self.window)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.fused: Callable[..., torch.Tensor] | None = None  # see kernels.py

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused and torch.is_grad_enabled() and not self.c_fc.fp8:
            return self.fused(x, self.c_fc.weight.to(x.dtype), self.c_proj.weight.to(x.dtype))
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One layer. Training compiles it once for each kind of layer, whatever the depth (see GPT.compile)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        x0: torch.Tensor,
        lambdas: tuple[torch.Tensor, torch.Tensor],
        value_embedding: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: Attention,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: the stream, x0: the first embedding, value_embedding: this layer's, or None; each (B, T, n_embd).

        places: (N,) int64, flat indices b * T + t of the only tokens whose output (N, n_embd) is wanted; all serve as keys.
        """
        x, q, k, v = self.before_attention(x, x0, lambdas, value_embedding, rotary)
        return self.after_attention(x, self.attn.attend(q, k, v, attention), places)

    def before_attention(
        self,
        x: torch.Tensor,
        x0: torch.Tensor,
        lambdas: tuple[torch.Tensor, torch.Tensor],
        value_embedding: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The residual stream with its share of the first embedding added, then queries, keys and values."""
        x = (lambdas[0] * x + lambdas[1] * x0).to(x.dtype)
        return x, *self.attn.project(norm(x), value_embedding, rotary)

    def after_attention(self, x: torch.Tensor, y: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Add to the stream x (B, T, n_embd) what attention gives, c_proj of y (B, T, H, D), then what the MLP gives."""
        x = x + self.attn.c_proj(y.flatten(2))
        if places is not None:
            x = x.flatten(0, 1)[places]
        return x + self.mlp(norm(x))


def _before_attention(block: Block, size: int | None, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """Block.before_attention, with q, k and v laid out in memory as attention in blocks of `size` tokens reads them."""
    x, *qkv = block.before_attention(*inputs)
    return x, *(lay_out(heads, size) for heads in qkv)


class GPT(nn.Module):
    """The whole model. Build it by `GPT.on_meta`, then call `to_empty` and `init_weights` or load weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        # A new parameter must be set in init_weights and mapped in hf/; outside the blocks it also needs a name in
        # report.py. If it is neither an embedding nor a matrix of a block, add a group for it in build_optimizer.
        kv_dim = config.n_kv_head * config.head_dim
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        rows = config.bigrams * config.padded_vocab_size
        self.bigrams = Embedding(rows, config.n_embd) if rows else None
        # Any: torch's types cannot say that these containers hold Embeddings and Blocks.
        layers = filter(config.has_value_embedding, range(config.n_layer))
        self.value_embeds: Any = nn.ModuleDict({str(i): Embedding(config.padded_vocab_size, kv_dim) for i in layers})
        self.blocks: Any = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.compute_dtype: torch.dtype | None = None  # None: the best dtype for the device
        self._compiled_block: Callable[..., torch.Tensor] | None = None
        self._compiled_norm: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._chunk_loss: ChunkLoss | None = None
        self._sort_ids: Callable[[torch.Tensor, int], Order] | None = None  # see kernels.py
        self.recompute_blocks = False  # activation checkpointing: recompute blocks in the backward pass
        self.idle_blocks = 0  # blocks[:idle_blocks] are skipped: they do not learn yet (scaling.expansion_share)
        self.fixed_shape = True  # all training batches have one shape; False: do not compile FlexAttention for each length
        self.is_sharded = False  # set by sharding.py: each rank holds some rows of every parameter
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def on_meta(cls, config: GPTConfig) -> GPT:
        """The model without memory for its weights: to count them, or before they are loaded."""
        with torch.device("meta"):
            return cls(config)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Set every parameter; initial values are made nowhere else.

        Matrices are uniform with standard deviation n_embd**-0.5; those that write into the residual stream start at zero,
        so that each block starts as the identity; the head starts near zero, so that the first loss is log(vocab_size).
        """
        generator = None
        if seed is not None:
            generator = torch.Generator(device=self.get_device()).manual_seed(seed)

        def draw(parameter: torch.Tensor, method: str, a: float, b: float) -> None:
            values = torch.empty(parameter.shape, device=self.get_device())
            getattr(values, method)(a, b, generator=generator)
            if self.is_sharded:  # every rank draws the same values and keeps its own rows
                from nanochat.sharding import fill

                fill(parameter, values)
            else:
                parameter.copy_(values)

        bound = 3**0.5 * self.config.n_embd**-0.5
        draw(self.wte.weight, "normal_", 0, 0.8)
        draw(self.lm_head.weight, "normal_", 0, 0.001)
        if self.bigrams is not None:
            self.bigrams.weight.zero_()
        for embedding in self.value_embeds.values():
            draw(embedding.weight, "uniform_", -bound, bound)
        for block in self.blocks:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                draw(matrix.weight, "uniform_", -bound, bound)
            for matrix in (block.attn.c_proj, block.mlp.c_proj):
                matrix.weight.zero_()
            if block.attn.has_value_embedding:
                block.attn.ve_gate.weight.zero_()
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.fill_(0.1)

    def get_device(self) -> torch.device:
        return self.wte.weight.device

    def get_compute_dtype(self) -> torch.dtype:
        return self.compute_dtype or get_compute_dtype(self.get_device())

    def tables(self) -> dict[str, Embedding]:
        """All embeddings (tables that are looked up, not multiplied), by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Embedding)}

    def rotary(self, positions: torch.Tensor | None, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each (B or 1, T, 1, head_dim) float32, at positions (B, T); None: 0..T-1.

        Positions must be below T or the context length, whichever is larger.
        """
        needed = max(T, self.config.sequence_len)
        if self._rotary is None or self._rotary[0].size(0) < needed or self._rotary[0].device != self.get_device():
            self._rotary = self._make_rotary(needed)
        cos, sin = self._rotary
        if positions is None:
            return cos[None, :T, None], sin[None, :T, None]
        return cos[positions][:, :, None], sin[positions][:, :, None]

    @torch.inference_mode(False)  # training may use tables that were made while generating
    def _make_rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        channels = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=self.get_device())
        frequencies = self.config.rotary_base ** (-channels / self.config.head_dim)
        angles = torch.arange(length, dtype=torch.float32, device=self.get_device())[:, None] * frequencies
        return angles.cos().repeat(1, 2), torch.cat([angles.sin(), -angles.sin()], dim=1)

    @property
    def is_compiled(self) -> bool:
        return self._compiled_block is not None

    def compile(self) -> None:
        """Compile what training runs, or switch to our own kernels: the blocks, the loss and, on a CPU, the outer norms.

        runner.py compiles generation. Each block is compiled, not the whole model: layers that differ only in their weights
        share one graph, so the wait for the first step hardly grows with depth, and steps are as fast or faster. On a CPU,
        where each kernel takes a second to compile, attention is left out, and all kinds of layers share one graph for
        what follows it.
        """
        if self.is_compiled:
            return
        if self.get_device().type != "cpu":
            from nanochat.kernels import choose_kernels

            # They compute the same as the code in their place: change both together.
            self._chunk_loss, self._sort_ids, heads, mlp = choose_kernels(self.get_device(), self.get_compute_dtype())
            for block in self.blocks:
                block.attn.fused, block.mlp.fused = heads, mlp
            self._compiled_block = torch.compile(Block.forward, dynamic=False)
            return
        self._chunk_loss = functools.partial(chunk_loss, gradient_of=torch.compile(softmax_gradient, dynamic=False))
        self._compiled_norm = torch.compile(norm, dynamic=False)
        before = torch.compile(_before_attention, dynamic=False)
        after = torch.compile(Block.after_attention, dynamic=False)

        def in_parts(block: Block, *inputs: Any) -> torch.Tensor:
            *streams, attention, places = inputs
            x, q, k, v = before(block, attention.block_size(streams[0].size(1)), *streams)
            return after(block, x, block.attn.attend(q, k, v, attention), places)

        self._compiled_block = in_parts

    def trunk(
        self,
        idx: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: Sequence[Attention],
        run_block: Callable[..., torch.Tensor] = Block.forward,
        places: torch.Tensor | None = None,
        previous: torch.Tensor | None = None,
        norm: Callable[[torch.Tensor], torch.Tensor] = norm,
    ) -> torch.Tensor:
        """Token ids (B, T) to final features (B, T, n_embd) in the compute dtype; `attention` holds one for each layer.

        previous: (B, T), the token before each one in its text; a text's first token stands before itself. None: each row
        is one text. Models without bigrams ignore it, so a cache may then return anything (KVCache.remember).
        places: (N,), flat indices of the only tokens whose features (N, n_embd) are wanted; the last layer skips the rest.
        """
        dtype, order = self.get_compute_dtype(), self.sort_ids(idx, self.config.padded_vocab_size)
        x0 = norm(self.embed(idx, previous, order))
        x = x0.view_as(x0)  # a new tensor object: if x were x0, the compiler would make another graph for the first block
        if self.idle_blocks:  # their c_proj are still zero, so each maps x to a x + b x0, which stays a multiple of x0
            factor = torch.ones((), device=idx.device)
            for i in range(self.idle_blocks):
                factor = self.resid_lambdas[i] * factor + self.x0_lambdas[i]
            x = (factor * x).to(dtype)
        for i in range(self.idle_blocks, self.config.n_layer):
            lambdas = (self.resid_lambdas[i], self.x0_lambdas[i])
            value_embedding = self.value_embeds[str(i)](idx, dtype, order) if str(i) in self.value_embeds else None
            wanted = places if i == self.config.n_layer - 1 else None
            x = run_block(self.blocks[i], x, x0, lambdas, value_embedding, rotary, attention[i], wanted)
        return norm(x)

    def embed(self, idx: torch.Tensor, previous: torch.Tensor | None, order: Order | None = None) -> torch.Tensor:
        """Each token's embedding plus its bigram's (the token before it and the token): (B, T, n_embd) in the compute dtype.

        Bigrams with the same hash share a row of the table. Hashed n-gram embeddings: arXiv 2502.01637.
        """
        dtype = self.get_compute_dtype()
        x: torch.Tensor = self.wte(idx, dtype, order)
        if self.bigrams is None:
            return x
        if previous is None:
            previous = torch.cat([idx[:, :1], idx[:, :-1]], dim=1)
        pairs = (previous * PAIR_FACTOR + idx) % self.bigrams.num_embeddings
        return x + self.bigrams(pairs, dtype, self.sort_ids(pairs, self.bigrams.num_embeddings))

    def sort_ids(self, idx: torch.Tensor, rows: int) -> Order | None:
        """The order in which our kernel sums the gradients of a table with that many rows; None: leave it to PyTorch."""
        return self._sort_ids(idx, rows) if self._sort_ids is not None and torch.is_grad_enabled() else None

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        kv_cache: KVCache | None = None,
        loss_reduction: str = "mean",
    ) -> torch.Tensor:
        """Logits or loss.

        idx: (B, T) int64; targets: (B, T) int64, -1 where there is nothing to predict. Without targets: logits
        (B, T, vocab_size) float32. With: the cross-entropy in nats, () for "mean" and "sum", (B, T) for "none".
        """
        x = self.features(idx, kv_cache)
        if targets is None:
            return self.logits(x)
        head = self.lm_head.weight
        if head.size(0) != self.config.vocab_size:  # even a slice of all rows would copy the gradient
            head = head[: self.config.vocab_size]
        loss = softcapped_cross_entropy(x.flatten(0, 1), head, targets.flatten(), LOGIT_CAP, loss_reduction, self._chunk_loss)
        return loss.view(idx.shape) if loss_reduction == "none" else loss

    def features(self, idx: torch.Tensor, kv_cache: KVCache | None = None) -> torch.Tensor:
        """What the head reads: (B, T, n_embd) in the compute dtype. With a cache, idx (B, T) continues its texts."""
        T = idx.size(1)
        if kv_cache is not None:
            rotary, caches = self.rotary(kv_cache.positions(T), kv_cache.length + T), [kv_cache] * self.config.n_layer
            x = self.trunk(idx, rotary, caches, previous=kv_cache.remember(idx))
            kv_cache.advance(T)
            return x
        # A sharded block gathers its parameters in hooks of __call__; sharding.py makes run_block its forward.
        constants, run_block = self.constants(T), Block.__call__ if self.is_sharded else self.run_block
        # Compiled, evaluations run with gradients, too: otherwise other graphs would be compiled for them.
        with torch.set_grad_enabled(self.is_compiled or torch.is_grad_enabled()):
            x = self.trunk(idx, *constants, run_block, norm=self._compiled_norm or norm)
        return x if torch.is_grad_enabled() else x.detach()

    def constants(self, T: int) -> tuple[tuple[torch.Tensor, torch.Tensor], list[AttentionPlan]]:
        """What all texts of T tokens share: their rotary angles, and how each layer attends."""
        fixed_shape = self.training and self.fixed_shape
        how = (self.get_device(), self.get_compute_dtype(), self.is_compiled, self.config.head_dim, fixed_shape)
        return self.rotary(None, T), [plan_attention(T, window, *how) for window in self.config.windows()]

    def run_block(self, block: Block, *inputs: Any) -> torch.Tensor:
        """Run a block as training does: compiled or not, its activations kept for the backward pass or recomputed."""
        forward = self._compiled_block or Block.forward
        if self.recompute_blocks:
            return checkpoint(forward, block, *inputs, use_reentrant=False)
        return forward(block, *inputs)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Features (..., n_embd) to soft-capped logits (..., vocab_size) float32; the padding is never predicted."""
        return softcap(self.lm_head(x)[..., : self.config.vocab_size], LOGIT_CAP)

    # ------------------------------------------------------------------------- counting

    def num_scaling_params(self) -> dict[str, int]:
        """Parameter counts by kind, and "total". Scaling laws are fitted on "scaling" (matrices and head)."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        counts["matrices"] = counts.pop("blocks")
        counts["scalars"] = sum(p.numel() for p in self.parameters(recurse=False))
        counts["total"] = sum(counts.values())
        counts["scaling"] = counts["matrices"] + counts["lm_head"]
        return counts

    def estimate_flops(self, idle_blocks: int = 0) -> int:
        """Floating-point operations to train on one token, forward and backward, at the full context.

        6 for each matrix parameter (embeddings are looked up, not multiplied), and 12 for each channel and each key that an
        average query sees. Masked keys do not count, even if the backend computes them, and neither do the first
        idle_blocks. Method: arXiv 2204.02311, appendix B, with windows.
        """
        T = self.config.sequence_len
        counts = self.num_scaling_params()
        windows = self.config.windows()[idle_blocks:]
        keys_seen = sum((window + 1) * (1 - window / (2 * T)) for window in windows)  # the mean of min(t, window) + 1
        idle = sum(p.numel() for block in self.blocks[:idle_blocks] for p in block.parameters())
        return int(6 * (counts["scaling"] - idle) + 12 * self.config.n_embd * keys_seen)

    def setup_optimizer(self, **settings: Any) -> MuonAdamW:
        """The optimizer for this model: see optim.py. `settings`: optim.OptimizerSettings."""
        from nanochat.optim import OptimizerSettings, build_optimizer

        return build_optimizer(self, OptimizerSettings(**settings))

    @torch.inference_mode()
    def generate(
        self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 42
    ) -> Iterator[int]:
        """Plain generation that recomputes the whole text for each token: slow and obviously right, to test the engine."""
        generator = torch.Generator(device=self.get_device()).manual_seed(seed)
        ids = torch.tensor([tokens], device=self.get_device())
        for _ in range(max_tokens):
            logits = self(ids)[:, -1]
            if top_k:
                smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, float("-inf"))
            if temperature > 0:
                probabilities = (logits / temperature).softmax(dim=-1)
                token = torch.multinomial(probabilities, 1, generator=generator)
            else:
                token = logits.argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            yield int(token)

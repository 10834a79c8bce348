"""A nanochat model for transformers. Lies beside the exported weights and is loaded with trust_remote_code.

What differs from a textbook GPT: rotary positions, normalized queries and keys, sliding windows, ReLU squared, value
embeddings on some layers, embeddings of pairs of tokens, a learned share of the first embedding in every block, no biases
and no learned norm weights, an untied head with soft-capped logits. The same numbers as nanochat's own gpt.py.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_nanochat import NanochatConfig

# The name of the key/value cache in this version of transformers.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),))


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels by the angle of their position. x: (B, T, H, D); cos, sin: (B or 1, T, 1, D / 2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


class Places(NamedTuple):
    """Where tokens are in their rows, and what of the rows is theirs.

    queries: (T,), places in the rows, padding included; attention_mask: (B, tokens so far), 0 for padding, or None;
    texts: (B, T), the number of each token's text, where rows hold several, or None.
    """

    queries: torch.Tensor
    attention_mask: torch.Tensor | None
    texts: torch.Tensor | None

    def visible_keys(self, num_keys: int, window: int) -> torch.Tensor:
        """(B or 1, 1, T, num_keys) bool: each token sees itself and the `window` tokens before it, of its text, no padding."""
        distance = self.queries[:, None] - torch.arange(num_keys, device=self.queries.device)
        visible = ((distance >= 0) & (distance <= window))[None]
        if self.texts is not None:  # a static cache is longer than the text, here and below
            visible = visible & (F.pad(self.texts, (0, num_keys - self.texts.size(1)))[:, None] == self.texts[..., None])
        if self.attention_mask is not None:
            real = F.pad(self.attention_mask.bool(), (0, num_keys - self.attention_mask.size(1)))
            visible = visible & real[:, None] | (distance == 0)  # padding sees itself: an empty row would give NaN
        return visible[:, None]


class NanochatAttention(nn.Module):
    def __init__(self, config: NanochatConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.window = config, layer, config.layer_windows[layer]
        kv_dim = config.num_key_value_heads * config.head_dim
        self.c_q = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.c_k = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.c_v = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if layer in config.value_embedding_layers:
            self.ve_gate = nn.Linear(config.gate_channels, config.num_key_value_heads, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        value_embedding: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        places: Places,
        cache: Cache | None,
    ) -> torch.Tensor:
        B, T, C = x.shape
        heads, kv_heads, head_dim = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        q = self.c_q(x).view(B, T, heads, head_dim)
        k = self.c_k(x).view(B, T, kv_heads, head_dim)
        v = self.c_v(x).view(B, T, kv_heads, head_dim)
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.config.gate_channels]))
            v = v + gate.unsqueeze(-1) * value_embedding.view(B, T, kv_heads, head_dim)
        q = apply_rotary(norm(q) * self.config.qk_scale, *rotary)
        k = apply_rotary(norm(k) * self.config.qk_scale, *rotary)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        mask = places.visible_keys(k.size(2), self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class NanochatMLP(nn.Module):
    def __init__(self, config: NanochatConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class NanochatBlock(GradientCheckpointingLayer):
    def __init__(self, config: NanochatConfig, layer: int) -> None:
        super().__init__()
        self.attn = NanochatAttention(config, layer)
        self.mlp = NanochatMLP(config)

    def forward(
        self,
        x: torch.Tensor,
        x0: torch.Tensor,
        lambdas: tuple[torch.Tensor, torch.Tensor],
        value_embedding: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        places: Places,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        x = (lambdas[0] * x + lambdas[1] * x0).to(x.dtype)
        x = x + self.attn(norm(x), value_embedding, rotary, places, cache)
        return x + self.mlp(norm(x))


class NanochatPreTrainedModel(PreTrainedModel):
    config_class = NanochatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanochatBlock"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NanochatModel):
            nn.init.constant_(module.resid_lambdas, 1.0)
            nn.init.constant_(module.x0_lambdas, 0.1)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As everywhere in transformers; value embeddings too have a row for each token."""
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        tables = cast(NanochatModel, self.base_model).value_embeds
        for layer, table in cast("dict[str, nn.Embedding]", tables).items():
            tables[layer] = self._get_resized_embeddings(table, embedding.num_embeddings, mean_resizing=mean_resizing)
        return embedding


class NanochatModel(NanochatPreTrainedModel):
    """Token ids to final features."""

    def __init__(self, config: NanochatConfig) -> None:
        super().__init__(config)
        self.wte: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.bigrams = nn.Embedding(config.bigram_rows, config.hidden_size) if config.bigram_rows else None
        kv_dim = config.num_key_value_heads * config.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(layer): nn.Embedding(config.vocab_size, kv_dim) for layer in config.value_embedding_layers}
        )
        self.blocks = nn.ModuleList(NanochatBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.resid_lambdas = nn.Parameter(torch.empty(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.empty(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        previous_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids: (B, T); attention_mask: (B, tokens so far), 0 for padding; previous_ids: see `embed`.

        position_ids: (B or 1, T); where they begin again at 0 in a row without a mask, as in packed rows, another text begins.
        past_key_values: the cache's name in older versions of transformers.
        """
        if input_ids is None:
            raise ValueError("a nanochat model needs input_ids: its value embeddings cannot be derived from inputs_embeds")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None  # a block that is computed twice would be stored twice
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        query_positions = past + torch.arange(input_ids.size(1), device=input_ids.device)
        rotary = self.rotary(query_positions[None] if position_ids is None else position_ids)
        texts = None
        if position_ids is not None and attention_mask is None and past == 0:
            texts = (position_ids == 0).cumsum(1)
        places = Places(query_positions, attention_mask, texts)
        x0 = x = norm(self.embed(input_ids, places, cache, past, previous_ids))
        for layer, block in enumerate(self.blocks):
            value_embedding = self.value_embeds[str(layer)](input_ids) if str(layer) in self.value_embeds else None
            lambdas = (self.resid_lambdas[layer], self.x0_lambdas[layer])
            x = block(x, x0, lambdas, value_embedding, rotary, places, cache=cache)
        for_later: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=norm(x), **for_later)

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each (B or 1, T, 1, head_dim / 2) float32, for positions (B or 1, T)."""
        channels = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=positions.device)
        frequencies = self.config.rotary_base ** (-channels / self.config.head_dim)
        angles = positions.float()[:, :, None, None] * frequencies
        return angles.cos(), angles.sin()

    def embed(
        self,
        input_ids: torch.Tensor,
        places: Places,
        cache: Any,
        past: int,
        previous_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, T, hidden_size): each token's embedding plus its bigram's.

        cache: a Cache or None; the last tokens that went into it, and how many it holds with them, are stored on it.
        previous_ids: (B, T), the token before each; None: the first one follows the last token in the cache. The first token
        of a text counts as its own predecessor.
        """
        x = self.wte(input_ids)
        if self.bigrams is None:
            return x
        if previous_ids is None:
            first, length = (input_ids[:, :1], 0) if past == 0 else getattr(cache, "newest", (None, -1))
            if first is None or length != past or first.size(0) != input_ids.size(0):
                raise ValueError("this cache was made or changed elsewhere: give previous_ids, the token before each")
            previous_ids = torch.cat([first, input_ids[:, :-1]], dim=1)
        if places.texts is not None:
            begins = F.pad(places.texts.diff(dim=1), (1, 0)) > 0
            previous_ids = torch.where(begins, input_ids, previous_ids)
        if places.attention_mask is not None:
            follows_text = F.pad(places.attention_mask.bool(), (1, 0))[:, past : past + input_ids.size(1)]
            previous_ids = torch.where(follows_text, previous_ids, input_ids)
        if cache is not None:
            cache.newest = input_ids[:, -1:], past + input_ids.size(1)
        previous_ids = previous_ids.long()  # the product does not fit into 32 bits
        return x + self.bigrams((previous_ids * self.config.pair_factor + input_ids) % self.config.bigram_rows)


class NanochatForCausalLM(NanochatPreTrainedModel, GenerationMixin):
    """Token ids to soft-capped logits."""

    def __init__(self, config: NanochatConfig) -> None:
        super().__init__(config)
        self.model = NanochatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.wte = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        previous_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocab_size) float32; of the last `logits_to_keep` tokens if not 0, or at its indices.

        labels: (B, T), the tokens themselves (they are shifted here), -100 where there is nothing to learn.
        """
        cache = past_key_values if cache is None else cache
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache=cache, previous_ids=previous_ids, use_cache=use_cache
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        cap = self.config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: getattr(outputs, CACHE_NAME)})

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The usual inputs, plus the tokens before those not yet in the cache, also after beams were reordered."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        new = inputs["input_ids"].size(1)
        if new < input_ids.size(1):
            inputs["previous_ids"] = input_ids[:, -new - 1 : -1]
        return inputs

    def _prepare_attention_mask_for_generation(self, inputs_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Without a mask nothing is padding: <|bos|>, with which rows are padded, also begins every text."""
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)

    @staticmethod
    def create_masks_for_generate(
        config: NanochatConfig, *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """The padding mask unchanged: `Places` applies the windows, also with a static cache."""
        return attention_mask

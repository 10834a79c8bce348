"""The shape of a nanochat model, for transformers. Lies beside the exported weights and is loaded with trust_remote_code."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class NanochatConfig(PretrainedConfig):
    """Everything that determines the model's shape.

    layer_windows: for each layer, how many tokens before itself a token sees.
    value_embedding_layers: the layers that add an embedding of the token to the values, through a gate that reads the first
    `gate_channels` channels.
    bigram_rows: rows of the bigram table; a pair is in row `(previous * pair_factor + token) % bigram_rows`. 0: no table.
    qk_scale: the length of each query and key, in units of sqrt(head size).
    """

    model_type = "nanochat_gpt"  # transformers' own "nanochat" is a simpler model
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_key_value_heads: int = 6,
        max_position_embeddings: int = 2048,
        layer_windows: list[int] | None = None,
        value_embedding_layers: list[int] | None = None,
        gate_channels: int = 32,
        bigram_rows: int = 0,
        pair_factor: int = 1_000_003,
        rotary_base: float = 100_000,
        qk_scale: float = 1.2,
        final_logit_softcapping: float = 15.0,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.intermediate_size = 4 * hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.layer_windows = layer_windows or [max_position_embeddings] * num_hidden_layers
        self.value_embedding_layers = value_embedding_layers or []
        self.gate_channels = gate_channels
        self.bigram_rows = bigram_rows
        self.pair_factor = pair_factor
        self.rotary_base = rotary_base
        self.qk_scale = qk_scale
        self.final_logit_softcapping = final_logit_softcapping
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

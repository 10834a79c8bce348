"""A GPT's weights under Hugging Face's names, and back. Used by export.py and load.py.

There are two forms. "custom" is for modeling_nanochat.py, which covers all that gpt.py can do. "nanochat" is for transformers'
own class of that name, which has no windows, value embeddings, embeddings of token pairs, share of the first embedding in
later blocks, or scaled queries and keys.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import NanochatError
from nanochat.gpt import GATE_CHANNELS, GPT, LOGIT_CAP, PAIR_FACTOR, GPTConfig

CUSTOM_TYPE, NATIVE_TYPE = "nanochat_gpt", "nanochat"
NORM_EPS = torch.finfo(torch.float32).eps  # what torch's rms_norm adds
SMALLEST_FOLD = 0.25  # least factor of the residual stream: with a smaller one, NORM_EPS would change the logits
NATIVE_NAMES = {
    "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
# Fields of GPTConfig that the native config expresses or `native_obstacles` checks.
NATIVE_FIELDS = {
    "sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd",
    "window_pattern", "bigrams", "value_embeddings", "qk_scale", "rotary_base",
}  # fmt: skip

State = dict[str, torch.Tensor]


# ----------------------------------------------------------------------------- custom


def to_custom(model: GPT) -> tuple[dict[str, Any], State]:
    """(config, weights) for modeling_nanochat.py, without the padding of tables and head.

    Raises NanochatError if a field of the model has no place in NanochatConfig.
    """
    config = model.config
    content = {
        "model_type": CUSTOM_TYPE,
        "architectures": ["NanochatForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_nanochat.NanochatConfig",
            "AutoModel": "modeling_nanochat.NanochatModel",
            "AutoModelForCausalLM": "modeling_nanochat.NanochatForCausalLM",
        },
        **_sizes(config),
        "layer_windows": config.windows(),
        "value_embedding_layers": [layer for layer in range(config.n_layer) if config.has_value_embedding(layer)],
        "gate_channels": min(GATE_CHANNELS, config.n_embd),
        "bigram_rows": model.bigrams.num_embeddings if model.bigrams is not None else 0,
        "pair_factor": PAIR_FACTOR,
        "rotary_base": config.rotary_base,
        "qk_scale": config.qk_scale,
    }
    said = _custom_config(content)
    said_of = {f.name: getattr(said, f.name, f.default) for f in fields(config) if f.name != "window_pattern"}
    if lost := [name for name, value in said_of.items() if value != getattr(config, name)]:  # the export would differ
        raise NanochatError(f"no form of an export can say {', '.join(lost)} of this model: nanochat/hf/ must learn it first")
    state = {}
    for name, tensor in model.state_dict().items():
        rows = config.vocab_size if _is_padded(name) else len(tensor)
        state[name if name.startswith("lm_head.") else f"model.{name}"] = tensor[:rows]
    return content, state


def from_custom(content: dict[str, Any], state: State) -> tuple[GPTConfig, State]:
    """The reverse. Raises NanochatError if config.json asks for what gpt.py cannot compute."""
    config = _custom_config(content)
    expected = to_custom(GPT.on_meta(config))[0]
    for key in ("layer_windows", "value_embedding_layers", "gate_channels", "bigram_rows", "pair_factor"):
        _demand(key, content[key], expected[key])
    _demand("final_logit_softcapping", content["final_logit_softcapping"], LOGIT_CAP)
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return config, {name: _pad(tensor, config) if _is_padded(name) else tensor for name, tensor in state.items()}


def _custom_config(content: dict[str, Any]) -> GPTConfig:
    longest = content["max_position_embeddings"]
    config = _config(
        content,
        window_pattern="".join("L" if window >= longest else "S" for window in content["layer_windows"]),
        value_embeddings=bool(content["value_embedding_layers"]),
        qk_scale=content["qk_scale"],
        rotary_base=content["rotary_base"],
    )
    return replace(config, bigrams=content["bigram_rows"] // config.padded_vocab_size)


# ----------------------------------------------------------------------------- transformers' own class


def native_obstacles(model: GPT) -> list[str]:
    """What transformers' own class cannot express of this model; [] if it can express everything."""
    config = model.config
    obstacles = [f.name for f in fields(config) if f.name not in NATIVE_FIELDS and getattr(config, f.name) != f.default]
    if set(config.windows()) != {config.sequence_len}:
        obstacles.append("sliding windows")
    if any(embedding.weight.any() for embedding in model.value_embeds.values()):
        obstacles.append("value embeddings")
    if model.bigrams is not None and model.bigrams.weight.any():
        obstacles.append("embeddings of pairs of tokens")
    if model.x0_lambdas[1:].any():
        obstacles.append("a share of the first embedding in later blocks")
    elif (_stream_factors(model) < SMALLEST_FOLD).any():
        obstacles.append("factors of the residual stream that are negative or near zero")
    if config.qk_scale != 1:
        obstacles.append(f"queries and keys {config.qk_scale} times as long as they are there")
    return obstacles


def _stream_factors(model: GPT) -> torch.Tensor:
    """(n_layer,): each block's stream relative to one whose factors are all 1, given that x0 enters only the first block."""
    factors = model.resid_lambdas.detach().double().clone()
    factors[0] += model.x0_lambdas[0].item()
    return factors.cumprod(0)


def to_native(model: GPT) -> tuple[dict[str, Any], State]:
    """(config, weights) for transformers' NanoChatForCausalLM.

    The stream's factors are folded into the matrices that write to it, since every norm cancels them.
    Raises NanochatError if that class cannot express the model.
    """
    if obstacles := native_obstacles(model):
        raise NanochatError(
            f"transformers' own nanochat class cannot express this model ({', '.join(obstacles)}): "
            "use --format custom, or auto"
        )
    config = model.config
    content = {
        "model_type": NATIVE_TYPE,
        "architectures": ["NanoChatForCausalLM"],
        **_sizes(config),
        "intermediate_size": 4 * config.n_embd,
        "hidden_act": "relu2",
        "attention_bias": False,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rotary_base)},
        "rope_theta": float(config.rotary_base),  # where versions before 5 look
    }
    state = {"model.embed_tokens.weight": model.wte.weight.detach(), "lm_head.weight": model.lm_head.weight.detach()}
    state = {name: tensor[: config.vocab_size] for name, tensor in state.items()}
    weights = model.state_dict()
    for layer, factor in enumerate(_stream_factors(model).tolist()):
        for ours, theirs in NATIVE_NAMES.items():
            weight = weights[f"blocks.{layer}.{ours}.weight"]
            state[f"model.layers.{layer}.{theirs}.weight"] = weight / factor if ours.endswith("c_proj") else weight
    return content, state


def from_native(content: dict[str, Any], state: State) -> tuple[GPTConfig, State]:
    """The reverse. Raises NanochatError if config.json asks for what gpt.py cannot compute."""
    for key, expected in (("hidden_act", "relu2"), ("final_logit_softcapping", LOGIT_CAP), ("attention_bias", False)):
        _demand(key, content.get(key, expected), expected)
    _demand("intermediate_size", content["intermediate_size"], 4 * content["hidden_size"])
    head_dim = content["hidden_size"] // content["num_attention_heads"]
    _demand("head_dim", content.get("head_dim") or head_dim, head_dim)
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    _demand("rope_type", rope.get("rope_type", "default"), "default")
    base = next(theta for theta in (rope.get("rope_theta"), content.get("rope_theta"), 10_000) if theta is not None)
    config = _config(content, window_pattern="L", value_embeddings=False, qk_scale=1.0, rotary_base=base)
    ours = {
        "wte.weight": _pad(state.pop("model.embed_tokens.weight"), config),
        "lm_head.weight": _pad(state.pop("lm_head.weight"), config),
        "resid_lambdas": torch.ones(config.n_layer),
        "x0_lambdas": torch.zeros(config.n_layer),
    }
    for layer in range(config.n_layer):
        for mine, theirs in NATIVE_NAMES.items():
            ours[f"blocks.{layer}.{mine}.weight"] = state.pop(f"model.layers.{layer}.{theirs}.weight")
    if state:
        raise NanochatError(f"the weights hold {min(state)}, which nanochat has no place for")
    return config, ours


# ----------------------------------------------------------------------------- both


def _sizes(config: GPTConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "final_logit_softcapping": LOGIT_CAP,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def _config(content: dict[str, Any], **rest: Any) -> GPTConfig:
    return GPTConfig(
        sequence_len=content["max_position_embeddings"],
        vocab_size=content["vocab_size"],
        n_layer=content["num_hidden_layers"],
        n_head=content["num_attention_heads"],
        n_kv_head=content.get("num_key_value_heads") or content["num_attention_heads"],
        n_embd=content["hidden_size"],
        **rest,
    )


def _demand(key: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise NanochatError(f"config.json has {key} {value!r}, but nanochat computes only with {expected!r}")


def _is_padded(name: str) -> bool:
    return name.startswith(("wte.", "value_embeds.", "lm_head."))


def _pad(tensor: torch.Tensor, config: GPTConfig) -> torch.Tensor:
    """The tensor's rows for the vocabulary, padded with zeros. Raises NanochatError if some of them are missing."""
    tensor = tensor[: config.vocab_size]
    if len(tensor) < config.vocab_size:
        raise NanochatError(
            f"the weights hold {len(tensor)} rows for a vocabulary of {config.vocab_size}: export the model again"
        )
    return F.pad(tensor, (0, 0, 0, config.padded_vocab_size - len(tensor)))

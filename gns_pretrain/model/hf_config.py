"""How transformers' Llama names its parameters and its settings.

Nothing is permuted: both store the same matrices and turn the same pairs of coordinates.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, RopeScaling

_OUTSIDE_BLOCKS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}


@dataclass(frozen=True)
class ExportedText:
    """What a user of the exported folder needs to know about its text."""

    max_positions: int  # tokens; transformers' max_position_embeddings
    tokenizer: Path | None = None  # a tokenizer.json, copied along
    bos_id: int | None = None  # token before a document
    eos_id: int | None = None  # token after a document


def hf_names(config: LlamaConfig) -> dict[str, str]:
    """transformers' name of each parameter, keyed by ours."""
    names = dict(_OUTSIDE_BLOCKS)
    if config.tie_embeddings:
        del names["output.weight"]
    for index in range(config.num_layers):
        for ours, theirs in _IN_BLOCK.items():
            names[f"layers.{index}.{ours}"] = f"model.layers.{index}.{theirs}"
    return names


def hf_config(config: LlamaConfig, text: ExportedText) -> dict[str, Any]:
    """Content of config.json; rope_theta and rope_scaling are for readers older than version 5."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling.enabled:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_frequency_factor,
            "high_freq_factor": config.rope_scaling.high_frequency_factor,
            "original_max_position_embeddings": config.rope_scaling.original_sequence_length,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.known_vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling.enabled else None,
        "max_position_embeddings": text.max_positions,
        "bos_token_id": text.bos_id,
        "eos_token_id": text.eos_id,
    }


def config_from_hf(values: dict[str, Any], source: Path) -> LlamaConfig:
    """Settings from the content of config.json; the model is named after its folder.

    Args:
        values: what config.json holds.
        source: its path.

    Raises:
        InputError: a key is missing, or asks for what Llama 3 does not have.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    try:
        dim, num_heads = values["hidden_size"], values["num_attention_heads"]
        _require(source, values, "model_type", "llama")
        _require(source, values, "hidden_act", "silu")
        _require(source, values, "attention_bias", False)
        _require(source, values, "mlp_bias", False)
        _require(source, values, "head_dim", dim // num_heads)
        return LlamaConfig(
            name=source.parent.name,
            dim=dim,
            num_layers=values["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=values.get("num_key_value_heads") or num_heads,
            ffn_dim=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            rope_theta=rope.get("rope_theta", values.get("rope_theta", 10_000.0)),
            rope_scaling=_scaling_from_hf(rope, source),
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=values.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise InputError(f"{source} has no {error}; is it a Llama's?") from error


def _scaling_from_hf(rope: dict[str, Any], source: Path) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    if kind != "llama3":
        raise InputError(f"{source}: rope_type={kind} is not supported; only default and llama3")
    return RopeScaling(
        enabled=True,
        factor=rope["factor"],
        low_frequency_factor=rope["low_freq_factor"],
        high_frequency_factor=rope["high_freq_factor"],
        original_sequence_length=rope["original_max_position_embeddings"],
    )


def _require(source: Path, values: dict[str, Any], key: str, wanted: Any) -> None:
    """Refuse a config.json whose key is there and differs from the only value we compute."""
    found = values.get(key)
    if found is not None and found != wanted:
        raise InputError(f"{source}: {key}={found} is not supported; only {wanted}")

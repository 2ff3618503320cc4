"""Models to and from the folders that transformers' LlamaForCausalLM reads and writes.

The folder holds model.safetensors and config.json; an exported one also the
tokenizer, if there is one.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, RopeScaling
from gns_pretrain.model.llama import Llama
from gns_pretrain.system.files import read_json, write_json

# How transformers' Llama names its parameters and its settings.
#
# Nothing is permuted: both store the same matrices and turn the same pairs of coordinates.

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


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
WAY_OUT = "name the folder of a Llama model, fetched or exported whole"


def export_hf_folder(model: Llama, folder: Path, text: ExportedText) -> None:
    """Write a folder for LlamaForCausalLM.from_pretrained, whole or not at all.

    Args:
        model: holding its full, unsharded weights; they are written in their own dtype.
        folder: must not exist.
        text: tokenizer, and what config.json says of the text.

    Raises:
        InputError: the folder exists, or the tokenizer does not fit the model.
    """
    library = weights_library()
    if folder.exists():
        raise InputError(f"--out {folder} exists already; name a new folder, or remove it first")
    state = model.state_dict()
    names = hf_names(model.config)
    tensors = {names[name]: value.contiguous() for name, value in state.items()}
    with _appearing_whole(folder) as unfinished:
        library.torch.save_file(tensors, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
        write_json(unfinished / CONFIG_FILE, hf_config(model.config, text) | {"dtype": dtype})
        # safetensors writes for its owner's eyes only; everything else follows the umask.
        shutil.copymode(unfinished / CONFIG_FILE, unfinished / WEIGHTS_FILE)
        if text.tokenizer is not None:
            _copy_tokenizer(unfinished, text, model.config.known_vocab_size)


def load_hf_folder(folder: Path) -> Llama:
    """Read a model from a folder in transformers' format, with weights in one file or several.

    Returns:
        The model on the CPU, in float32.

    Raises:
        InputError: naming the file that is missing, damaged, or describes another architecture.
    """
    config = config_from_hf(read_json(folder / CONFIG_FILE, way_out=WAY_OUT), folder / CONFIG_FILE)
    with torch.device("meta"):
        model = Llama(config)
    state = _read_state(folder, hf_names(config))
    for name, parameter in model.named_parameters():
        if state[name].shape != parameter.shape:
            raise InputError(
                f"{folder}: tensor {hf_names(config)[name]} has shape {list(state[name].shape)}, "
                f"but {CONFIG_FILE} says {list(parameter.shape)}"
            )
    model.load_state_dict(state, assign=True)
    return model


def _read_state(folder: Path, names: dict[str, str]) -> dict[str, Tensor]:
    """Every parameter in float32, keyed by our names; exactly those of `names`."""
    ours = {theirs: name for name, theirs in names.items()}
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for name, value in _read_tensors(path):
            if name in ours:
                state[ours[name]] = value.to(torch.float32)
            # Old files also store what follows from the configuration, or a tied matrix twice.
            elif not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
                raise InputError(f"{path}: tensor {name} is no part of the Llama in {CONFIG_FILE}")
    missing = sorted(names[name] for name in names.keys() - state.keys())
    if missing:
        raise InputError(f"{folder}: tensor {missing[0]} is missing from its safetensors")
    return state


def weights_library() -> Any:
    """safetensors, which reads and writes the weights; InputError where it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError(
            "weights in Hugging Face's format need safetensors; "
            "pip install 'gns-pretrain[huggingface]'"
        ) from error
    return safetensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE, way_out=WAY_OUT).get("weight_map", {})
        return [folder / name for name in sorted(set(weight_map.values()))]
    return [folder / WEIGHTS_FILE]


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    library = weights_library()
    try:
        with library.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)
    except (OSError, library.SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error


def _copy_tokenizer(folder: Path, text: ExportedText, vocab_size: int) -> None:
    """Put the tokenizer beside the weights, so that AutoTokenizer finds it."""
    from tokenizers import Tokenizer

    assert text.tokenizer is not None
    try:
        tokenizer = Tokenizer.from_file(str(text.tokenizer))
    except Exception as error:  # the library raises the base class
        raise InputError(f"{text.tokenizer} cannot be read as a tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise InputError(
            f"{text.tokenizer} has {tokenizer.get_vocab_size()} tokens, more than the model's "
            f"model.vocab_size={vocab_size}; name the tokenizer of the data it was trained on"
        )
    shutil.copyfile(text.tokenizer, folder / TOKENIZER_FILE)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": text.max_positions,
    }
    for key, token_id in (("bos_token", text.bos_id), ("eos_token", text.eos_id)):
        if token_id is not None:
            settings[key] = tokenizer.id_to_token(token_id)
    write_json(folder / "tokenizer_config.json", settings)


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write in; it takes the name `folder` at the end, or vanishes on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise

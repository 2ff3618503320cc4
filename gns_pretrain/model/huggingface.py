"""Models to and from the folders that transformers' LlamaForCausalLM reads and writes.

The folder holds model.safetensors and config.json; an exported one also the tokenizer and the ids
that a text begins, ends and is padded with, if there are any, and a model card. No weight is
permuted: both store the same matrices and rotate the same pairs of coordinates.
"""

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gns_pretrain.errors import InputError, needs
from gns_pretrain.model.config import LlamaConfig, RopeScaling, count_parameters
from gns_pretrain.model.llama import Llama
from gns_pretrain.system.files import (
    named_file,
    parse,
    read_json,
    shortened,
    whole_folder,
    write_bytes,
    write_json,
)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
CARD_FILE = "README.md"
PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|padding|>", "<|pad|>")
HINT = "name the folder of a Llama model, fetched or exported whole"

# transformers' names of our parameters, and our names of its settings.
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
_SHAPE = {
    "vocab_size": "known_vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_sequence_length",
}
_FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


@dataclass(frozen=True)
class _Rope:
    """What config.json says of rotary positions, in version 5 or before."""

    rope_type: str | None = None
    type: str = "default"  # the older name of rope_type
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class _Shape:
    """What we read of config.json, with transformers' defaults."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None


@dataclass(frozen=True)
class ExportedText:
    """What a user of a model needs to know about its text."""

    max_positions: int  # tokens; transformers' max_position_embeddings
    tokenizer: Any = None  # tokenizers.Tokenizer, which encodes a prompt as training did
    bos_id: int | None = None  # token before a document
    eos_id: int | None = None  # token after a document
    source: str | None = None  # file or name that the tokenizer was read from

    @property
    def pad_id(self) -> int | None:
        """Token that fills up the shorter texts of a batch, under an attention mask of 0.

        The tokenizer's own token for it, else eos, else bos. It does not stand in config.json, by
        which transformers would leave its embedding out of any further training.
        """
        names = PAD_NAMES if self.tokenizer is not None else ()
        own = (self.tokenizer.token_to_id(name) for name in names)
        return next((each for each in (*own, self.eos_id, self.bos_id) if each is not None), None)

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids that there are, by transformers' names: bos, eos, pad."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        return {name: token_id for name, token_id in ids.items() if token_id is not None}

    @property
    def tokenizer_settings(self) -> dict[str, Any]:
        """What transformers has to know beside the tokenizer: prompts are padded on the left."""
        settings: dict[str, Any] = {"model_max_length": self.max_positions, "padding_side": "left"}
        for name, token_id in self.special_ids.items():
            settings[f"{name}_token"] = self.tokenizer.id_to_token(token_id)
        return settings


def hf_names(config: LlamaConfig) -> dict[str, str]:
    """Return transformers' name of each parameter, keyed by ours."""
    names = dict(_OUTSIDE_BLOCKS)
    if config.tie_embeddings:
        del names["output.weight"]
    for index in range(config.num_layers):
        for ours, theirs in _IN_BLOCK.items():
            names[f"layers.{index}.{ours}"] = f"model.layers.{index}.{theirs}"
    return names


def hf_config(config: LlamaConfig, text: ExportedText) -> dict[str, Any]:
    """Make config.json; rope_theta and rope_scaling are for readers older than version 5."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling.enabled:
        scaling = {key: getattr(config.rope_scaling, ours) for key, ours in _ROPE_SCALING.items()}
        rope = {"rope_type": "llama3", **scaling}
    return {
        "architectures": ["LlamaForCausalLM"],
        **_FIXED,
        **{key: getattr(config, ours) for key, ours in _SHAPE.items()},
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling.enabled else None,
        "max_position_embeddings": text.max_positions,
        "bos_token_id": text.bos_id,
        "eos_token_id": text.eos_id,
    }


def to_transformers(model: Llama, text: ExportedText, sentence: str) -> Any:
    """Make transformers' LlamaForCausalLM with a copy of the weights, on the same device.

    Args:
        model: holding its full, unsharded weights.
        text: whose ids and positions it gets.
        sentence: what needs transformers, where it is missing.

    Raises:
        InputError: transformers is missing, or the text's tokenizer does not fit the model.
    """
    if text.tokenizer is not None:
        _check_tokenizer(text.tokenizer, text.special_ids, model.config.known_vocab_size)
    with needs("huggingface", sentence):
        import transformers
    values = hf_config(model.config, text)
    for key in ("architectures", "model_type", "rope_theta", "rope_scaling"):
        del values[key]  # its own, or said by rope_parameters
    with model.embedding.weight.device:
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**values, attn_implementation="sdpa")
        )
    names = hf_names(model.config)
    state = {names[name]: value for name, value in model.state_dict().items()}
    # strict=False: transformers lists a tied output matrix a second time.
    problems = made.load_state_dict(state, strict=False)
    assert not problems.unexpected_keys, problems
    ids = {f"{name}_token_id": token_id for name, token_id in text.special_ids.items()}
    made.generation_config = transformers.GenerationConfig(**ids)
    return made.eval()


def transformers_tokenizer(text: ExportedText) -> Any:
    """Make transformers' tokenizer of a text that has one, as the exported folder gives it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=text.tokenizer, **text.tokenizer_settings)


def config_from_hf(values: dict[str, Any], source: Path) -> LlamaConfig:
    """Return the settings that a config.json describes; the model is named after its folder.

    Args:
        values: what config.json holds.
        source: its path.

    Raises:
        InputError: a key is missing, or asks for what Llama 3 does not have.
    """
    given = parse(_Shape, values, source=source, hint=HINT)
    rope = given.rope_parameters or given.rope_scaling or _Rope()
    if given.rope_parameters and given.rope_scaling:
        # Versions of transformers differ in which they read; ours write both.
        one, other = (
            replace(each, rope_type=each.rope_type or each.type, type="default", rope_theta=None)
            for each in (rope, given.rope_scaling)
        )
        if one != other:
            raise InputError(
                f"{source}: rope_parameters and rope_scaling differ, and versions of transformers "
                "read one or the other; leave one out"
            )
    head_dim = given.hidden_size // given.num_attention_heads if given.num_attention_heads else None
    for key, only in {**_FIXED, "head_dim": head_dim}.items():
        if (found := values.get(key)) not in (None, only):
            raise InputError(f"{source}: {key}={shortened(found)} is not supported; only {only}")
    rope_type = rope.rope_type or rope.type
    if rope_type not in ("default", "llama3"):
        raise InputError(
            f"{source}: rope_type={rope_type} is not supported; only default and llama3"
        )
    try:
        scaling = RopeScaling()
        if rope_type == "llama3":
            factors = {ours: getattr(rope, key) for key, ours in _ROPE_SCALING.items()}
            if None in factors.values():
                raise InputError(f"rope_type=llama3 needs {', '.join(_ROPE_SCALING)}; {HINT}")
            scaling = RopeScaling(enabled=True, **factors)
        return LlamaConfig(
            name=source.parent.name,
            dim=given.hidden_size,
            num_layers=given.num_hidden_layers,
            num_heads=given.num_attention_heads,
            num_kv_heads=given.num_key_value_heads or given.num_attention_heads,
            ffn_dim=given.intermediate_size,
            vocab_size=given.vocab_size,
            rope_theta=rope.rope_theta or given.rope_theta,
            rope_scaling=scaling,
            norm_eps=given.rms_norm_eps,
            tie_embeddings=given.tie_word_embeddings,
        )
    except InputError as error:  # a bound of ours: it names our setting
        raise InputError(f"{source}: {error}") from error


def export_hf_folder(
    model: Llama, folder: Path, text: ExportedText, card: str | None = None
) -> None:
    """Write a folder for LlamaForCausalLM.from_pretrained, whole or not at all.

    Args:
        model: holding its full, unsharded weights; they are written in their own dtype.
        folder: must not exist.
        text: tokenizer, and what config.json says of the text.
        card: the model card, which becomes README.md.

    Raises:
        InputError: the folder exists, or the tokenizer does not fit the model.
    """
    library = _safetensors()
    if folder.exists():
        raise InputError(f"--out {folder} exists already; name a new folder, or remove it first")
    ids = text.special_ids
    if text.tokenizer is not None:
        _check_tokenizer(text.tokenizer, ids, model.config.known_vocab_size)
    names = hf_names(model.config)
    tensors = {names[name]: value.contiguous() for name, value in model.state_dict().items()}
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    with whole_folder(folder) as unfinished:
        try:
            library.torch.save_file(tensors, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        except library.SafetensorError as error:  # of the system's error only the number is left
            if (number := re.search(r"os error (\d+)", str(error))) is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(folder)) from error
        write_json(unfinished / CONFIG_FILE, hf_config(model.config, text) | {"dtype": dtype})
        # safetensors writes for its owner's eyes only; everything else follows the umask.
        shutil.copymode(unfinished / CONFIG_FILE, unfinished / WEIGHTS_FILE)
        if ids:
            generation = {f"{name}_token_id": token_id for name, token_id in ids.items()}
            write_json(unfinished / "generation_config.json", generation)
        if text.tokenizer is not None:
            write_bytes(unfinished / TOKENIZER_FILE, text.tokenizer.to_str(pretty=True).encode())
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_bos_token": text.bos_id is not None,
                "add_eos_token": False,
            }
            write_json(unfinished / "tokenizer_config.json", settings | text.tokenizer_settings)
        if card is not None:
            write_bytes(unfinished / CARD_FILE, card.encode())


def _check_tokenizer(tokenizer: Any, ids: dict[str, int], vocab_size: int) -> None:
    """Refuse a tokenizer with ids beyond the model's, or without one of `ids`."""
    hint = "name the tokenizer of the data it was trained on"
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer has the id {largest}, which the model's model.vocab_size={vocab_size} "
            f"does not hold; {hint}"
        )
    for name, token_id in ids.items():
        if tokenizer.id_to_token(token_id) is None:
            raise InputError(f"the tokenizer has no token of {name}_id={token_id}; {hint}")


def load_hf_folder(folder: Path) -> Llama:
    """Read a model from a folder in transformers' format, with weights in one file or several.

    Returns:
        The model on the CPU, in float32.

    Raises:
        InputError: naming the file that is missing, damaged, or describes another architecture.
    """
    config = config_from_hf(read_json(folder / CONFIG_FILE, hint=HINT), folder / CONFIG_FILE)
    files = _weight_files(folder)
    # Before modules are made: a number in a file must not decide alone how many.
    total, stored = count_parameters(config).total, sum(file.stat().st_size for file in files)
    if total > stored:
        raise InputError(
            f"{folder / CONFIG_FILE} describes {total:,} parameters, but the weights take only "
            f"{stored:,} bytes; {HINT}"
        )
    names = hf_names(config)
    with torch.device("meta"):
        model = Llama(config)
    state = _read_state(files, names)
    for name, parameter in model.named_parameters():
        if state[name].shape != parameter.shape:
            raise InputError(
                f"{folder}: tensor {names[name]} has shape {list(state[name].shape)}, "
                f"but {CONFIG_FILE} says {list(parameter.shape)}"
            )
    model.load_state_dict(state, assign=True)
    return model


def _weight_files(folder: Path) -> list[Path]:
    """Find the safetensors of a folder, one or those that its index names; InputError if missing.

    Files of torch.save (pytorch_model.bin) are not read: they are pickles, which execute code.
    """
    index = folder / INDEX_FILE
    names = {WEIGHTS_FILE}
    if index.is_file():
        weight_map = read_json(index, hint=HINT).get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map) or not all(
            isinstance(name, str) and name.endswith(".safetensors") for name in weight_map.values()
        ):
            raise InputError(f"{index}: weight_map must name .safetensors files; {HINT}")
        names = set(weight_map.values())
    # In the cache of Hugging Face's hub the files of a snapshot are links to ../../blobs.
    root = folder.resolve().parents[1] if folder.resolve().parent.name == "snapshots" else None
    files = [named_file(name, index, root=root) for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing; weights are read from .safetensors alone; {HINT}")
    return files


def _read_state(files: list[Path], names: dict[str, str]) -> dict[str, Tensor]:
    """Read every parameter in float32, keyed by our names; exactly those of `names`."""
    ours = {theirs: name for name, theirs in names.items()}
    library = _safetensors()
    state: dict[str, Tensor] = {}
    for path in files:
        try:
            tensors = library.torch.load_file(path)
        except (OSError, library.SafetensorError) as error:
            raise InputError(f"{path} cannot be read as safetensors: {error}") from error
        for name, value in tensors.items():
            if name in ours:
                if not value.is_floating_point():
                    raise InputError(
                        f"{path}: tensor {name} is {value.dtype}; only floats are read"
                    )
                state[ours[name]] = value.to(torch.float32)
            # Old files also store what follows from the configuration, or a tied matrix twice.
            elif not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
                raise InputError(f"{path}: tensor {name} is not part of the Llama in {CONFIG_FILE}")
    missing = sorted(names[name] for name in names.keys() - state.keys())
    if missing:
        raise InputError(
            f"{files[0].parent}: tensor {missing[0]} is missing from its safetensors; {HINT}"
        )
    return state


def _safetensors() -> Any:
    """Import safetensors, which reads and writes the weights; InputError without it."""
    with needs("huggingface", "weights in Hugging Face's format need safetensors"):
        import safetensors.torch
    return safetensors

"""Models to and from the folders that transformers' LlamaForCausalLM reads and writes.

The folder holds model.safetensors and config.json; an exported one also the
tokenizer, if there is one.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gns_pretrain.errors import InputError
from gns_pretrain.files import read_json, write_json
from gns_pretrain.model.hf_config import ExportedText, config_from_hf, hf_config, hf_names
from gns_pretrain.model.llama import Llama

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

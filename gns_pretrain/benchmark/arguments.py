"""What the sub-commands share: how one is described, and its model."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gns_pretrain.composition import read_yaml
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, RopeScaling

MODEL_CONFIGS = Path(__file__).resolve().parents[2] / "conf" / "model"


class Command(NamedTuple):
    """A sub-command: its arguments, and what it measures with them."""

    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], Iterable[dict[str, Any]]]


def add_model(parser: argparse.ArgumentParser, default: str | None = "tiny") -> None:
    """`--model` and `--vocab-size`."""
    parser.add_argument(
        "--model", choices=model_names(), default=default, help="a file in conf/model"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="tokens, where the model leaves it to the data"
    )


def model_names() -> list[str]:
    """The files of conf/model."""
    return sorted(path.stem for path in MODEL_CONFIGS.glob("*.yaml"))


def model_config(name: str, vocab_size: int) -> LlamaConfig:
    """The shape in a file of conf/model."""
    values = read_yaml(MODEL_CONFIGS / f"{name}.yaml")
    del values["defaults"]
    scaling = RopeScaling(**values.pop("rope_scaling", {}))
    values["vocab_size"] = values.get("vocab_size") or vocab_size
    return LlamaConfig(**values, rope_scaling=scaling)


def require_at_least(arguments: argparse.Namespace, name: str, least: int) -> None:
    """Refuse a number that is too small."""
    value = getattr(arguments, name)
    if value < least:
        raise InputError(f"--{name.replace('_', '-')} {value} must be at least {least}")

"""What each parameter is in the model: the ground for optimizer groups and geometries."""

from enum import Enum, auto

from torch import nn

from gns_pretrain.errors import InputError


class Kind(Enum):
    """A parameter's role, by where it stands in the model and never by its shape."""

    EMBEDDING = auto()  # also when the output matrix is tied to it
    OUTPUT = auto()
    ATTENTION = auto()
    FEED_FORWARD = auto()
    NORM = auto()


_KIND_OF_PART = {
    "embedding": Kind.EMBEDDING,
    "output": Kind.OUTPUT,
    "attention": Kind.ATTENTION,
    "feed_forward": Kind.FEED_FORWARD,
    "attention_norm": Kind.NORM,
    "feed_forward_norm": Kind.NORM,
    "norm": Kind.NORM,
}


def parameter_kinds(model: nn.Module) -> dict[str, Kind]:
    """Kind of every parameter of a Llama, keyed and ordered as in named_parameters().

    Raises:
        InputError: a parameter that stands nowhere known.
    """
    return {name: _kind_of(name) for name, _ in model.named_parameters()}


def _kind_of(name: str) -> Kind:
    parts = [part for part in name.split(".") if part in _KIND_OF_PART]
    if len(parts) != 1:
        raise InputError(
            f"parameter {name} is of no known kind, so no optimizer group takes it; say what it is "
            "in gns_pretrain/model/parameters.py"
        )
    return _KIND_OF_PART[parts[0]]

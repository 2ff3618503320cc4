"""What each parameter of a model is, found by module and shape; any nn.Module.

The geometries and the optimizers of matrices go by these roles. The view of a weight as a matrix is
[shape[0], rest]: a convolution's [out, in / groups, kh, kw] is [out, in / groups * kh * kw].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, auto
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gns_pretrain.errors import InputError

Value = TypeVar("Value")

# Inserted into names by DDP, torch.compile and torch's activation checkpointing.
WRAPPER_NAMES = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module"})


class Role(Enum):
    """What a parameter is to a geometry or an optimizer."""

    MATRIX = auto()  # inside the model: what nuclear scales and spectral rules take as a matrix
    EMBEDDING = auto()  # of tokens or patches, also when the output matrix is tied to it
    OUTPUT = auto()  # the head's matrix
    NORM = auto()  # gain and bias of a normalization, found by its class's name
    OTHER = auto()  # other biases, positions, and what the user takes out of the matrices


# Which parameters are matrices: a function of name and parameter, patterns of names (as in
# fnmatch) that list all of them, or patterns with a yes or no that overrule the default.
MatrixChoice = Callable[[str, nn.Parameter], bool] | Sequence[str] | Mapping[str, bool]
# A label of each parameter's name: a function, or patterns of names with the label.
Labels = Callable[[str], str] | Mapping[str, str]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DDP and torch.compile, whose parameter names have no prefix."""
    # By attribute: to name torch.compile's class would import the compiler, which takes seconds.
    inner = model.module if isinstance(model, DistributedDataParallel) else _compiled(model)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def _compiled(model: nn.Module) -> nn.Module | None:
    return getattr(model, "_orig_mod", None)


def replicated(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DDP module that a model is, or that torch.compile wraps; None if there is none."""
    if isinstance(model, DistributedDataParallel):
        return model
    inner = _compiled(model)
    return replicated(inner) if inner is not None else None


def clean_name(name: str) -> str:
    """Return a parameter's name without what wrappers of inner modules insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def named_trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the parameters that require gradients, shared ones once, under clean names."""
    for name, parameter in unwrapped(model).named_parameters():
        if parameter.requires_grad:
            yield clean_name(name), parameter


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """Rows and columns of the parameter's view as a matrix; of the whole one where it is sharded.

    GPT-2's Conv1D has [in, out], which the noise scale does not see: a matrix and its transpose
    have the same singular values.
    """
    rows = parameter.shape[0] if parameter.ndim else 1
    return rows, parameter.numel() // max(rows, 1)


def transposed_weights(model: nn.Module) -> set[str]:
    """Return the clean names of trainable weights that are stored as [in, out].

    They are those of transposed convolutions and of transformers' Conv1D, found by its name.
    """
    found = {
        id(parameter)
        for module in unwrapped(model).modules()
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        or any(base.__name__ == "Conv1D" for base in type(module).__mro__)
        for parameter in module.parameters(recurse=False)
    }
    return {name for name, parameter in named_trainable(model) if id(parameter) in found}


def parameter_roles(model: nn.Module, matrices: MatrixChoice | None = None) -> dict[str, Role]:
    """Return the role of each trainable parameter by its clean name, in the model's order.

    By default a matrix is at least 2-dimensional, has two rows and two columns or more, and is
    neither an embedding nor the head. Embeddings are those of an nn.Embedding and what
    transformers' `get_input_embeddings` returns: of a vision transformer, the patches'. The head is
    what `get_output_embeddings` returns, else the last nn.Linear outside of a stack of layers.

    Args:
        model: plain, or parallelized by DDP, FSDP2 or parallelize_module.
        matrices: overrules the default, see `MatrixChoice`.

    Raises:
        InputError: a pattern matches no parameter, or what is chosen has fewer than 2 dimensions.
    """
    inner = unwrapped(model)
    embeddings = {
        id(parameter)
        for module in inner.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    if (entry := named_by(inner, "get_input_embeddings")) is not None:
        embeddings |= {id(parameter) for parameter in entry.parameters() if parameter.ndim > 1}
    head = {id(parameter) for parameter in head_of(inner)}
    norms = {
        id(parameter)
        for module in inner.modules()
        if is_norm(module)
        for parameter in module.parameters(recurse=False)
    }
    trainable = dict(named_trainable(model))

    def default(parameter: nn.Parameter) -> Role:
        if id(parameter) in embeddings:
            return Role.EMBEDDING
        if id(parameter) in norms:
            return Role.NORM
        if parameter.ndim < 2 or min(matrix_shape(parameter)) < 2:
            return Role.OTHER
        return Role.OUTPUT if id(parameter) in head else Role.MATRIX

    roles = {name: default(parameter) for name, parameter in trainable.items()}
    for name, chosen in chosen_matrices(trainable, matrices).items():
        if chosen and trainable[name].ndim < 2:
            raise InputError(
                f"matrices chooses {name}, whose shape is {list(trainable[name].shape)}; a matrix "
                "has at least 2 dimensions"
            )
        if chosen:
            roles[name] = Role.MATRIX
        elif roles[name] is Role.MATRIX:
            roles[name] = Role.OTHER
    return roles


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization: LayerNorm, BatchNorm2d, LlamaRMSNorm, ..."""
    names = (base.__name__.rstrip("123d") for base in type(module).__mro__)
    return any(name.endswith("Norm") for name in names)


def chosen_matrices(
    parameters: Mapping[str, nn.Parameter], matrices: MatrixChoice | None
) -> dict[str, bool]:
    """Return what the user says of each parameter; parameters left to the default are missing."""
    if matrices is None:
        return {}
    if isinstance(matrices, str):  # a sequence too, of letters
        raise InputError(f"matrices={matrices!r} is one name; use a list of patterns")
    if callable(matrices):
        return {name: bool(matrices(name, parameter)) for name, parameter in parameters.items()}
    if isinstance(matrices, Mapping):
        return by_pattern(list(parameters), matrices, "matrices")
    return dict.fromkeys(parameters, False) | by_pattern(
        list(parameters), dict.fromkeys(matrices, True), "matrices"
    )


def by_pattern(
    names: Sequence[str], patterns: Mapping[str, Value], argument: str
) -> dict[str, Value]:
    """Return the value of the first pattern that matches each name; names without one are missing.

    Raises:
        InputError: a pattern matches nothing, which is most often a misspelling.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"{argument} has the pattern {pattern!r}, which matches no trainable parameter; "
                f"their names are like {', '.join(list(names)[:3])}"
            )
    matches = {
        name: [value for pattern, value in patterns.items() if fnmatchcase(name, pattern)]
        for name in names
    }
    return {name: values[0] for name, values in matches.items() if values}


def labels_of(names: Sequence[str], labels: Labels, argument: str) -> dict[str, str]:
    """Return each name's label; names that no pattern matches are missing."""
    if callable(labels):
        return {name: labels(name) for name in names}
    return by_pattern(names, labels, argument)


def named_by(model: nn.Module, method: str) -> nn.Module | None:
    """Return the module that a method of transformers' names; None where a model has none."""
    find = getattr(model, method, None)
    try:
        found = find() if callable(find) else None
    except NotImplementedError:  # transformers' way to say that a model has none
        return None
    return found if isinstance(found, nn.Module) else None


def head_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the module that makes a model's output; none if it is not found."""
    head = named_by(model, "get_output_embeddings")
    if head is None:
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        if not linears or layer_of(model, linears[-1]) is not None:
            return []
        head = model.get_submodule(linears[-1])
    return list(head.parameters(recurse=False))


def layer_of(model: nn.Module, name: str) -> str | None:
    """Return the layer, of a stack of them, that contains a module or parameter; None if none does.

    A stack is an nn.ModuleList or an nn.Sequential; its items are layers if they have children, and
    in an nn.Sequential if two of them are of one class.
    """
    parts = name.split(".")
    module = model
    for depth, part in enumerate(parts):
        parent, child = module, getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
        if depth + 1 == len(parts) or not any(unwrapped(module).children()):
            continue
        alike = sum(type(item) is type(module) for item in parent.children())
        if isinstance(parent, nn.ModuleList) or (isinstance(parent, nn.Sequential) and alike > 1):
            return ".".join(parts[: depth + 1])
    return None


def blocks_of(model: nn.Module, blocks: Labels | Sequence[str] | None = None) -> dict[str, str]:
    """Return the block of each trainable parameter: those whose gradients come close together.

    By default the layer of a stack (`layers.3`) that contains it, else its module.

    Args:
        model: as in `parameter_roles`.
        blocks: overrules the default: a function of the name, patterns with the block's name, or a
            list of patterns each of which is a block.
    """
    inner = unwrapped(model)
    found = {}
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad:
            layer = layer_of(inner, name) or name.rpartition(".")[0] or name
            found[clean_name(name)] = clean_name(layer)
    if blocks is None:
        return found
    if isinstance(blocks, str):
        raise InputError(f"blocks={blocks!r} is one name; use a list of patterns")
    if not callable(blocks) and not isinstance(blocks, Mapping):
        blocks = {pattern: pattern for pattern in blocks}
    return found | labels_of(list(found), blocks, "blocks")

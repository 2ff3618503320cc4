"""How far a few steps move each layer's outputs, by width: behind `gns-pretrain coordinate-check`.

For each width a run's model is built anew and takes the run's first steps at its peak learning
rate. Where learning rates transfer, the outputs change by as much at any width (arXiv:2203.03466,
Appendix D.1).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from gns_pretrain.config.checks import check_parametrization
from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError
from gns_pretrain.fields import About, Settings, at_least
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.width import scale_learning_rates
from gns_pretrain.parallel.mesh import World
from gns_pretrain.training.step import train_step
from gns_pretrain.workloads import open_workload

LIMIT = 0.3  # of an exponent that counts as 0: widths are finite


@dataclass
class CoordinateCheckRequest(Settings):
    """The options of `gns-pretrain coordinate-check`."""

    section: ClassVar[str] = "--"

    settings: Annotated[
        list[str], About("a run's, as `gns-pretrain train` takes them", positional=True)
    ] = field(default_factory=list)
    widths: Annotated[list[int], at_least(1), About("model.dim (default: 64 128 256 512)")] = field(
        default_factory=lambda: [64, 128, 256, 512]
    )
    steps: Annotated[int, at_least(1), About("optimizer steps")] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.widths)) < 2:
            raise InputError(f"--widths={self.widths[0]} is one width; give two or more")


@dataclass(frozen=True)
class Change:
    """How far the outputs of one kind of layer have moved."""

    layer: str
    widths: list[int]
    rms: list[float]  # at each width: root mean square over all outputs of all layers of the kind

    @property
    def exponent(self) -> float:
        """Least-squares p of rms ~ width^p: 0 where learning rates transfer."""
        x = torch.tensor(self.widths, dtype=torch.float64).log()
        y = torch.tensor(self.rms, dtype=torch.float64).log()
        x -= x.mean()
        return float((x @ y) / x.square().sum())


def coordinate_check(config: Config, request: CoordinateCheckRequest) -> list[Change]:
    """Measure each width on one process, on the CPU.

    Raises:
        InputError: the model is no Llama or cannot have one of the widths, or its optimizer has no
            learning rates for them.
    """
    shape = config.model
    if not isinstance(shape, LlamaConfig):
        raise InputError(
            f"model.name={shape.name} is no Llama, whose widths a coordinate check compares; use "
            "workload=language"
        )
    runs = [
        replace(config, model=shape.of_width(width), compile="never") for width in request.widths
    ]
    for run in runs:
        check_parametrization(run)
    changes = [changes_of(run, request.steps) for run in runs]
    return [
        Change(layer, request.widths, [at_width[layer] for at_width in changes])
        for layer in changes[0]
    ]


def changes_of(config: Config, steps: int) -> dict[str, float]:
    """Train one width; return the root mean square of each kind of layer's change."""
    torch.manual_seed(config.seed)
    workload = open_workload(config)
    world = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")
    model = workload.build_model(world)
    assert isinstance(model, Llama)
    optimizer = scale_learning_rates(
        config.optimizer.build(model), model, workload.model.relative_width
    )
    workload.begin(world)
    split = {
        "batch_size": config.batch_size.initial,
        "micro_batch_size": config.micro_batch_size,
    }
    tokens, _ = next(workload.micro_batches(0, **split))
    before = outputs_of(model, tokens)
    for step in range(steps):
        train_step(
            model,
            optimizer,
            workload.micro_batches(step * config.batch_size.initial, **split),
            accumulation=config.batch_size.initial // config.micro_batch_size,
            gradient_clip=config.gradient_clip,
            batch_size=config.batch_size.initial,
        )
    after = outputs_of(model, tokens)
    workload.close()
    return {layer: (after[layer] - before[layer]).square().mean().sqrt().item() for layer in after}


@torch.no_grad()
def outputs_of(model: Llama, tokens: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the embedding, of all blocks' parts and of the model, float64."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(layer: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.setdefault(layer, []).append(output)

    modules: list[tuple[str, nn.Module]] = [("embedding", model.embedding)]
    modules += [
        (part, getattr(block, part))
        for block in model.layers
        for part in ("attention", "feed_forward")
    ]
    hooks = [module.register_forward_hook(keep(layer)) for layer, module in modules]
    outputs["logits"] = [model(tokens)]
    for hook in hooks:
        hook.remove()
    return {layer: torch.stack(each).double() for layer, each in outputs.items()}

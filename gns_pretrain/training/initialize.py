"""Beginning a run from something trained: a checkpoint, a run, or a Hugging Face Llama folder.

    init.what=weights   the weights; steps, tokens and optimizer state begin anew
    init.what=all       also optimizer state, noise averages and the count of steps and tokens,
                        which is the position in the data, as if the run went on

Hyperparameters, schedule, budget and layout are the new run's own.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, one_of, path_name
from gns_pretrain.model.huggingface import CONFIG_FILE, HINT, config_from_hf, load_hf_folder
from gns_pretrain.model.settings import ModelSettings
from gns_pretrain.optim.averaging import AveragingOptimizer, two_faced
from gns_pretrain.optim.combined import rules_of
from gns_pretrain.parallel.mesh import World
from gns_pretrain.system.files import read_json, sha256_of, shortened
from gns_pretrain.training.checkpoint_reader import (
    load_checkpoint,
    load_tensors,
    stored_model,
)
from gns_pretrain.training.checkpoint_writer import MANIFEST, TRAIN_STATE
from gns_pretrain.training.trained_model import find_checkpoint
from gns_pretrain.training.workload import Workload

# Of a model's settings, what does not change what its weights compute.
NOT_OF_THE_WEIGHTS = ("name", "activation_checkpointing", "parametrization", "mup_base_dim")


@dataclass
class InitSettings(Settings):
    """What a run begins from; random weights by default."""

    section: ClassVar[str] = "init"

    # init.from, which Python does not take for a name: a step_* folder, a run directory (its newest
    # whole checkpoint) or a Hugging Face Llama folder
    source: Annotated[str | None, path_name()] = None
    # all: also optimizer state, noise averages and the position in the data
    what: Annotated[str, one_of("weights", "all")] = "weights"


@dataclass(frozen=True)
class Source:
    """What was found at `init.from`."""

    folder: Path  # absolute; of a run, the checkpoint that was chosen
    is_hf: bool
    model: ModelSettings
    state: dict[str, Any]  # of a checkpoint: position and averages
    sha256: str  # of its manifest, which has those of its files; of a Hugging Face config.json

    @property
    def step(self) -> int | None:
        """Optimizer steps behind it, where that is known."""
        return self.state.get("step")

    def as_record(self, settings: InitSettings) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "from": str(self.folder),
            "what": settings.what,
            "step": self.step,
            "sha256": self.sha256,
        }


def find_source(settings: InitSettings) -> Source | None:
    """Find what a run begins from; None where it begins from random weights.

    A checkpoint's files are compared with its manifest, which reads them all.

    Raises:
        InputError: there is nothing of the kind, or it is not whole.
    """
    if settings.source is None:
        if settings.what != "weights":
            raise InputError(
                f"init.what={settings.what} needs something to go on from; give init.from=... too"
            )
        return None
    given = Path(settings.source).resolve()
    name = f"init.from={settings.source}"
    if (config_file := given / CONFIG_FILE).is_file():
        if settings.what != "weights":
            raise InputError(
                f"{name} is a Hugging Face folder, which has weights alone; use init.what=weights"
            )
        shape = config_from_hf(read_json(config_file, hint=HINT), config_file)
        return Source(given, True, shape, {}, sha256_of(config_file))
    folder = find_checkpoint(given, name)
    state = read_json(folder / TRAIN_STATE, hint="name an older checkpoint")
    return Source(folder, False, stored_model(folder), state, sha256_of(folder / MANIFEST))


def check_source(
    settings: InitSettings,
    source: Source,
    workload: Workload,
) -> None:
    """Raise InputError if a run cannot begin from what was found.

    Args:
        workload: of the run; its budget includes the source's samples where it goes on.
    """
    if source.model.kind != workload.model.kind:
        raise InputError(
            f"init.from={settings.source} is another model: {source.model.name} (here "
            f"{workload.model.name}); use its model"
        )
    theirs, ours = asdict(source.model), asdict(workload.model)
    differing = [
        name for name in ours if name not in NOT_OF_THE_WEIGHTS and ours[name] != theirs[name]
    ]
    if differing:
        shown = ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in differing)
        settings_ = " ".join(
            f"model.{name}={theirs[name]}" for name in differing if name != "rope_scaling"
        )
        hint = f"use {settings_}" if settings_ else "use its rotary scaling"
        if "vocab_size" in differing:  # that of the data, where none is set
            hint += ", or data= of its tokenizer"
        raise InputError(f"init.from={settings.source} is another model: {shown}; {hint}")
    if settings.what != "all":
        return
    samples, count, unit = source.state["samples"], source.state["tokens"], workload.unit
    if unit.of(samples) != count:
        raise InputError(
            f"init.from={settings.source} was trained on sequences of {count // samples} tokens, "
            f"data.sequence_length={unit.per_sample}, and with init.what=all its count of "
            "sequences goes on; use its length, or init.what=weights"
        )
    if workload.budget <= count:
        name = "token_budget" if unit.name == "tokens" else "the budget of images"
        raise InputError(
            f"{name}={workload.budget:,} includes the {count:,} {unit.noun} of init.from="
            f"{settings.source}, with init.what=all, and leaves none to train on; use a larger one"
        )


def begin_from(
    source: Source,
    settings: InitSettings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
) -> dict[str, Any] | None:
    """Load what the settings ask for, on all ranks together.

    Returns:
        The source's state to go on from, None where only weights are taken.

    Raises:
        InputError: with init.what=all, the optimizer of the source was another one.
    """
    if source.is_hf:
        whole = load_hf_folder(source.folder).state_dict()
        set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
        return None
    if settings.what == "weights":
        tensors = {"model": get_model_state_dict(model)}
        load_tensors(tensors, source.folder, world)
        set_model_state_dict(model, tensors["model"])
        return None
    foreign = [f for f in two_faced(optimizer) if not isinstance(f, AveragingOptimizer)]
    if foreign:
        raise InputError(
            f"init.what=all: {type(foreign[0]).__name__} may keep counts of its average among its "
            "hyperparameters, which are the new run's own; use init.what=weights",
            on_all_ranks=True,
        )
    ours = rules_of(optimizer)
    # Checkpoints of before this entry are compared by the names of their tensors alone.
    if (theirs := source.state.get("optimizer", ours)) != ours:
        raise InputError(
            f"init.from={settings.source} cannot be gone on from with this optimizer "
            f"({shortened(ours)}; the source's state is of {shortened(theirs)}); use its "
            "optimizer, or init.what=weights",
            on_all_ranks=True,
        )
    try:
        return load_checkpoint(source.folder, model, optimizer, world, hyperparameters=False)
    except InputError as error:
        raise InputError(
            f"init.from={settings.source} cannot be gone on from with this optimizer ({error}); "
            "use its optimizer, or init.what=weights",
            on_all_ranks=True,
        ) from error

"""Every YAML file composes, passes the checks, and builds what it names."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from gns_pretrain.build import OPTIMIZERS, as_yaml, settings_from
from gns_pretrain.config import Config, register_schemas
from gns_pretrain.distributed.mesh import World
from gns_pretrain.distributed.noise_meter import NoiseMeter
from gns_pretrain.model.llama import Llama, count_parameters
from tests.settings import odd_model

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent != CONF
)
ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")
# Values that a user has to give.
GIVEN = {
    ("data", "shards"): ["data.path=somewhere"],
    ("optimizer", "custom"): ["optimizer.class_path=torch.optim.NAdam"],
}


def composed(*overrides: str) -> Config:
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return settings_from(compose("train", overrides=list(overrides)))


def test_default_run_composes_and_names_itself():
    config = composed()
    assert config.run_name == "tiny-adamw-seed0"
    assert config.token_budget > 0


@pytest.mark.parametrize(
    ("group", "choice"), CHOICES, ids=[f"{group}-{choice}" for group, choice in CHOICES]
)
def test_file_composes(group, choice):
    config = composed(f"{group}={choice}", *GIVEN.get((group, choice), []))
    assert as_yaml(config)


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "model"])
def test_model_builds_with_the_parameters_it_says(choice):
    shape = composed(f"model={choice}", "model.vocab_size=128256").model
    with torch.device("meta"):
        model = Llama(shape)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(shape).total


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "optimizer"])
def test_optimizer_builds_over_all_parameters(choice):
    settings = composed(f"optimizer={choice}", *GIVEN.get(("optimizer", choice), [])).optimizer
    model = Llama(odd_model())
    model.init_weights(seed=0)
    optimizer = OPTIMIZERS[type(settings)](model, settings)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "noise_scale"])
def test_noise_scale_builds_a_meter(choice):
    settings = composed(f"noise_scale={choice}").noise_scale
    model = Llama(odd_model())
    assert len(NoiseMeter(model, ALONE, settings).tap.weights) == len(list(model.parameters()))

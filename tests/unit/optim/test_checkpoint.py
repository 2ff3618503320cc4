"""Every rule resumes bit for bit from a checkpoint, those without state too."""

from pathlib import Path

import pytest
import torch

from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.adago import AdaGOSettings
from gns_pretrain.optim.adagrad_norm import AdaGradNormSettings
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.optim.base import OptimizerSettings, keep_token_half_life, remember_peaks
from gns_pretrain.optim.custom import CustomSettings
from gns_pretrain.optim.sgd import SGDSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings, SpecSGDSettings
from gns_pretrain.optim.subset_norm import SubsetNormSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.training.checkpoint import Checkpoints
from tests.settings import odd_model

ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")
SETTINGS: dict[str, OptimizerSettings] = {
    "sgd": SGDSettings(),
    "sgd_momentum": SGDSettings(momentum=0.9),
    "signsgd": SignumSettings(momentum=0.0),
    "signum": SignumSettings(),
    "adamw": AdamWSettings(),
    "specsgd": SpecSGDSettings(),
    "muon": MuonSettings(),
    "adago": AdaGOSettings(),
    "adagrad": CustomSettings(class_path="torch.optim.Adagrad"),
    "adagrad_norm": AdaGradNormSettings(),
    "subset_norm": SubsetNormSettings(refresh_every=3),
    "nadam": CustomSettings(class_path="torch.optim.NAdam"),
}


def built(settings: OptimizerSettings) -> tuple[Llama, torch.optim.Optimizer]:
    model = Llama(odd_model())
    model.init_weights(seed=0)
    optimizer = settings.build(model)
    remember_peaks(optimizer)
    keep_token_half_life(optimizer, 8, beta2=(0.9, 0.9999))
    return model, optimizer


def stepped(model: Llama, optimizer: torch.optim.Optimizer, steps: int) -> None:
    tokens = torch.arange(17).view(1, 17)
    for _ in range(steps):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_rule_resumes_bit_for_bit(name: str, tmp_path: Path):
    model, optimizer = built(SETTINGS[name])
    stepped(model, optimizer, 2)
    state = {"step": 2}
    checkpoints = Checkpoints(tmp_path, keep=1, world=ALONE)
    checkpoints.save(model, optimizer, state)
    twin, other = built(SETTINGS[name])
    assert checkpoints.load_latest(twin, other) == (state, [])
    for group, loaded in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in loaded.items() if k != "params"
        }
    stepped(model, optimizer, 2)
    stepped(twin, other, 2)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)

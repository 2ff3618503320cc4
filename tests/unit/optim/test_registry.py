"""An optimizer is one settings class and one YAML."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.register import register_configs
from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim import OPTIMIZERS, OptimizerSettings
from gns_pretrain.optim.base import Beta
from tests.settings import odd_model

CONF = Path(__file__).parents[3] / "gns_pretrain" / "conf"
YAML = """
defaults: [schema_heavy_ball, _self_]
name: heavy_ball
lr: 0.5
"""


@pytest.fixture
def heavy_ball(tmp_path: Path) -> Iterator[Path]:
    """A folder with the YAML of an optimizer that the test defines."""

    @dataclass
    class HeavyBallSettings(OptimizerSettings):
        name: str = "heavy_ball"
        momentum: Beta = 0.9

        def build(self, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameter_groups(model), lr=self.lr, momentum=self.momentum)

    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "heavy_ball.yaml").write_text(YAML)
    yield tmp_path
    del OPTIMIZERS["heavy_ball"]


def test_every_file_of_the_package_registers_its_optimizers():
    assert OPTIMIZERS.keys() == {
        *("adago", "adagrad_norm", "adamw", "custom", "muon"),
        *("sgd", "signum", "specsgd", "subset_norm"),
    }


def test_class_and_yaml_make_an_optimizer_that_runs_are_composed_with(heavy_ball: Path):
    register_configs()
    words = [f"hydra.searchpath=[file://{heavy_ball}]", "optimizer=heavy_ball"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = settings_from(compose("train", words), words).optimizer
        with pytest.raises(InputError, match=r"optimizer\.momentum=1\.0 .*below 1"):
            settings_from(compose("train", [*words, "optimizer.momentum=1.0"]), words)
    model = Llama(odd_model())
    optimizer = settings.build(model)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.5, 0.9)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))

"""Every file of conf/optimizer composes, and builds what it says."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir  # noqa: TID251

from gns_pretrain.build import OPTIMIZERS, settings_from
from gns_pretrain.config import Config, register_schemas
from gns_pretrain.errors import InputError
from gns_pretrain.model.llama import Llama
from tests.settings import odd_model

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))
NEEDED = {"custom": ["optimizer.class_path=torch.optim.NAdam"]}


def composed(*words: str) -> Config:
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return settings_from(compose("train", list(words)))


@pytest.mark.parametrize("name", NAMES)
def test_file_composes_and_builds(name):
    settings = composed(f"optimizer={name}", *NEEDED.get(name, [])).optimizer
    assert settings.name == name
    model = Llama(odd_model())
    model.init_weights(seed=0)
    optimizer = OPTIMIZERS[type(settings)](model, settings)
    assert optimizer.param_groups[0]["lr"] == settings.lr


def test_nested_and_free_settings_reach_the_optimizer():
    muon = composed("optimizer=muon", "optimizer.adamw.beta2=0.5").optimizer
    assert muon.adamw.beta2 == 0.5
    custom = composed(
        "optimizer=custom",
        "optimizer.class_path=torch.optim.NAdam",
        "optimizer.kwargs={momentum_decay: 0.01}",
    ).optimizer
    assert custom.kwargs == {"momentum_decay": 0.01}


def test_custom_without_a_class_path_asks_for_one():
    with pytest.raises(InputError, match=r"optimizer\.class_path has no value"):
        composed("optimizer=custom")

"""Optimizer settings as people type them."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.register import register_configs
from gns_pretrain.config.schema import Config
from gns_pretrain.errors import InputError

CONF = Path(__file__).parents[3] / "gns_pretrain" / "conf"
NAMES = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))
NADAM = "optimizer.class_path=torch.optim.NAdam"


def composed(*words: str) -> Config:
    register_configs()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return settings_from(compose("train", list(words)), words)


@pytest.mark.parametrize("name", NAMES)
def test_run_is_named_after_the_file(name):
    custom = name == "custom"
    config = composed(f"optimizer={name}", *([NADAM] if custom else []))
    assert config.optimizer.name == name
    more = "-class_path_torch.optim.NAdam" if custom else ""
    assert config.run_name == f"tiny-{name}-seed0{more}"


def test_nested_and_free_settings_are_taken():
    assert composed("optimizer=muon", "optimizer.adamw.beta2=0.5").optimizer.adamw.beta2 == 0.5
    custom = composed("optimizer=custom", NADAM, "optimizer.kwargs={momentum_decay: 0.01}")
    assert custom.optimizer.kwargs == {"momentum_decay": 0.01}


@pytest.mark.parametrize(
    "word",
    ["gradient_clip=nan", "gradient_clip=inf", "gradient_clip=0", "optimizer.lr=nan"],
)
def test_number_that_no_step_can_use_is_refused_before_a_run_has_a_folder(word):
    with pytest.raises(InputError, match=word.split("=")[0] + r"=.* must be positive and finite"):
        composed(word)


def test_custom_without_a_class_path_asks_for_one():
    with pytest.raises(InputError, match=r"optimizer\.class_path has no value"):
        composed("optimizer=custom")

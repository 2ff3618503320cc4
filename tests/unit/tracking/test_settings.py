import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.tracking.settings import MetricsSettings, WandbSettings


def test_settings_name_the_one_that_is_wrong():
    with pytest.raises(InputError, match=r"metrics\.log_every=0 "):
        MetricsSettings(log_every=0)
    with pytest.raises(InputError, match=r"metrics\.progress=False .*auto, always, never"):
        MetricsSettings(progress="False")  # what YAML makes of a bare `off`
    with pytest.raises(InputError, match=r"metrics\.wandb\.mode=ofline .*offline"):
        WandbSettings(mode="ofline")
    with pytest.raises(InputError, match=r"metrics\.wandb\.project is empty"):
        WandbSettings(project="")


def test_nothing_leaves_the_machine_by_default():
    settings = MetricsSettings()
    assert not settings.wandb.enabled
    assert not settings.tensorboard

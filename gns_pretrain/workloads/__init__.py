"""What runs train on: one class for each kind of data, behind one interface."""

from gns_pretrain.config.schema import Config
from gns_pretrain.data.image_settings import ImageDataSettings
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.resnet import ResNetConfig
from gns_pretrain.model.simple_vit import SimpleViTConfig
from gns_pretrain.training.workload import Workload
from gns_pretrain.workloads.images import ImageWorkload
from gns_pretrain.workloads.language import LanguageWorkload


def open_workload(config: Config) -> Workload:
    """Open the data of a run, and check it beside the run's settings.

    Raises:
        InputError: the data is missing or damaged, or the model is not made for it.
    """
    if isinstance(config.data, DataSettings) and isinstance(config.model, LlamaConfig):
        return LanguageWorkload(config, config.data, config.model)
    if isinstance(config.data, ImageDataSettings) and isinstance(
        config.model, SimpleViTConfig | ResNetConfig
    ):
        return ImageWorkload(config, config.data, config.model)
    raise InputError(
        f"model.name={config.model.name} is not made for data.path={config.data.path}; choose both "
        "by one workload=..."
    )

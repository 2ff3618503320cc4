"""The models that runs train, by kind."""

from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.resnet import ResNetConfig
from gns_pretrain.model.settings import ModelSettings
from gns_pretrain.model.simple_vit import SimpleViTConfig

MODELS: dict[str, type[ModelSettings]] = {
    settings.kind: settings for settings in (LlamaConfig, SimpleViTConfig, ResNetConfig)
}

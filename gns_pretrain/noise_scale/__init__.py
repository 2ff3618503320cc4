"""Gradient noise scales in three geometries (arXiv:2602.03001) of any model, while it trains."""

from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.noise_scale.settings import NoiseScaleSettings

__all__ = ["Measurement", "NoiseMeter", "NoiseScaleSettings", "Reading"]

"""Stochastic spectral descent: Muon without momentum, the nuclear geometry's own step."""

from dataclasses import dataclass

from torch import nn

from gns_pretrain.optim.composite import Composite
from gns_pretrain.optim.spectral import SpectralSettings, build_spectral


@dataclass
class SpecSGDSettings(SpectralSettings):
    """Settings of specSGD (arXiv:2602.03001, Section 2.1): no momentum."""

    name: str = "specsgd"


def build_specsgd(model: nn.Module, settings: SpecSGDSettings) -> Composite:
    """specSGD for a model that is already laid over ranks."""
    return build_spectral(model, settings)

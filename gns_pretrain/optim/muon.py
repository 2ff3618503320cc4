"""Muon: the orthogonalised Nesterov momentum of each block matrix, AdamW for the rest."""

from dataclasses import dataclass

from torch import nn

from gns_pretrain.optim.composite import Composite
from gns_pretrain.optim.spectral import SpectralSettings, build_spectral


@dataclass
class MuonSettings(SpectralSettings):
    """Settings of Muon as the paper runs it (arXiv:2602.03001, Section 2.1)."""

    name: str = "muon"
    momentum: float = 0.95  # the paper searches 0.7 to 0.999
    nesterov: bool = True


def build_muon(model: nn.Module, settings: MuonSettings) -> Composite:
    """Muon for a model that is already laid over ranks."""
    return build_spectral(model, settings)

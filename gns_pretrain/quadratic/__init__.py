"""A noisy quadratic, whose losses and noise scales are known, to try policies and optimizers on."""

from gns_pretrain.quadratic.problem import NoisyQuadratic, QuadraticModel, QuadraticSettings
from gns_pretrain.quadratic.simulation import Runs, simulate

__all__ = ["NoisyQuadratic", "QuadraticModel", "QuadraticSettings", "Runs", "simulate"]

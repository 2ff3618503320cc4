"""Optimizers, one a file: a torch.optim.Optimizer, and a settings class that builds it."""

import importlib
import pkgutil

from gns_pretrain.optim.adago import AdaGO
from gns_pretrain.optim.adagrad_norm import AdaGradNorm
from gns_pretrain.optim.averaging import AveragingOptimizer, averaged_weights
from gns_pretrain.optim.base import OPTIMIZERS, OptimizerSettings
from gns_pretrain.optim.combined import CombinedOptimizer, split_parameters
from gns_pretrain.optim.sgd import SGD
from gns_pretrain.optim.signum import SignSGD, Signum
from gns_pretrain.optim.spectral import Muon, SpecSGD
from gns_pretrain.optim.subset_norm import SubsetNorm

for _module in pkgutil.iter_modules(__path__):  # importing a file registers its optimizers
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "AdaGO",
    "AdaGradNorm",
    "AveragingOptimizer",
    "CombinedOptimizer",
    "Muon",
    "OptimizerSettings",
    "SignSGD",
    "Signum",
    "SpecSGD",
    "SubsetNorm",
    "averaged_weights",
    "split_parameters",
]

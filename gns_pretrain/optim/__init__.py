"""Optimizers, one a file: each is a settings class that checks, documents and builds it."""

import importlib
import pkgutil

from gns_pretrain.optim.base import OPTIMIZERS, OptimizerSettings

for _module in pkgutil.iter_modules(__path__):  # importing a file registers its optimizers
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OPTIMIZERS", "OptimizerSettings"]

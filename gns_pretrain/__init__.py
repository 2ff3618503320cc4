"""Pretrain Llama 3 and let the measured gradient noise scale choose the batch size.

For a training loop of your own: `from gns_pretrain import NoiseMeter`, which needs torch and numpy.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gns_pretrain.batch_size import (
        AdaptiveBatchSize,
        BatchSizeSettings,
        Decision,
        PolicySettings,
        ShadowSettings,
    )
    from gns_pretrain.errors import InputError
    from gns_pretrain.model import Role, parameter_roles
    from gns_pretrain.noise_scale import Measurement, NoiseMeter, NoiseScaleSettings, Reading
    from gns_pretrain.optim import (
        AveragingOptimizer,
        CombinedOptimizer,
        Muon,
        SignSGD,
        Signum,
        SpecSGD,
        averaged_weights,
        split_parameters,
    )
else:
    from importlib import import_module

    def __getattr__(name: str) -> object:
        """Import a name of `__all__` when it is first used: the commands start without torch."""
        if name in __all__:
            for package in ("errors", "noise_scale", "batch_size", "optim", "model"):
                module = import_module(f"{__name__}.{package}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "AdaptiveBatchSize",
    "AveragingOptimizer",
    "BatchSizeSettings",
    "CombinedOptimizer",
    "Decision",
    "InputError",
    "Measurement",
    "Muon",
    "NoiseMeter",
    "NoiseScaleSettings",
    "PolicySettings",
    "Reading",
    "Role",
    "ShadowSettings",
    "SignSGD",
    "Signum",
    "SpecSGD",
    "averaged_weights",
    "parameter_roles",
    "split_parameters",
]

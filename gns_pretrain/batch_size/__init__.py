"""How many samples an optimizer step takes: policies, the sizes that ranks can take, decisions.

No collectives, no configuration library, no logging.
"""

from gns_pretrain.batch_size.controller import AdaptiveBatchSize, Decision
from gns_pretrain.batch_size.policies import PolicySettings
from gns_pretrain.batch_size.settings import BatchSizeSettings, ShadowSettings

__all__ = [
    "AdaptiveBatchSize",
    "BatchSizeSettings",
    "Decision",
    "PolicySettings",
    "ShadowSettings",
]

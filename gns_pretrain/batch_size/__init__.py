"""How many sequences an optimizer step takes: policies, the sizes that ranks can take, decisions.

No collectives, no configuration library, no logging.
"""

from gns_pretrain.batch_size.settings import BatchSizeSettings

__all__ = ["BatchSizeSettings"]

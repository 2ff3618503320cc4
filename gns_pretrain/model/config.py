"""Settings of a Llama 3 model, and the number of parameters that they make."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, NamedTuple

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, at_least, one_of, positive
from gns_pretrain.model.settings import ModelSettings, check_heads

Count = Annotated[int, at_least(1)]
Positive = Annotated[float, positive()]


@dataclass
class RopeScaling(Settings):
    """Llama-3.1 scaling of the rotary frequencies for contexts beyond the pretrained one.

    The defaults are those of Llama-3.1 (and of the paper); Llama-3.2 has factor 32. transformers'
    names for the last three: low_freq_factor, high_freq_factor, original_max_position_embeddings.
    """

    section: ClassVar[str] = "model.rope_scaling"

    enabled: bool = False
    factor: Annotated[
        float,
        positive(),
        at_least(1, hint="Llama-3.1 has 8, and model.rope_scaling.enabled=false turns scaling off"),
    ] = 8.0  # slow rotations are slowed down by this much
    low_frequency_factor: Positive = 1.0  # below this many turns in the original context: slowed
    high_frequency_factor: Positive = 4.0  # above this many: unchanged
    original_sequence_length: Count = 8192  # tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise InputError(
                f"model.rope_scaling.high_frequency_factor={self.high_frequency_factor} is not "
                f"above model.rope_scaling.low_frequency_factor={self.low_frequency_factor}; "
                "Llama-3.1 has 4 and 1"
            )


@dataclass
class LlamaConfig(ModelSettings):
    """A Llama 3 model; the files in conf/model are instances."""

    kind: ClassVar[str] = "llama"

    dim: Count  # width of the residual stream
    num_layers: Count  # transformer blocks
    num_heads: Count  # query heads
    num_kv_heads: Count  # key and value heads; fewer than query heads: grouped-query attention
    ffn_dim: Count  # hidden width of the feed-forward network
    # tokens; null: the data's, filled in before the model is built
    vocab_size: Annotated[int | None, at_least(1)] = None
    rope_theta: Positive = 500_000.0  # base of the rotary frequencies; Llama 3's
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: Positive = 1e-5  # added to the mean square in RMSNorm; Llama 3's
    tie_embeddings: bool = False  # the output matrix is the embedding
    activation_checkpointing: bool = False  # recompute each block in the backward pass
    # standard | mup: initial weights and learning rates follow the width (howto/transfer.md)
    parametrization: Annotated[str, one_of("standard", "mup")] = "standard"
    # width at which both are the same: that of the runs whose learning rates are taken
    mup_base_dim: Count = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.dim, self.num_heads)
        if self.head_dim % 2:
            raise InputError(
                f"model.num_heads={self.num_heads} makes heads of width {self.head_dim}, which is "
                f"odd, and RoPE turns pairs; use a divisor of {self.dim} that leaves an even width"
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide "
                f"model.num_heads={self.num_heads}; use a divisor of {self.num_heads}"
            )
        if self.parametrization == "mup" and self.tie_embeddings:
            raise InputError(
                "model.parametrization=mup gives embedding and output learning rates of their own, "
                "and model.tie_embeddings=true makes them one matrix; use "
                "model.tie_embeddings=false, or model.parametrization=standard"
            )

    @property
    def tensor_parallel_widths(self) -> dict[str, int]:
        """Heads and hidden units."""
        return {name: getattr(self, name) for name in ("num_heads", "num_kv_heads", "ffn_dim")}

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.num_heads

    @property
    def relative_width(self) -> float:
        """Width by which initial weights and learning rates go (`model.parametrization`)."""
        return self.dim / self.mup_base_dim if self.parametrization == "mup" else 1.0

    def of_width(self, dim: int) -> "LlamaConfig":
        """Return the shape at another width: heads and ffn_dim grow with it, head width stays.

        Raises:
            InputError: they would not be whole.
        """
        grown = {}
        for name in ("num_heads", "num_kv_heads", "ffn_dim"):
            grown[name], left = divmod(getattr(self, name) * dim, self.dim)
            if left:
                raise InputError(
                    f"model.dim={dim} instead of {self.dim} would make model.{name}="
                    f"{getattr(self, name) * dim / self.dim:g}; use a multiple of "
                    f"{self.dim // math.gcd(self.dim, self.num_heads, self.num_kv_heads)}"
                )
        return replace(self, dim=dim, **grown)

    def of_data(self, vocab_size: int) -> "LlamaConfig":
        """Return the shape with the data's vocabulary size, where it is left to the data."""
        return self if self.vocab_size is not None else replace(self, vocab_size=vocab_size)

    @property
    def known_vocab_size(self) -> int:
        """Return vocab_size; InputError while it is still left to the data."""
        if self.vocab_size is None:
            raise InputError(
                "model.vocab_size=null is known only with the data; "
                "set it, or take it from the token shards' meta.json"
            )
        return self.vocab_size


class ParameterCounts(NamedTuple):
    """Numbers of parameters, as the paper counts them."""

    in_blocks: int
    with_output: int  # blocks, final norm and output matrix: what computes on a token
    total: int


def count_parameters(config: LlamaConfig) -> ParameterCounts:
    """Count the parameters from the shape alone; a tied matrix counts once."""
    kv_dim = config.num_kv_heads * config.head_dim
    attention = 2 * config.dim * config.dim + 2 * config.dim * kv_dim
    feed_forward = 3 * config.dim * config.ffn_dim
    block = attention + feed_forward + 2 * config.dim
    matrix = config.known_vocab_size * config.dim
    in_blocks = config.num_layers * block
    with_output = in_blocks + config.dim + matrix
    return ParameterCounts(
        in_blocks, with_output, with_output + (0 if config.tie_embeddings else matrix)
    )

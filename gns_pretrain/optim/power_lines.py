"""Batch size and weight decay by rules of scale: Power Lines (Bergsma et al., arXiv:2505.13738).

Legend: N parameters; D tokens of a run; B a step's batch; eta the peak learning rate; lambda the
decoupled weight decay. The two power laws were fitted on GPT-like models (SwiGLU, ALiBi) of 111 M
to 3.3 B parameters under muP, trained by AdamW on one epoch of SlimPajama in sequences of 2,048
tokens, at a learning rate that decays linearly to zero: R^2 = 0.984 (batch) and 0.975 (timescale).
"""

import math
from contextlib import suppress
from typing import Annotated

from gns_pretrain.errors import InputError
from gns_pretrain.fields import Bound

SEQUENCE_LENGTH = 2048  # tokens, in which the law of the batch counts
TOKENS_PER_PARAMETER = (20.0, 1280.0)  # of the runs that the laws were fitted on
TOKENS = (111e6 * 20, 111e6 * 1280)  # of the smallest model's
BEYOND = 2.0  # times outside these ranges, where models are counted otherwise, the laws still hold


def is_timescale(text: str) -> bool:
    """Whether text is auto or a positive number."""
    with suppress(ValueError):
        return text == "auto" or 0.0 < float(text) < math.inf
    return False


Timescale = Annotated[
    str | None,
    Bound(is_timescale, "must be a positive number or auto", "0.2 suits 20 tokens a parameter"),
]


def optimal_batch_size(tokens: float) -> float:
    """The constant batch that ends at the lowest loss, in tokens a step (Figure 1, middle).

        B_opt = 0.0306 D^0.383    in sequences of 2,048 tokens, whatever N

    Args:
        tokens: D, of the whole run.
    """
    return SEQUENCE_LENGTH * 0.0306 * tokens**0.383


def optimal_timescale(tokens_per_parameter: float) -> float:
    """The best timescale of AdamW's weight decay, as a fraction of the run (Figure 1, left).

        tau_opt = 1.084 (D / N)^-0.527

    Args:
        tokens_per_parameter: D / N.
    """
    return 1.084 * tokens_per_parameter**-0.527


def weight_decay_of(timescale: float, *, lr: float, steps: float) -> float:
    """The weight decay with which weights average over a fraction of the run's updates.

        lambda = B / (tau eta D) = 1 / (tau eta S)

    A step at the peak forgets eta lambda of a weight, which is thus an average over
    1 / (eta lambda) updates (Wang and Aitchison, arXiv:2405.13698).

    Args:
        timescale: tau, above 0.
        lr: eta, at the peak.
        steps: S = D / B, of the run at that batch; need not be whole.
    """
    return 1.0 / (timescale * lr * steps)


def batch_size_by_rule(token_budget: int, sequence_length: int) -> int:
    """Sequences of a step by `optimal_batch_size`: the power of two that is nearest, at least 1.

    Whatever ranks a run has: one command stays one run on every layout. The law's minimum is flat,
    and a power of two at most a factor of 1.42 off it.

    Raises:
        InputError: the law says nothing of so many tokens.
    """
    exact = optimal_batch_size(token_budget) / sequence_length
    size: int = 2 ** max(round(math.log2(exact)), 0)
    low, high = TOKENS
    refuse_beyond(
        TOKENS,
        token_budget,
        f"batch_size.initial=auto is a law of runs of {low / 1e9:.1f} to {high / 1e9:.0f} billion "
        f"tokens, and token_budget={token_budget:,}",
        f"batch_size.initial={size}",
    )
    return size


def timescale_by_rule(tokens_per_parameter: float) -> float:
    """Return `optimal_timescale`; InputError where the law says nothing of such a run."""
    timescale = optimal_timescale(tokens_per_parameter)
    low, high = TOKENS_PER_PARAMETER
    refuse_beyond(
        TOKENS_PER_PARAMETER,
        tokens_per_parameter,
        f"optimizer.weight_decay_timescale=auto is a law of runs of {low:g} to {high:g} tokens a "
        f"parameter, and this one has {tokens_per_parameter:.3g}",
        f"optimizer.weight_decay_timescale={timescale:.3g}",
    )
    return timescale


def refuse_beyond(bounds: tuple[float, float], value: float, problem: str, extended: str) -> None:
    """Raise InputError for a run that a law says nothing of; name what it would say."""
    low, high = bounds
    if not low / BEYOND <= value <= high * BEYOND:
        raise InputError(f"{problem}; give a number (the law, extended to it: {extended})")

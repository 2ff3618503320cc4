"""Averages and decay that keep their half-life in tokens when the batch size changes.

A step of B sequences moves B / B_0 times as many tokens as one of B_0, so what forgets once a step
has to forget that much more of it. Off by default: the paper changes the learning rate alone.
What is called otherwise than momentum, betas and weight_decay (another library's rho, say) stays.
"""

from typing import Any

_TIED = ("momentum", "betas", "weight_decay")


def tied_average(beta: float, growth: float) -> float:
    """beta' = beta^(B / B_0): the same half-life, -B ln 2 / ln beta sequences, at any B.

    Args:
        beta: of the average at B_0, in [0, 1).
        growth: B / B_0.
    """
    return beta**growth


def tied_gain(group: dict[str, Any]) -> float:
    """What a momentum that sums its gradients, m = beta' m + gain g, multiplies them by.

        gain = (1 - beta') / (1 - beta)

    Such a sum settles at g / (1 - beta) times its gain, so the step's length stays what it was at
    B_0 and the learning rate's multiplier alone changes it. Averages need none.

    Args:
        group: of an optimizer; exactly 1 where nothing was tied.
    """
    beta = group["momentum"]
    return float((1.0 - beta) / (1.0 - group.get("tied_momentum", beta)))


def tied_weight_decay(weight_decay: float, growth: float, lr_multiplier: float) -> float:
    """Decay whose product with the learning rate grows as the batch does.

        (lr * multiplier) * decay' = lr * decay * B / B_0

    A weight shrinks by lr * decay a step, so its half-life in tokens stays, to first order in
    lr * decay. With the multiplier sqrt(B / B_0) the decay itself grows as sqrt(B / B_0).

    Args:
        weight_decay: at B_0.
        growth: B / B_0.
        lr_multiplier: what the batch size has done to the learning rate already.
    """
    return weight_decay * growth / lr_multiplier


def tie_to_tokens(optimizer: Any, batch_size: int) -> None:
    """Remember, in each group, the values that belong to the initial batch size B_0."""
    for group in optimizer.param_groups:
        group["tied_batch_size"] = batch_size
        for name in _TIED:
            if name in group:
                group[f"tied_{name}"] = group[name]


def retie(optimizer: Any, batch_size: int, *, lr_multiplier: float = 1.0) -> None:
    """Set momenta, betas and weight decays to what a batch asks for; untied groups stay.

    Args:
        optimizer: tied by `tie_to_tokens`, or not: then nothing happens.
        batch_size: B, sequences of the coming step.
        lr_multiplier: of the learning rate, from the batch size.
    """
    for group in optimizer.param_groups:
        if "tied_batch_size" not in group:
            continue
        growth = batch_size / group["tied_batch_size"]
        if "tied_momentum" in group:
            group["momentum"] = tied_average(group["tied_momentum"], growth)
        if "tied_betas" in group:
            group["betas"] = tuple(tied_average(beta, growth) for beta in group["tied_betas"])
        if "tied_weight_decay" in group:
            group["weight_decay"] = tied_weight_decay(
                group["tied_weight_decay"], growth, lr_multiplier
            )

"""How initial weights and learning rates follow the width of a model, so that the best ones stay.

The maximal update parametrization (muP, arXiv:2203.03466, Table 3) by the spectral condition
(arXiv:2310.17813): a matrix and its change in a step have spectral norms of the order of
(fan_out / fan_in)^(1/2), so that features change by as much at any width.

Legend: s = dim / mup_base_dim. Heads and ffn_dim grow with dim, head width and depth stay; so
fan_in and fan_out of a block's matrix both grow as s, as do an embedding's fan_out and the output's
fan_in. At s = 1 the parametrization is the standard one.

                                   embedding   matrix   output   norms
    initial standard deviation     1           s^-1/2   s^-1     1
    learning rate
      COORDINATE                   1           s^-1     s^-1     1
      GRADIENT                     s           1        s^-1     s
      SPECTRAL_NORM                            1
      ROOT_WIDTH                               s^-1/2
    weight decay                   1 / (the learning rate's)

No multiplier is left for the forward pass: the model is an ordinary Llama. What a weight loses to
decay in a step, lr * weight_decay, is the same at any width (arXiv:2405.13698).
"""

from enum import Enum, auto

from gns_pretrain.model.roles import Role


class StepSize(Enum):
    """How long an optimizer's steps are at lr = 1."""

    COORDINATE = auto()  # each coordinate moves by about 1: AdamW, signSGD, Signum
    GRADIENT = auto()  # as long as the gradient: SGD
    SPECTRAL_NORM = auto()  # a matrix moves by about 1 in spectral norm: Muon, specSGD
    ROOT_WIDTH = auto()  # by about s^(1/2) in spectral norm: Muon with scaling=match_rms_adamw


# Powers of s. The output's initial one comes on top of the standard D^-1/2. A vector beside the
# norms', a bias say, is like an embedding of one token.
_INITIAL = {Role.MATRIX: -0.5, Role.OUTPUT: -0.5}
_LEARNING_RATE = {
    StepSize.COORDINATE: {Role.MATRIX: -1.0, Role.OUTPUT: -1.0},
    StepSize.GRADIENT: {Role.EMBEDDING: 1.0, Role.OUTPUT: -1.0, Role.NORM: 1.0, Role.OTHER: 1.0},
    StepSize.SPECTRAL_NORM: {},
    StepSize.ROOT_WIDTH: {Role.MATRIX: -0.5},
}


def initial_factor(role: Role, width: float) -> float:
    """Factor of the standard initial deviation of a weight at s = `width`."""
    return float(width ** _INITIAL.get(role, 0.0))


def learning_rate_factor(step_size: StepSize, role: Role, width: float) -> float:
    """Factor of the learning rate of a weight at s = `width`; weight decay is divided by it."""
    return float(width ** _LEARNING_RATE[step_size].get(role, 0.0))

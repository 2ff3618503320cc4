"""Orders and draws computed from a position in the run: no state, the same on every machine."""

import math

import numpy as np

# Four rounds are enough for large domains (Luby and Rackoff, 1988); small ones mix more slowly.
ROUNDS = 8
_ROUND_NUMBERS = np.arange(ROUNDS, dtype=np.uint64)[:, None]


class SequenceOrder:
    """Maps positions in a run to sequences; epoch * num_sequences + i is the i-th of its epoch.

    Each epoch visits every sequence once, in an order that depends on the seed and the epoch and
    costs no memory. A Feistel network on pairs (left, right) with left * columns + right = index
    permutes rows * columns items whatever its round functions are; rows and columns near sqrt(n)
    make the domain barely larger than n. An index that lands outside [0, n) is sent through again
    until it lands inside (cycle walking): that keeps the map a permutation of [0, n). All in
    integers: the same on every machine.
    """

    def __init__(self, num_sequences: int, seed: int):
        self.num_sequences = num_sequences
        self._seed = np.array([seed], dtype=np.int64).astype(np.uint64)
        self._rows = np.uint64(math.isqrt(num_sequences - 1) + 1)
        self._columns = np.uint64(-(-num_sequences // int(self._rows)))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the sequences, int64 [n], at positions, int64 [n], each at least 0."""
        epochs, indices = np.divmod(positions.astype(np.uint64), np.uint64(self.num_sequences))
        keys = mix(mix(mix(self._seed) + epochs) + _ROUND_NUMBERS)
        sequences = self._permute(indices, keys)
        outside = np.flatnonzero(sequences >= self.num_sequences)
        while outside.size:
            sequences[outside] = self._permute(sequences[outside], keys[:, outside])
            outside = outside[sequences[outside] >= self.num_sequences]
        return sequences.astype(np.int64)

    def _permute(self, indices: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Run the network on indices, uint64 [n], below rows * columns; keys, [ROUNDS, n]."""
        left, right = np.divmod(indices, self._columns)
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + mix(even ^ right) % self._rows) % self._rows
            right = (right + mix(odd ^ left) % self._columns) % self._columns
        return left * self._columns + right


def mix(values: np.ndarray) -> np.ndarray:
    """Take one output of the SplitMix64 generator for each state, uint64 [n]: it mixes all bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Draw numbers in [0, 1) that depend on the seed and the position alone.

    Args:
        positions: int64 [n], in the run.
        count: of numbers for each.

    Returns:
        [count, n], float64; independent of the orders of the same seed.
    """
    # Another generator than the order's, which begins with the seed itself.
    own = mix(np.array([seed], dtype=np.int64).astype(np.uint64) ^ np.uint64(0x5851F42D4C957F2D))
    states = mix(own + positions.astype(np.uint64)) + np.arange(count, dtype=np.uint64)[:, None]
    return (mix(states) >> np.uint64(11)).astype(np.float64) * 2.0**-53

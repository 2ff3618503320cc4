"""The sequences of one source, or of several that are mixed by weights.

Which source a sequence of the run comes from depends on its position alone, so that the position
stays one integer. Weights are shares of a period: 0.7 and 0.3 are 7 and 3 of 10 sequences.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np

from gns_pretrain.data.shards import TokenShards
from gns_pretrain.errors import InputError

MAX_PERIOD = 100_000  # sequences; its order is kept in memory


@dataclass(frozen=True)
class Source:
    """One split of one token-shard folder."""

    name: str
    share: int  # sequences of each period
    tokens: TokenShards


class Mixture:
    """The sequences of several sources, interleaved by their shares; of a single one, its own.

    After any number n of sequences each source has had n * share / period of them, up to less than
    one sequence.

    Attributes:
        vocab_size: from meta.json, the same for all sources.
        fingerprint: identifies tokens and shares, whatever the folders are called.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self.vocab_size = sources[0].tokens.vocab_size
        self.num_tokens = sum(source.tokens.num_tokens for source in sources)
        self.fingerprint = sources[0].tokens.fingerprint
        if len(sources) > 1:
            identity = "\n".join(f"{s.share} {s.tokens.fingerprint}" for s in sources)
            self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._shares = np.array([source.share for source in sources], dtype=np.int64)
        self.period = int(self._shares.sum())
        self._order = interleaved(tuple(source.share for source in sources))
        self._earlier = np.empty(self.period, dtype=np.int64)  # of the same source, in the period
        for number, share in enumerate(self._shares):
            self._earlier[self._order == number] = np.arange(share)

    @property
    def weights(self) -> list[float]:
        """The sources' parts of the whole; their sum is 1."""
        return [source.share / self.period for source in self.sources]

    @property
    def document_ids(self) -> dict[str, int | None]:
        """As of `TokenShards`, the same for all sources."""
        return self.sources[0].tokens.document_ids

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each position, int64 [n] at least 0, and its position within it.

        A position within a source counts on past the source's end, from epoch to epoch.
        """
        periods, places = np.divmod(positions, self.period)
        sources = self._order[places]
        return sources, periods * self._shares[sources] + self._earlier[places]

    def counts(self, num_sequences: int) -> list[int]:
        """How many of the first sequences come from each source."""
        periods, rest = divmod(num_sequences, self.period)
        begun = np.bincount(self._order[:rest], minlength=len(self.sources))
        counts: list[int] = (periods * self._shares + begun).tolist()
        return counts

    def read_sequences(
        self, sources: np.ndarray, indices: np.ndarray, out: np.ndarray, sequence_length: int
    ) -> None:
        """Fill out, int64 [n, L + 1], with the sequences indices, int64 [n], of sources, [n].

        Raises InputError as of `TokenShards.read_sequences`.
        """
        for number in np.unique(sources):
            rows = np.flatnonzero(sources == number)
            part = out if rows.size == len(out) else np.empty((rows.size, out.shape[1]), out.dtype)
            tokens = self.sources[number].tokens
            tokens.read_sequences(indices[rows], sequence_length, part)
            if part is not out:
                out[rows] = part


@cache
def interleaved(shares: tuple[int, ...]) -> np.ndarray:
    """Order the sources of one period, [sum of the shares]: after n places source k has had

        |count_k(n) - n w_k| < 1,    w_k its share of the period

    The i-th sequence of source k (i = 0, 1, ...) must then have a place from floor(i / w_k) to
    ceil((i + 1) / w_k) - 1. Each place goes to the sequence that may come and whose last place is
    nearest, which finds such an order for any shares (Baruah et al. 1996, proportionate progress).
    """
    period = sum(shares)
    counts = [0] * len(shares)
    order = np.empty(period, dtype=np.int64)
    for place in range(period):
        may_come = [k for k, share in enumerate(shares) if counts[k] * period < (place + 1) * share]
        k = min(may_come, key=lambda k: -(-(counts[k] + 1) * period // shares[k]))
        order[place] = k
        counts[k] += 1
    return order


def shares_of(weights: Sequence[float]) -> list[int]:
    """Turn weights, as they were typed, into the smallest integers of the same proportions.

    Raises:
        InputError: they sum to more than MAX_PERIOD.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    whole = math.lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * whole) for weight in exact]
    shares = [share // math.gcd(*shares) for share in shares]
    if sum(shares) > MAX_PERIOD:
        total = float(sum(exact))
        rounded = ", ".join(f"{weight / total:.4f}" for weight in weights)
        raise InputError(
            f"data.sources has the weights {', '.join(map(str, weights))}, which only "
            f"{sum(shares):,} sequences can hold exactly, more than {MAX_PERIOD:,}; round them, "
            f"to {rounded} for example"
        )
    return shares

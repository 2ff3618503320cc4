"""In what a run counts its way: the budget, the axis of its curves and its speed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unit:
    """What a run's budget is counted in, and what a batch is: the names are those of the record."""

    name: str  # the field of a line that counts it: tokens, samples
    noun: str  # as it is shown: tokens, images
    short: str  # of a speed: tok/s, img/s
    sample: str  # what a batch size counts: sequence, image
    per_sample: int = 1  # of the unit in a sample

    def of(self, samples: int) -> int:
        """How many there are in so many samples."""
        return samples * self.per_sample

    @property
    def speed(self) -> str:
        """The field of a line that has the speed."""
        return f"{self.name}_per_second"


TOKENS = Unit("tokens", "tokens", "tok/s", "sequence")
IMAGES = Unit("samples", "images", "img/s", "image")


def unit_of_settings(settings: Mapping[str, Any]) -> Unit:
    """The unit of a run with these settings: runs on images have no tokens."""
    return IMAGES if settings.get("token_budget", 0) is None else TOKENS


def unit_of(record: dict[str, Any]) -> Unit:
    """The unit of a line, a summary or a run's counts: of language runs alone they hold tokens."""
    return IMAGES if record.get("tokens") is None and record.get("samples") else TOKENS

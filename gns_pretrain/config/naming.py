"""Run names: what a file under conf/ gives, then what the command line overrides.

    python train.py optimizer.lr=0.001 noise_scale=nuclear
    outputs/tiny-adamw-seed0-noise_scale_nuclear-lr1e-3

A value is the composed one, so that 0.001 and 1e-3 are one run. What does not make another run
(`runs.identity`) stays out, and so does what the file's own run_name holds.
"""

import hashlib
import re
from collections.abc import Collection, Iterable
from decimal import Decimal
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gns_pretrain.runs.identity import changes_run_name
from gns_pretrain.tracking.console import short_number

MAX_OVERRIDES = 100  # letters; a hash stands for what is beyond
UNITS = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}
COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?)(?:e\+?(\d{1,2}))?([kmbt]?)", re.IGNORECASE)


def name_of_overrides(
    node: DictConfig, overrides: Iterable[str], *, template: str, settings: Collection[str]
) -> str:
    """Return the end of a run_name, as in `-lr1e-3-theta0.5`; "" where run_name itself is typed.

    Args:
        node: the composed configuration.
        overrides: as typed; of several for one setting the last holds.
        template: run_name before interpolation, as the files have it.
        settings: dotted names of all settings.
    """
    typed = {}
    for word in overrides:
        key, _, text = word.lstrip("+~").partition("=")
        typed[key] = text
    if "run_name" in typed:
        return ""
    policy = node.batch_size.policy
    rivals = [name for name in settings if changes_run_name(name, policy=policy)]
    pieces = [
        _piece(
            shortest_end(key, rivals), OmegaConf.select(node, key) if key in settings else "", text
        )
        for key, text in sorted(typed.items())
        if changes_run_name(key, policy=policy) or key.partition(".")[0] == "scale"
        if not _is_in_template(key, text, node, template)
    ]
    kept = list(pieces)
    while len("-".join(kept)) > MAX_OVERRIDES:
        kept.pop()
    if kept != pieces:
        kept.append(hashlib.sha256("-".join(pieces).encode()).hexdigest()[:8])
    return "".join(f"-{piece}" for piece in kept)


def _is_in_template(key: str, text: str, node: DictConfig, template: str) -> bool:
    """Whether the run_name of the files holds what an override sets already."""
    if key == "experiment":
        return str(node.run_name).startswith(text.replace("/", "-"))
    is_choice = f"${{{key}.name}}" in template and OmegaConf.select(node, f"{key}.name") == text
    return key == "sweep" or f"${{{key}}}" in template or is_choice


def _piece(name: str, value: Any, text: str) -> str:
    """One override: `lr1e-3`, `token_budget1.5M`, `noise_scale_nuclear`, `path_c4`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return name + (_count(value) if is_token_count(name) else _number(value))
    if isinstance(value, bool):
        text = str(value).lower()
    if name == "path":
        text = PurePath(value).name
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{name}_{text}").strip("_")


def shortest_end(name: str, others: Iterable[str]) -> str:
    """The shortest end of a dotted name that no other name of at most as many parts shares."""
    parts = name.split(".")
    near = [o for o in others if o != name and o.count(".") < len(parts)]
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((e for e in ends if not any(f".{o}".endswith(f".{e}") for o in near)), name)


def is_token_count(name: str) -> bool:
    """Whether a setting counts tokens, by its name: token_budget, batch_size.ramp_tokens."""
    return "tokens" in name or name == "token_budget"


def token_count(text: str) -> int | None:
    """Read 1e6, 1M, 3.2B, 400k or 1_000_000; None for what is no whole number of tokens."""
    if not (match := COUNT.fullmatch(text)):
        return None
    digits, exponent, unit = match.groups()
    count = Decimal(digits.replace("_", "")).scaleb(int(exponent or 0) + UNITS[unit.lower()])
    return int(count) if count == int(count) else None


def _count(value: float) -> str:
    short = short_number(value, exact=True)
    return short if token_count(short) == value else str(value)


def _number(value: float) -> str:
    """The shorter of 0.001 and 1e-3, digit for digit."""
    number = Decimal(repr(value)).normalize()
    mantissa, _, exponent = f"{number:e}".partition("e")
    scientific = f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return min(f"{number:f}", scientific, key=len)

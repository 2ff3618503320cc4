"""Which runs and published curves a command line names, and what they are called beside others."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from gns_pretrain.errors import InputError
from gns_pretrain.fields import at_home
from gns_pretrain.runs.directory import CONFIG, METRICS, run_directories


def curve_files(path: Path) -> list[Path]:
    """List the runs and CSVs that a path names, in natural order; InputError if none."""
    if path.is_file() or (path / CONFIG).is_file() or (path / METRICS).is_file():
        return [path]
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder; name a run directory or a CSV")
    found = sorted([*run_directories(path), *path.glob("*.csv")], key=natural_order)
    if not found:
        raise InputError(f"{path} holds neither a run directory nor a CSV; name one that does")
    return found


def grouped(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """Run directories and CSVs by label, in the order in which labels appear.

    An argument is label=PATH, or a path, whose runs are grouped by folder and name without the
    seed.

    Raises:
        InputError: there is no such path.
    """
    groups: dict[tuple[str, str], list[Path]] = {}  # folder (of a given label: none) and name
    for argument in arguments:
        label, given = _label_and_path(argument)
        for path in curve_files(given):
            full = Path(os.path.realpath(path))  # links may lead in a circle
            key = (str(full.parent), without_seed(full)) if label is None else ("", label)
            members = groups.setdefault(key, [])
            if path not in members:
                members.append(path)
    found = [key for key in groups if key[0]]
    taken = {name for folder, name in groups if not folder}
    labels = {key: key[1] for key in groups}
    names = distinct_names([Path(*key) for key in found])
    for (folder, name), short in zip(found, without_common_parts(names), strict=True):
        labels[folder, name] = f"{Path(folder).name}/{name}" if short in taken else short
    return {labels[key]: paths for key, paths in groups.items()}


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as no other one has."""
    parts = [Path(os.path.realpath(path)).parts for path in paths]
    named = []
    for own in parts:
        others = {other for other in parts if other != own}
        depths = range(1, len(own))
        alone = (n for n in depths if all(own[-n:] != other[-n:] for other in others))
        named.append("/".join(own[-next(alone, len(own)) :]))
    return named


def without_common_parts(names: Sequence[str]) -> list[str]:
    """Cut what all names begin and end with: `adaptive` of table2-signum_adaptive-demo.

    Parts end at - / _, but an override such as optimizer.lr=1e-3 is one; of each name one stays.
    """
    parts = [
        [
            part
            for word in re.findall(r"(?:[^-/]|(?<=\de)-(?=\d))+[-/]?|[-/]", name)
            for part in ([word] if "=" in word else re.findall(r"[^_]+_?|_", word))
        ]
        for name in names
    ]
    if len({*names}) < 2:
        return list(names)
    most = min(map(len, parts)) - 1
    start = next((n for n in range(most) if len({each[n] for each in parts}) > 1), most)
    ends = [[part.rstrip("-/_") for part in reversed(each)] for each in parts]
    most -= start
    end = next((n for n in range(most) if len({each[n] for each in ends}) > 1), most)
    cut = ["".join(each[start : len(each) - end]).rstrip("-/_") for each in parts]
    return cut if len({*cut}) == len({*names}) else list(names)


def _label_and_path(argument: str) -> tuple[str | None, Path]:
    """A path, or label=PATH; both may hold further equals signs."""
    argument = at_home(argument)
    if Path(argument).exists() or "=" not in argument:
        return None, Path(argument)
    parts = argument.split("=")
    splits = [
        ("=".join(parts[:n]), Path(at_home("=".join(parts[n:])))) for n in range(1, len(parts))
    ]
    return next((split for split in splits if split[1].exists()), splits[-1])


def natural_order(path: Path | str) -> tuple[tuple[int, str], ...]:
    """Sort key that puts seed_10 after seed_9."""
    parts = re.findall(r"\d+|\D+", str(path))
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)


def without_seed(path: Path) -> str:
    """Name of a run without its seed; of the folder where a file's name is nothing but one."""
    name = path.stem if path.suffix == ".csv" else path.name
    rest = re.sub(r"(^|[-_])seed[-_]?\d+(?=$|[-_])", "", name).strip("-_")
    return rest or path.parent.name


def seed_in_name(path: Path) -> int | None:
    """The 3 of seed_3.csv or run-seed3."""
    match = re.search(r"(?:^|[-_])seed[-_]?(\d+)(?=$|[-_])", path.stem)
    return int(match[1]) if match else None

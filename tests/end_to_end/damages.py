"""What can happen to a file: any content, and in structured ones any entry of another type."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CONTENTS = {
    "empty": b"",
    "space": b" \n",
    "list": b"[]",
    "null": b"null",
    "object": b"{}",
    "number": b"3",
    "text": b'"text"',
    "zeros": bytes(300),
    "not UTF-8": b'{"step": "\xff\xfe"}\n\xff\n',
    "lists in lists": b"[" * 3_000,
    "objects in objects": b'{"step":' * 3_000,
    "huge number": b'{"step": 1' + b"0" * 5000 + b"}\n",
    "infinite number": b'{"step": 1e999, "kind": "train"}\n',
}
# One entry after the other takes the next of these, so that each is tried in many places.
VALUES: tuple[Any, ...] = (None, [], {}, "text", -1, True, 1.5, 10**30, float("nan"), [[1]], 0)


def harms(path: Path, *, values: int = 1) -> Iterator[tuple[str, Any]]:
    """Names of harms to a file, and what takes its place: bytes, or what makes it there.

    Args:
        path: of the file as it should be.
        values: that each of its entries takes, one after the other.
    """
    good = path.read_bytes()
    yield "missing", lambda place: None
    yield "a folder", Path.mkdir
    yield "a pipe", os.mkfifo
    yield "a link to itself", lambda place: place.symlink_to(place)
    yield from CONTENTS.items()
    half = len(good) // 2
    flipped = bytes(byte ^ 16 for byte in good[half : half + 1])
    yield "half", good[:half]
    yield "zeros at its end", good[:half] + bytes(len(good) - half)
    yield "a flipped bit", good[:half] + flipped + good[half + 1 :]
    yield from changed_entries(path, good, values)


def changed_entries(path: Path, good: bytes, values: int) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".yaml":
        read, write = yaml.safe_load, yaml.safe_dump
    elif path.suffix in (".json", ".jsonl"):
        read, write = json.loads, json.dumps
    else:
        return
    lines = good.decode().splitlines() if path.suffix == ".jsonl" else [good.decode()]
    kinds = set()
    turn = 0
    for number, line in enumerate(lines):
        content = read(line)
        kind = content.get("kind", content.get("event")) if isinstance(content, dict) else None
        if kind in kinds:
            continue
        kinds.add(kind)
        for place in places(content):
            if place[0] == "model" and len(place) > 1 and path.name == "tokenizer.json":
                continue
            others = [VALUES[(turn + k) % len(VALUES)] for k in range(values)]
            turn += 1
            for value in [LACKING, *others]:
                new = replaced(content, place, value)
                text = "\n".join([*lines[:number], write(new), *lines[number + 1 :]]) + "\n"
                shown = "lacks it" if value is LACKING else repr(value)[:12]
                yield f"{kind or ''}{place}: {shown}", text.encode()


LACKING = object()


def places(content: Any, deep: int = 3) -> Iterator[tuple[Any, ...]]:
    """The ways to the entries of nested lists and dicts; of a list to its first."""
    if deep and isinstance(content, dict):
        for key, value in list(content.items())[:40]:
            yield (key,)
            yield from ((key, *rest) for rest in places(value, deep - 1))
    if deep and isinstance(content, list) and content:
        yield (0,)
        yield from ((0, *rest) for rest in places(content[0], deep - 1))


def replaced(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    new = copy.deepcopy(content)
    node = new
    for key in place[:-1]:
        node = node[key]
    if value is LACKING:
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return new


def apply(path: Path, harm: Any) -> None:
    """Put the harm in place of the file."""
    path.unlink()
    if callable(harm):
        harm(path)
    else:
        path.write_bytes(harm)

import json
import signal
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import gns_pretrain.commands  # noqa: F401  first: it says how threads wait, before torch is loaded
from tests.settings import VOCABULARY

# A closed terminal is tested too; under nohup it would be ignored, by runs of the tests as well.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def write_shards(folder: Path, splits: dict[str, list[np.ndarray]], vocab_size: int) -> Path:
    """Token shards as the documented format has them, written with numpy alone."""
    folder.mkdir(parents=True)
    shards = []
    for split, arrays in splits.items():
        for number, array in enumerate(arrays):
            path = folder / f"{split}-{number:05d}.npy"
            np.save(path, array)
            shards.append(
                {
                    "file": path.name,
                    "split": split,
                    "tokens": len(array),
                    "sha256": sha256(path.read_bytes()).hexdigest(),
                }
            )
    meta = {
        "dtype": "uint16",
        "vocab_size": vocab_size,
        "eos_id": 0,
        "tokenizer": None,
        "shards": shards,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Two training shards and one for validation, of a language with something to learn."""
    generator = np.random.default_rng(0)

    def text(tokens: int) -> np.ndarray:
        # Each token is its predecessor plus 1, 2 or 3: the best loss is ln 3.
        steps = generator.integers(1, 4, tokens)
        return (np.cumsum(steps) % VOCABULARY).astype(np.uint16)

    splits = {"train": [text(1500), text(1733)], "validation": [text(400)]}
    return write_shards(tmp_path_factory.mktemp("data") / "shards", splits, VOCABULARY)

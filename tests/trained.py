"""A run directory as training leaves it, made by hand: real text, a byte-level BPE, two saves."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from gns_pretrain.config.compose import as_yaml
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.data.shards import (
    CorpusMeta,
    joint_fingerprint,
    read_meta,
    write_meta,
    write_shard,
)
from gns_pretrain.data.tokenization import DocumentEncoder
from gns_pretrain.model.llama import Llama
from gns_pretrain.parallel.mesh import World
from gns_pretrain.runs.history import write_provenance
from gns_pretrain.system.files import sha256_of
from gns_pretrain.training.checkpoint import Checkpoints
from tests.settings import odd_model, small_run
from tests.unit.data_samples import make_texts, write_tokenizer

ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")
POSITIONS = 60  # tokens of a sequence
TEXTS = {"train": make_texts(20, seed=1), "validation": make_texts(12, seed=2)}


def write_text_shards(folder: Path) -> Path:
    """TEXTS as prepare-data writes them, in shards that cut documents."""
    folder.mkdir(parents=True)
    path = write_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    encoder = DocumentEncoder(tokenizer, dtype=np.dtype("uint16"), bos_id=0, eos_id=1)
    shards = []
    for split, texts in TEXTS.items():
        for index, tokens in enumerate(np.array_split(encoder.encode(texts)[0], 3)):
            shards.append(write_shard(folder, split=split, index=index, tokens=tokens))
    write_meta(
        folder,
        CorpusMeta("uint16", 300, tuple(shards), 0, 1, path.name, sha256_of(path)),
    )
    return folder


def random_model(seed: int = 0) -> Llama:
    """A model whose next tokens are certain enough that rounding changes none."""
    model = Llama(odd_model(vocab_size=300))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def write_trained_run(folder: Path) -> Path:
    """The run directory folder/small, on the shards of folder/data, with saves of steps 1 and 2."""
    data = DataSettings(str(write_text_shards(folder / "data")), sequence_length=POSITIONS)
    config = replace(small_run(folder, folder / "data"), data=data)
    run = folder / config.run_name
    splits = (data.train_split, data.validation_split)
    fingerprint = joint_fingerprint(map(read_meta(folder / "data").fingerprint, splits))
    write_provenance(run, as_yaml(config), fingerprint, asdict(data.origin()))
    checkpoints = Checkpoints(run / "checkpoints", keep=2, world=ALONE)
    lines = []
    for step in (1, 2):
        model = random_model(step)
        state = {"step": step, "samples": 8 * step, "tokens": 8 * POSITIONS * step}
        checkpoints.save(model, config.optimizer.build(model), state)
        line = {"kind": "validation", "step": step, "tokens": state["tokens"], "loss": 6.0 - step}
        lines.append(json.dumps(line) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))
    return run

"""What scripts/prepare_data.py is told, checked before anything is read or written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gns_pretrain.data.prepare.corpus import find_files
from gns_pretrain.data.tokenization import MIN_BPE_VOCABULARY
from gns_pretrain.errors import InputError

C4 = "allenai/c4"


@dataclass
class PrepareSettings:
    """The flags of scripts/prepare_data.py: a field's flag is its name with dashes."""

    out: str  # folder to write
    source: str | None = None  # hub: the datasets library; local: `train` and `validation` files
    dataset: str = (
        C4  # hub only; json or parquet read `train` and `validation` through the same library
    )
    dataset_config: str | None = None  # hub only; None: en for C4
    train: list[str] = field(default_factory=list)  # files and globs
    validation: list[str] = field(default_factory=list)  # files and globs
    validation_fraction: float = 0.0  # of the training documents, held out by a hash of their text
    tokenizer: str | None = None  # tokenizer.json, or a hub name
    train_bpe: int | None = None  # entries of a byte-level BPE to train instead
    train_bpe_documents: int = 20_000  # training documents it is trained on
    bos: bool = True  # beginning-of-sequence token before each document (the paper's runs: yes)
    eos: bool = True  # end-of-sequence token after it (the paper's runs: yes)
    bos_token: str | None = None  # its name; None: the usual ones
    eos_token: str | None = None  # its name; None: the usual ones
    shard_tokens: int = 100_000_000  # tokens a shard; what a kill can cost
    max_tokens: int | None = None  # of the training split; None: all
    max_validation_tokens: int | None = (
        None  # None: all; of a held-out part max_tokens * validation_fraction
    )
    workers: int = 0  # processes; 0: one a core

    def __post_init__(self) -> None:
        if self.source is None:
            self.source = "local" if self.train else "hub"
        if self.dataset == C4 and self.dataset_config is None:
            self.dataset_config = "en"
        if self.max_validation_tokens is None and self.max_tokens and self.validation_fraction:
            self.max_validation_tokens = max(1, round(self.max_tokens * self.validation_fraction))
        self._check_source()
        self._check_tokenizer()
        for name in ("train_bpe_documents", "shard_tokens", "max_tokens", "max_validation_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{flag(name)}={value} must be at least 1")
        if self.workers < 0:
            raise InputError(f"--workers={self.workers} must be at least 1, or 0 for one a core")

    def _check_source(self) -> None:
        if self.source not in ("hub", "local"):
            raise InputError(f"--source={self.source} must be hub or local")
        if self.source == "local" and not self.train:
            raise InputError("--source=local needs --train, the files to read")
        if self.validation and not self.train:
            raise InputError("--validation files need --train files beside them")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise InputError(
                f"--validation-fraction={self.validation_fraction} must be at least 0 and below 1"
            )
        if self.validation and self.validation_fraction:
            raise InputError("--validation and --validation-fraction exclude each other; give one")
        if self.train and not self.validation and not self.validation_fraction:
            raise InputError(
                "--train without a validation part: give --validation files, or "
                "--validation-fraction (0.01, say) to hold out some documents"
            )

    def _check_tokenizer(self) -> None:
        if (self.tokenizer is None) == (self.train_bpe is None):
            raise InputError(
                "give one of --tokenizer (a tokenizer.json or hub name) and --train-bpe (entries)"
            )
        if self.train_bpe is not None and self.train_bpe < MIN_BPE_VOCABULARY:
            raise InputError(
                f"--train-bpe={self.train_bpe} must be at least {MIN_BPE_VOCABULARY}: "
                "all bytes and two special tokens"
            )

    def find_files(self) -> dict[str, list[Path]]:
        """The local files by split, sorted; InputError if a file is in both splits."""
        files = {
            "train": find_files(self.train, "--train"),
            "validation": find_files(self.validation, "--validation"),
        }
        both = {path.resolve() for path in files["train"]} & {
            path.resolve() for path in files["validation"]
        }
        if both:
            raise InputError(
                f"--train and --validation both name {min(both)}; a file belongs to one of them"
            )
        return files

    def identity(self, files: dict[str, list[Path]]) -> dict[str, Any]:
        """All that decides what the shards hold, as JSON: a folder goes on only with the same.

        Files count by name, so that a folder of them may move; a tokenizer file by its content.
        """
        tokenizer = self.tokenizer
        if tokenizer is not None and Path(tokenizer).is_file():
            tokenizer = f"sha256:{hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()}"
        local = self.source == "local"
        return {
            "source": self.source,
            "dataset": None if local else self.dataset,
            "dataset_config": None if local else self.dataset_config,
            "train": [path.name for path in files["train"]],
            "validation": [path.name for path in files["validation"]],
            "validation_fraction": self.validation_fraction,
            "tokenizer": tokenizer,
            "train_bpe": self.train_bpe,
            "train_bpe_documents": self.train_bpe_documents if self.train_bpe else None,
            "bos": self.bos,
            "eos": self.eos,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "shard_tokens": self.shard_tokens,
            "max_tokens": self.max_tokens,
            "max_validation_tokens": self.max_validation_tokens,
        }


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")

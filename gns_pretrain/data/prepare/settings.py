"""The options of `gns-pretrain prepare-data`, checked before anything is read or written."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from gns_pretrain.data.prepare.corpus import TEXT_KEY, find_files
from gns_pretrain.data.tokenization import MIN_BPE_VOCABULARY
from gns_pretrain.errors import InputError
from gns_pretrain.fields import About, Settings, at_least, one_of, path_name, within
from gns_pretrain.system.files import sha256_of

C4 = "allenai/c4"


@dataclass
class PrepareSettings(Settings):
    """Where the documents come from, how they are tokenized, and how the shards are cut."""

    section: ClassVar[str] = "--"

    out: Annotated[str, path_name(), About("folder to write; the same command resumes it")]
    source: Annotated[
        str | None, one_of("hub", "local"), About("default: local if --train is given, else hub")
    ] = None
    dataset: Annotated[str, About("dataset on the hub, with a column of texts")] = C4
    dataset_config: Annotated[str | None, About("its configuration; en for C4")] = None
    train: Annotated[
        list[str],
        path_name(),
        About("files or globs: .jsonl .json .txt, each also with .gz or .zst, and .parquet"),
    ] = field(default_factory=list)
    validation: Annotated[
        list[str], path_name(), About("files or globs of the validation split")
    ] = field(default_factory=list)
    validation_fraction: Annotated[
        float, within(0, 1), About("of the training documents, held out by a hash of their text")
    ] = 0.0
    text_key: Annotated[str, About("of the text in a JSON record, or its column")] = TEXT_KEY
    txt_documents: Annotated[
        str, one_of("file", "blank-line"), About("where a document of a .txt file ends")
    ] = "file"
    skip_bad_records: Annotated[
        bool, About("leave out records without a text, and count them, instead of ending there")
    ] = False
    tokenizer: Annotated[
        str | None, path_name(), About("tokenizer.json, or the name of a model on the hub")
    ] = None
    train_bpe: Annotated[
        int | None,
        at_least(MIN_BPE_VOCABULARY, hint="all bytes and two special tokens"),
        About("entries of a byte-level BPE to train instead"),
    ] = None
    train_bpe_documents: Annotated[
        int, at_least(1), About("number of documents to train it on, the first ones")
    ] = 20_000
    bos: Annotated[bool, About("a beginning-of-sequence token before each document")] = True
    eos: Annotated[bool, About("an end-of-sequence token after each document")] = True
    bos_token: Annotated[str | None, About("its name in the tokenizer, if unusual")] = None
    eos_token: Annotated[str | None, About("its name in the tokenizer, if unusual")] = None
    shard_tokens: Annotated[
        int, at_least(1), About("tokens in a shard; a kill costs at most one shard")
    ] = 100_000_000
    max_tokens: Annotated[
        int | None, at_least(1), About("end the training split there; default: all")
    ] = None
    max_validation_tokens: Annotated[
        int | None,
        at_least(1),
        About("end the validation split there; default: all, or that fraction of --max-tokens"),
    ] = None
    workers: Annotated[int, at_least(0), About("processes; 0: one per core")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is None:
            self.source = "local" if self.train else "hub"
        if self.dataset == C4 and self.dataset_config is None:
            self.dataset_config = "en"
        if self.max_validation_tokens is None and self.max_tokens and self.validation_fraction:
            self.max_validation_tokens = max(1, round(self.max_tokens * self.validation_fraction))
        if self.source == "local" and not self.train:
            raise InputError("--source=local needs --train, the files to read")
        if self.validation and not self.train:
            raise InputError("--validation files need --train files beside them")
        if self.validation and self.validation_fraction:
            raise InputError("--validation and --validation-fraction exclude each other; give one")
        if self.train and not self.validation and not self.validation_fraction:
            raise InputError(
                "--train without a validation part: give --validation files, or "
                "--validation-fraction (0.01, say) to hold out some documents"
            )
        if (self.tokenizer is None) == (self.train_bpe is None):
            raise InputError(
                "give one of --tokenizer (a tokenizer.json or hub name) and --train-bpe (entries)"
            )

    def find_files(self) -> dict[str, list[Path]]:
        """Return the local files by split, sorted; InputError if a file is in both splits."""
        train = find_files(self.train, "--train")
        validation = find_files(self.validation, "--validation")
        both = {path.resolve() for path in train} & {path.resolve() for path in validation}
        if both:
            raise InputError(
                f"--train and --validation both name {min(both)}; a file belongs to one of them"
            )
        return {"train": train, "validation": validation}

    def identity(self, files: dict[str, list[Path]]) -> dict[str, Any]:
        """Return all that decides what the shards hold, as JSON; only the same resumes a folder.

        Files count by name, so that a folder of them may move; a tokenizer file by its content.
        """
        identity = asdict(self)
        del identity["out"], identity["workers"]
        identity |= {split: [path.name for path in paths] for split, paths in files.items()}
        if self.source == "local":
            identity |= {"dataset": None, "dataset_config": None}
        if self.tokenizer is not None and Path(self.tokenizer).is_file():
            identity["tokenizer"] = f"sha256:{sha256_of(Path(self.tokenizer))}"
        if self.train_bpe is None:
            identity["train_bpe_documents"] = None
        return identity

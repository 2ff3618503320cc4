"""Which tokens a run trains on, and how they are cut into sequences."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from gns_pretrain.data.dataset import DatasetSettings
from gns_pretrain.data.embedded import ensure_embedded
from gns_pretrain.data.mixture import Mixture, Source, shares_of
from gns_pretrain.data.prepare.corpus import SUFFIXES
from gns_pretrain.data.shards import META_FILE, PROGRESS_FILE, CorpusMeta, TokenShards, read_meta
from gns_pretrain.data.tokenization import MIN_BPE_VOCABULARY
from gns_pretrain.errors import InputError
from gns_pretrain.fields import Settings, at_least, path_name, positive

EMBEDDED = "embedded"
MIXTURE = "mixture"
# Of meta.json, what the sources of a mixture have in common.
SHARED = ("vocab_size", "dtype", "bos_id", "eos_id", "tokenizer_sha256")


@dataclass(frozen=True)
class TextOrigin:
    """What a run notes about its text, for whoever reads its checkpoints elsewhere or later."""

    folder: str  # of the token shards, absolute
    bos_id: int | None = None  # as in meta.json
    eos_id: int | None = None
    tokenizer_sha256: str | None = None


@dataclass
class SourceSettings(Settings):
    """One text of a mixture."""

    section: ClassVar[str] = "data.sources"

    path: Annotated[str, path_name()] = ""  # as data.path; given
    # its part of the sequences, in proportion to the other sources' weights
    weight: Annotated[float, positive()] = 1.0
    name: str = ""  # in the record; by default the folder's

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.name or Path(self.path).resolve().name


@dataclass
class DataSettings(DatasetSettings):
    """The text of a run."""

    # embedded (docstrings of installed packages), mixture (of data.sources), or a token-shard
    # folder; given
    path: Annotated[str, path_name()] = "???"
    sources: list[SourceSettings] = field(default_factory=list)  # of a mixture
    sequence_length: Annotated[int, at_least(1)] = 256  # tokens of context; 2048 in the paper
    # Attention stays within a document; false as in the paper: it sees all that comes before.
    document_mask: bool = False
    # Entries of the BPE trained on the embedded text.
    embedded_vocab_size: Annotated[
        int, at_least(MIN_BPE_VOCABULARY, hint="all bytes and two special tokens")
    ] = 4096

    @property
    def parts(self) -> list[SourceSettings]:
        """The sources, of which a text that is no mixture has one."""
        return self.sources if self.path == MIXTURE else [SourceSettings(self.path)]

    def find_folder(self) -> Path:
        """Return the folder of shards, of a mixture the first one, as `folder_of` does."""
        return self.folder_of(self.parts[0])

    def folder_of(self, part: SourceSettings) -> Path:
        """Return a source's folder of shards; make the embedded text if it is not there."""
        if part.path == EMBEDDED:
            return ensure_embedded(vocab_size=self.embedded_vocab_size)
        return Path(part.path)

    def origin(self) -> TextOrigin:
        """Where the text is, of a mixture its first source, and the ids around its documents;
        InputError as of `read_meta`.
        """
        folder = self.find_folder().resolve()
        meta = read_meta(folder)
        return TextOrigin(str(folder), meta.bos_id, meta.eos_id, meta.tokenizer_sha256)


def open_splits(settings: DataSettings) -> tuple[Mixture, Mixture]:
    """Open the training and the validation split; make the embedded text if it is not there.

    Raises:
        InputError: naming the file that is missing or damaged, the split that is missing or too
            short for one sequence, or sources that cannot be mixed.
    """
    folders = list_folders(settings)
    shares = shares_of([part.weight for part in settings.parts])
    opened = []
    for setting in ("train_split", "validation_split"):
        split = getattr(settings, setting)
        sources = []
        for part, share, folder in zip(settings.parts, shares, folders, strict=True):
            tokens = TokenShards.open(
                folder, split, verify=settings.verify, setting=f"data.{setting}"
            )
            if tokens.num_sequences(settings.sequence_length) < 1:
                raise InputError(
                    f"data.sequence_length={settings.sequence_length} must be below the "
                    f"{tokens.num_tokens} tokens of the split {split} of {folder}; "
                    "use shorter sequences, or more data"
                )
            sources.append(Source(part.name, share, tokens))
        opened.append(Mixture(sources))
    return opened[0], opened[1]


def list_folders(settings: DataSettings) -> list[Path]:
    """Return each source's folder; InputError for one without shards, or sources that differ."""
    parts = settings.parts
    if not parts:
        raise InputError(
            f"data.path={MIXTURE} has no sources; name them, as in "
            "'data.sources=[{path: data/c4, weight: 0.7}, {path: data/code, weight: 0.3}]'"
        )
    if settings.sources and settings.path != MIXTURE:
        raise InputError(
            f"data.sources is not read with data.path={settings.path}; use data.path={MIXTURE}, "
            "or leave one of them out"
        )
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"data.sources names {name} more than once; give each source a name of its own"
            )
    metas: list[tuple[Path, CorpusMeta]] = []
    for part in parts:
        folder = settings.folder_of(part)
        if not any((folder / name).is_file() for name in (META_FILE, PROGRESS_FILE)):
            setting = "data.sources: path" if settings.sources else "data.path"
            raise InputError(f"{setting}={part.path} is not {how_to_make(folder)}")
        metas.append((folder, read_meta(folder)))
    (first, known), *others = metas
    for folder, meta in others:
        for name in SHARED:
            if getattr(meta, name) != getattr(known, name):
                raise InputError(
                    f"data.sources: {folder} has {name}={getattr(meta, name)} in its {META_FILE}, "
                    f"{first} has {getattr(known, name)}; prepare all with one tokenizer, such as "
                    f"--tokenizer {first / (known.tokenizer or 'tokenizer.json')}"
                )
    return [folder for folder, _ in metas]


def how_to_make(path: Path) -> str:
    """Say what a path without token shards should be, and the command that makes it of a text."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    texts = [file for file in inside if file.is_file() and file.name.endswith(SUFFIXES)]
    if not texts:
        what = "a token-shard folder (meta.json is missing)" if path.is_dir() else "a folder"
        return f"{what}; make one with gns-pretrain prepare-data, or set data.path={EMBEDDED}"
    pattern = str(path)
    if path.is_dir():
        suffix = next(suffix for suffix in SUFFIXES if texts[0].name.endswith(suffix))
        pattern = f"{path}/*{suffix}"
    return (
        f"a token-shard folder but text; gns-pretrain prepare-data --train {shlex.quote(pattern)} "
        "--validation-fraction 0.01 --train-bpe 32_000 --out data/shards makes one of it"
    )

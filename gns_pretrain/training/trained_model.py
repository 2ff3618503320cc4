"""A trained model as a command is given it: a checkpoint, a run, or a Hugging Face Llama folder."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gns_pretrain.data.settings import MIXTURE, DataSettings, TextOrigin
from gns_pretrain.data.shards import META_FILE, checked_tokenizer, joint_fingerprint, read_meta
from gns_pretrain.data.tokenization import TOKENIZER_FILE, as_in_training, read_tokenizer
from gns_pretrain.errors import InputError
from gns_pretrain.fields import at_home
from gns_pretrain.model.huggingface import CONFIG_FILE, HINT, ExportedText, load_hf_folder
from gns_pretrain.model.llama import Llama
from gns_pretrain.runs.directory import CHECKPOINTS, CONFIG, PROVENANCE, read_settings
from gns_pretrain.runs.history import read_provenance
from gns_pretrain.system.files import parse, read_json
from gns_pretrain.system.remote import folder_at, is_remote
from gns_pretrain.system.terminal import write
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.checkpoint_reader import (
    checkpoint_folders,
    damage,
    pick_whole,
    reachable,
    read_model,
    stored_llama,
)
from gns_pretrain.training.checkpoint_writer import MANIFEST, TRAIN_STATE

RESTORE = "restore it"
PAPER_LENGTH = 2048  # tokens of a sequence in the paper


def checkpoints_of(run: Path) -> Path:
    """Folder of a run's checkpoints, which its settings may have put into object storage."""
    source, values = run / CONFIG, read_settings(run).get("checkpoint") or {}
    return parse(CheckpointSettings, values, source=source, hint=RESTORE).folder(run)


def find_checkpoint(given: Path, name: str) -> Path:
    """Return a whole checkpoint: the step_* folder that is given, or the newest one of a run.

    All its files are read and compared with its manifest.

    Args:
        given: a step_* folder, a run directory, or a folder of step_* folders.
        name: setting and value, for errors.

    Raises:
        InputError: there is no checkpoint, or none is whole.
    """
    with reachable(given):
        if (given / MANIFEST).is_file():
            if reason := damage(given):
                raise InputError(f"{name} is not a whole checkpoint ({reason}); name an older one")
            return given
        if (given / CONFIG).is_file() or (given / CHECKPOINTS).is_dir():
            checkpoints = checkpoints_of(given)
        elif checkpoint_folders(given):
            checkpoints = given
        else:
            raise InputError(
                f"{name} is no run directory, step_* folder or Hugging Face Llama folder; name one"
            )
    with reachable(checkpoints):
        whole, damaged = pick_whole(checkpoints)
    if whole is None:
        found = "; ".join(damaged) or "it has none yet"
        raise InputError(f"{name} has no whole checkpoint ({found}); name another run")
    for line in damaged:
        write(f"{line}; the one before it is used", file=sys.stderr)
    return whole


@dataclass(frozen=True)
class Position:
    """What of train_state.json is read here."""

    step: int  # optimizer steps
    tokens: int  # consumed so far


@dataclass(frozen=True)
class TrainedModel:
    """A model on disk or in a store, and what is known of the text that it was trained on."""

    folder: Path  # a whole step_* folder, or one of Hugging Face's
    is_hf: bool = False
    run: Path | None = None  # run directory of a checkpoint, where it is known

    @classmethod
    def find(
        cls, place: str | Path, *, setting: str = "--checkpoint", run: Path | None = None
    ) -> "TrainedModel":
        """Find it; InputError, naming the setting, if there is none or it is not whole.

        Args:
            place: a step_* folder or a run directory (its newest whole checkpoint), or a URL of
                these; or a Hugging Face Llama folder.
            setting: that names it.
            run: run directory of a checkpoint that lies elsewhere.
        """
        given = folder_at(place, setting)
        if not is_remote(given) and (given / CONFIG_FILE).is_file():
            return cls(given, is_hf=True)
        folder = find_checkpoint(given, f"{setting}={place}")
        if run is None and not is_remote(given):
            own = given.resolve()
            parents = [own, *own.parents[:2]]  # a run, its checkpoints, or one of these
            run = next((each for each in parents if (each / CONFIG).is_file()), own.parents[1])
        return cls(folder, run=run)

    def load(self) -> Llama:
        """Load it on the CPU, in float32; its documents see each other only if they did before."""
        model = load_hf_folder(self.folder) if self.is_hf else read_model(self.folder)
        if self.data and self.data.document_mask and (origin := self._origin()):
            model.separate_documents(bos_id=origin.bos_id, eos_id=origin.eos_id)
        return model

    @property
    def position(self) -> Position | None:
        """Where a checkpoint stands in its run; None for a Hugging Face folder."""
        source = self.folder / TRAIN_STATE
        if self.is_hf:
            return None
        return parse(Position, read_json(source, hint=RESTORE), source=source, hint=RESTORE)

    @property
    def data(self) -> DataSettings | None:
        """Settings of the text that its run trains on, where the run is known."""
        values = read_settings(self.run).get("data") if self.run else None
        if self.run is None or values is None:
            return None
        return parse(DataSettings, values, source=self.run / CONFIG, hint=RESTORE)

    @property
    def trained_length(self) -> int | None:
        """Tokens of the sequences that it was trained on; None where nothing says so."""
        if self.is_hf:
            named = self._hf_values().get("max_position_embeddings")
            return named if isinstance(named, int) and named > 0 else None
        return self.data.sequence_length if self.data else None

    @property
    def default_length(self) -> int:
        """Tokens of a sequence to measure it on: as trained, of a Hugging Face model 2048 at most.

        Such a one may have positions for far longer texts than fit a device.
        """
        length = self.trained_length or PAPER_LENGTH
        return min(length, PAPER_LENGTH) if self.is_hf else length

    def data_folder(self, path: str | None = None) -> Path:
        """Folder of token shards: `path`, or embedded as its run makes it; None: its run's own, of
        a mixture the first one.
        """
        settings = self.data
        if path == MIXTURE:
            raise InputError(f"{MIXTURE} is not a folder of token shards; name one of its sources")
        if path is not None:
            return replace(settings or DataSettings(), path=path).find_folder()
        if settings is None:
            raise InputError(f"{self.folder} is in no run directory; name its text with --data")
        origin = self._origin()
        is_there = origin is not None and (Path(origin.folder) / META_FILE).is_file()
        return Path(origin.folder) if origin and is_there else settings.find_folder()

    def text(
        self, *, tokenizer: str | None = None, max_positions: int | None = None
    ) -> ExportedText:
        """Find its tokenizer, its positions and the ids around a document.

        They are those of the run's data, if it is still there; the ids stand in run.json, too.

        Args:
            tokenizer: tokenizer.json, or a name on the hub, to use instead of the data's.
            max_positions: tokens; by default the sequences it was trained on, or with RoPE scaling
                the scaled context, whichever is longer.

        Raises:
            InputError: the run is not known, or its data is another one by now and no tokenizer is
                named.
        """
        name = tokenizer and at_home(tokenizer)
        if self.is_hf:
            return self._hf_text(name, max_positions)
        settings = self.data
        if settings is None or self.run is None:
            where = self.run / CONFIG if self.run else f"the {CONFIG} of {self.folder}"
            raise InputError(
                f"{where} is missing or empty; --checkpoint must be inside its run directory, or "
                "--run name that"
            )
        if max_positions is None:
            scaling = stored_llama(self.folder).rope_scaling
            scaled = int(scaling.factor * scaling.original_sequence_length)
            max_positions = max(settings.sequence_length, scaled if scaling.enabled else 0)
        origin, folder = self._origin(), self.data_folder()
        if (folder / META_FILE).is_file():
            meta = read_meta(folder)
            splits = (settings.train_split, settings.validation_split)
            fingerprint = joint_fingerprint(meta.fingerprint(split) for split in splits)
            # A mixture's fingerprint is that of several folders; they have one tokenizer.
            same_tokenizer = (
                settings.path == MIXTURE
                and origin is not None
                and origin.tokenizer_sha256 == meta.tokenizer_sha256
            )
            if read_provenance(self.run)["data_fingerprint"] == fingerprint or same_tokenizer:
                origin = TextOrigin(str(folder), meta.bos_id, meta.eos_id)
                own = checked_tokenizer(folder, meta)
                name = name or (str(own) if own else None)
            elif name is None:
                raise InputError(
                    f"{folder} no longer holds the data of this run; name its tokenizer with "
                    "--tokenizer"
                )
        read = Tokenizer.from_str(read_tokenizer(name)) if name else None
        if origin is None:  # an old run, without its data
            return ExportedText(max_positions, read, source=name)
        if read is not None:
            read = as_in_training(read, origin.bos_id)
        return ExportedText(max_positions, read, origin.bos_id, origin.eos_id, source=name)

    def _origin(self) -> TextOrigin | None:
        """What run.json says of the text; an old one says nothing."""
        provenance = read_provenance(self.run) if self.run else {}
        if self.run is None or "data" not in provenance:
            return None
        source = self.run / PROVENANCE
        return parse(TextOrigin, provenance["data"], source=source, hint=RESTORE)

    def _hf_values(self) -> dict[str, Any]:
        return read_json(self.folder / CONFIG_FILE, hint=HINT)

    def _hf_text(self, name: str | None, max_positions: int | None) -> ExportedText:
        """Take the folder's own tokenizer, as it begins a prompt, and its config.json's ids."""
        ids = {}
        for name_of_id in ("bos", "eos"):
            found = self._hf_values().get(f"{name_of_id}_token_id")
            found = found[0] if isinstance(found, list) and found else found  # of a chat's ends
            ids[f"{name_of_id}_id"] = found if isinstance(found, int) else None
        read = None
        if name or (self.folder / TOKENIZER_FILE).is_file():
            read = Tokenizer.from_str(read_tokenizer(name or str(self.folder)))
            read.no_truncation()
            read.no_padding()
        positions = max_positions or self.trained_length or PAPER_LENGTH
        return ExportedText(positions, read, **ids, source=name or str(self.folder))

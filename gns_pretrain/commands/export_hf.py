"""Export a checkpoint for transformers: safetensors, config.json and the tokenizer.

gns-pretrain export-hf --checkpoint outputs/RUN/checkpoints/step_00001200 --out outputs/RUN/hf
python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("outputs/RUN/hf")'
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gns_pretrain.data.settings import DataSettings, TextOrigin
from gns_pretrain.data.shards import META_FILE, checked_tokenizer, joint_fingerprint, read_meta
from gns_pretrain.data.tokenization import as_in_training, read_tokenizer
from gns_pretrain.errors import InputError
from gns_pretrain.fields import at_home, path_argument, script_parser
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.model.huggingface import CONFIG_FILE, ExportedText, export_hf_folder
from gns_pretrain.model.llama import Llama
from gns_pretrain.runs.directory import CONFIG, PROVENANCE, read_settings
from gns_pretrain.runs.history import read_provenance
from gns_pretrain.system.files import must_write, parse
from gns_pretrain.system.remote import folder_at, is_remote, listed_anew, store_errors
from gns_pretrain.system.terminal import write
from gns_pretrain.training.checkpoint_reader import load_model

COPIED_BYTES = 2**24  # at a time


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="a step_* folder of a run, or its URL")
    parser.add_argument("--out", required=True, help="folder or URL to write; must not exist")
    parser.add_argument(
        "--run", type=path_argument, help="run directory of a checkpoint that is elsewhere"
    )
    parser.add_argument(
        "--tokenizer",
        help="tokenizer.json, or the name of a model on the hub (default: the data's own)",
    )
    parser.add_argument(
        "--max-positions",
        type=int,
        help="tokens, written as max_position_embeddings (default: the run's sequence length, "
        "or with RoPE scaling the scaled context, whichever is longer)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    row = export(arguments)
    if arguments.json:
        write(json.dumps(row))
        return
    line = (
        f"{row['out']}: {row['parameters']:,} parameters, up to {row['max_positions']:,} positions"
    )
    line += f", {row['tokenizer'] or 'without a tokenizer: name one with --tokenizer'}"
    if row["bos_id"] is row["eos_id"] is None:
        line += "; no bos and no eos: the run's data has none, or was not found"
    write(line)


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the folder and describe it."""
    out = folder_at(arguments.out, "--out")
    model = load_model(folder_at(arguments.checkpoint, "--checkpoint"))
    tokenizer, text = text_of_run(arguments, model.config)
    with must_write(arguments.out, setting="--out", hint="name another folder"), store_errors(out):
        (upload_hf_folder if is_remote(out) else export_hf_folder)(model, out, text)
    return {
        "out": str(arguments.out),
        "checkpoint": str(arguments.checkpoint),
        "parameters": count_parameters(model.config).total,
        "max_positions": text.max_positions,
        "tokenizer": tokenizer,
        "bos_id": text.bos_id,
        "eos_id": text.eos_id,
    }


def upload_hf_folder(model: Llama, url: Path, text: ExportedText) -> None:
    """Write the folder on this machine, then copy it; last config.json, without which none loads.

    Raises:
        InputError: there is something at the URL.
    """
    if listed_anew(url):
        raise InputError(f"--out {url} exists already; name a new folder, or remove it first")
    with tempfile.TemporaryDirectory() as here:
        folder = Path(here) / "hf"
        export_hf_folder(model, folder, text)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            with path.open("rb") as file, (url / path.name).open("wb") as copy:
                shutil.copyfileobj(file, copy, COPIED_BYTES)


def text_of_run(
    arguments: argparse.Namespace, config: LlamaConfig
) -> tuple[str | None, ExportedText]:
    """Find the tokenizer, its name first, and the ids around a document.

    They are those of the run's data, if it is still there; the ids stand in run.json, too.
    """
    run_directory = arguments.run or Path(at_home(arguments.checkpoint)).resolve().parents[1]
    run_settings = read_settings(run_directory)
    if "data" not in run_settings:
        raise InputError(
            f"{run_directory / CONFIG} is missing or empty; --checkpoint must be inside its run "
            "directory, or --run name that"
        )
    hint = "restore it"
    settings = parse(DataSettings, run_settings["data"], source=run_directory / CONFIG, hint=hint)
    scaling = config.rope_scaling
    scaled = int(scaling.factor * scaling.original_sequence_length) if scaling.enabled else 0
    max_positions = arguments.max_positions or max(settings.sequence_length, scaled)
    provenance = read_provenance(run_directory)
    origin: TextOrigin | None = None
    if "data" in provenance:
        source = run_directory / PROVENANCE
        origin = parse(TextOrigin, provenance["data"], source=source, hint=hint)
    name = arguments.tokenizer and at_home(arguments.tokenizer)
    is_there = origin is not None and (Path(origin.folder) / META_FILE).is_file()
    folder = Path(origin.folder) if origin and is_there else settings.find_folder()
    if (folder / META_FILE).is_file():
        meta = read_meta(folder)
        splits = (settings.train_split, settings.validation_split)
        fingerprint = joint_fingerprint(meta.fingerprint(split) for split in splits)
        if provenance["data_fingerprint"] == fingerprint:
            origin = TextOrigin(str(folder), meta.bos_id, meta.eos_id)
            name = name or checked_tokenizer(folder, meta)
        elif name is None:
            raise InputError(
                f"{folder} no longer holds the data of this run; name its tokenizer with "
                "--tokenizer"
            )
    tokenizer = Tokenizer.from_str(read_tokenizer(str(name))) if name else None
    if origin is None:  # an old run, without its data
        return name and str(name), ExportedText(max_positions, tokenizer)
    if tokenizer is not None:
        tokenizer = as_in_training(tokenizer, origin.bos_id)
    text = ExportedText(max_positions, tokenizer, origin.bos_id, origin.eos_id)
    return name and str(name), text

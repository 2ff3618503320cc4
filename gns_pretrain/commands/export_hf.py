"""Export a checkpoint for transformers: safetensors, config.json and the tokenizer.

gns-pretrain export-hf --checkpoint outputs/RUN/checkpoints/step_00001200 --out outputs/RUN/hf
python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("outputs/RUN/hf")'
"""

import argparse
import json
from pathlib import Path
from typing import Any

from gns_pretrain.data.settings import DataSettings
from gns_pretrain.data.shards import META_FILE, checked_tokenizer, joint_fingerprint, read_meta
from gns_pretrain.errors import InputError
from gns_pretrain.fields import script_parser
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.model.huggingface import ExportedText, export_hf_folder
from gns_pretrain.runs.directory import CONFIG, read_settings
from gns_pretrain.runs.history import read_provenance
from gns_pretrain.system.files import parse
from gns_pretrain.system.terminal import write
from gns_pretrain.training.checkpoint import load_model


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step_* folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: the data's own)")
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
    tokenizer = row["tokenizer"] or "without a tokenizer: name one with --tokenizer"
    write(
        f"{row['out']}: {row['parameters']:,} parameters, up to {row['max_positions']:,} "
        f"positions, {tokenizer}"
    )


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the folder and describe it."""
    model = load_model(arguments.checkpoint)
    text = text_of_run(arguments, model.config)
    try:
        export_hf_folder(model, arguments.out, text)
    except OSError as error:
        raise InputError(
            f"--out {arguments.out} cannot be written ({error.strerror or error}); name another "
            "folder"
        ) from error
    return {
        "out": str(arguments.out),
        "checkpoint": str(arguments.checkpoint),
        "parameters": count_parameters(model.config).total,
        "max_positions": text.max_positions,
        "tokenizer": str(text.tokenizer) if text.tokenizer else None,
        "bos_id": text.bos_id,
        "eos_id": text.eos_id,
    }


def text_of_run(arguments: argparse.Namespace, config: LlamaConfig) -> ExportedText:
    """Find the tokenizer and its ids in the run's data, if that is still where config.yaml says."""
    run_directory = arguments.checkpoint.resolve().parents[1]
    run_settings = read_settings(run_directory)
    if "data" not in run_settings:
        raise InputError(
            f"{run_directory / CONFIG} is missing or empty; --checkpoint must be inside its run "
            "directory"
        )
    hint = "restore it"
    settings = parse(DataSettings, run_settings["data"], source=run_directory / CONFIG, hint=hint)
    scaling = config.rope_scaling
    scaled = int(scaling.factor * scaling.original_sequence_length) if scaling.enabled else 0
    max_positions = arguments.max_positions or max(settings.sequence_length, scaled)
    folder = settings.find_folder()
    tokenizer = arguments.tokenizer
    if not (folder / META_FILE).is_file():
        return ExportedText(max_positions, tokenizer)
    meta = read_meta(folder)
    splits = (settings.train_split, settings.validation_split)
    fingerprint = joint_fingerprint(meta.fingerprint(split) for split in splits)
    if read_provenance(run_directory)["data_fingerprint"] != fingerprint:
        if tokenizer is None:
            raise InputError(
                f"{folder} no longer holds the data of this run; name its tokenizer with "
                "--tokenizer"
            )
        return ExportedText(max_positions, tokenizer)
    tokenizer = tokenizer or checked_tokenizer(folder, meta)
    return ExportedText(max_positions, tokenizer, meta.bos_id, meta.eos_id)

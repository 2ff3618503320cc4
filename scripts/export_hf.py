"""Export a checkpoint for transformers: safetensors, config.json and the tokenizer.

python scripts/export_hf.py --checkpoint outputs/RUN/checkpoints/step_00001200 --out my_model
python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("my_model")'
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from gns_pretrain.config.compose import read_yaml
from gns_pretrain.data.embedded import ensure_embedded
from gns_pretrain.data.settings import EMBEDDED, DataSettings
from gns_pretrain.data.shards import (
    META_FILE,
    CorpusMeta,
    check_tokenizer,
    joint_fingerprint,
    read_meta,
)
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.model.huggingface import ExportedText
from gns_pretrain.runs.directory import CONFIG, read_provenance


def main() -> int:
    """Exit code 0: the folder is written; 2: bad input, and nothing is."""
    arguments = _parser().parse_args()
    console = Console(stderr=True, soft_wrap=True)
    try:
        row = _export(arguments)
    except InputError as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        return 2
    if arguments.json:
        sys.stdout.write(json.dumps(row) + "\n")
        return 0
    tokenizer = row["tokenizer"] or "without a tokenizer: name one with --tokenizer"
    Console(soft_wrap=True).print(
        f"{row['out']}: {row['parameters']:,} parameters, up to {row['max_positions']:,} "
        f"positions, {tokenizer}",
        markup=False,
        highlight=False,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    return parser


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    from gns_pretrain.model.huggingface import export_hf_folder
    from gns_pretrain.training.checkpoint import load_model

    model = load_model(arguments.checkpoint)
    text = _text_of_run(arguments, model.config)
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


def _text_of_run(arguments: argparse.Namespace, config: LlamaConfig) -> ExportedText:
    """Tokenizer and ids of the run's data, as far as it is where config.yaml says."""
    run_config = arguments.checkpoint.resolve().parents[1] / CONFIG
    if not run_config.is_file():
        raise InputError(f"{run_config} is missing; --checkpoint must be inside its run directory")
    settings = DataSettings(**read_yaml(run_config)["data"])
    max_positions = arguments.max_positions or _max_positions(config, settings.sequence_length)
    folder = (
        ensure_embedded(vocab_size=settings.embedded_vocab_size)
        if settings.path == EMBEDDED
        else Path(settings.path)
    )
    if not (folder / META_FILE).is_file():
        return ExportedText(max_positions, arguments.tokenizer)
    meta = read_meta(folder)
    if not _is_data_of_run(meta, settings, run_config.parent):
        if arguments.tokenizer is None:
            raise InputError(
                f"{folder} no longer holds the data of this run; name its tokenizer with "
                "--tokenizer"
            )
        return ExportedText(max_positions, arguments.tokenizer)
    tokenizer = arguments.tokenizer
    if tokenizer is None and meta.tokenizer and (folder / meta.tokenizer).is_file():
        check_tokenizer(folder, meta)
        tokenizer = folder / meta.tokenizer
    return ExportedText(max_positions, tokenizer, meta.bos_id, meta.eos_id)


def _is_data_of_run(meta: CorpusMeta, settings: DataSettings, run_directory: Path) -> bool:
    splits = (settings.train_split, settings.validation_split)
    now = joint_fingerprint(meta.fingerprint(split) for split in splits)
    return bool(read_provenance(run_directory)["data_fingerprint"] == now)


def _max_positions(config: LlamaConfig, sequence_length: int) -> int:
    scaling = config.rope_scaling
    scaled = int(scaling.factor * scaling.original_sequence_length) if scaling.enabled else 0
    return max(sequence_length, scaled)


if __name__ == "__main__":
    sys.exit(main())

"""Export a checkpoint for transformers and the hub: weights, configs, tokenizer and model card.

gns-pretrain export-hf --checkpoint outputs/RUN --out outputs/RUN/hf --license apache-2.0
gns-pretrain export-hf --checkpoint outputs/RUN/checkpoints/step_00001200 --push-to-hub me/model
python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("outputs/RUN/hf")'

A repository that --push-to-hub creates is private unless --public is given; log in with
`hf auth login` or set HF_TOKEN. Nothing is said of a licence unless --license names one.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gns_pretrain.errors import InputError, needs, one_line
from gns_pretrain.fields import path_argument, script_parser
from gns_pretrain.model.config import count_parameters
from gns_pretrain.model.huggingface import CONFIG_FILE, export_hf_folder
from gns_pretrain.results.model_card import model_card
from gns_pretrain.system.files import must_write
from gns_pretrain.system.remote import folder_at, is_remote, listed_anew, store_errors
from gns_pretrain.system.terminal import write
from gns_pretrain.training.trained_model import TrainedModel

COPIED_BYTES = 2**24  # at a time


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run directory (its newest whole checkpoint), a step_* folder, or its URL",
    )
    parser.add_argument("--out", help="folder or URL to write; must not exist")
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
    parser.add_argument("--license", help="the model card's, as apache-2.0 (default: none)")
    parser.add_argument("--push-to-hub", metavar="NAME", help="repository, as me/model; private")
    parser.add_argument("--public", action="store_true", help="create it public instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    row = export(arguments)
    if arguments.json:
        write(json.dumps(row))
        return
    line = (
        f"{row['out'] or row['url']}: {row['parameters']:,} parameters, "
        f"up to {row['max_positions']:,} positions"
    )
    line += f", {row['tokenizer'] or 'without a tokenizer: name one with --tokenizer'}"
    if row["bos_id"] is row["eos_id"] is None:
        line += "; no bos and no eos: the run's data has none, or was not found"
    write(line)
    if row["url"]:
        write(f"{row['url']} ({'private' if row['private'] else 'public'})")


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the folder, upload it where asked, and describe it."""
    if not (arguments.out or arguments.push_to_hub):
        raise InputError("give --out, a folder to write, or --push-to-hub, a repository's name")
    if arguments.public and not arguments.push_to_hub:
        raise InputError("--public is for --push-to-hub alone; give both or neither")
    trained = TrainedModel.find(arguments.checkpoint, run=arguments.run)
    if trained.is_hf:
        raise InputError(
            f"--checkpoint={arguments.checkpoint} is a Hugging Face folder already; name a run or "
            "one of its checkpoints"
        )
    text = trained.text(tokenizer=arguments.tokenizer, max_positions=arguments.max_positions)
    model = trained.load()
    pushed: dict[str, Any] = {"url": None, "private": None}
    with tempfile.TemporaryDirectory() as temporary:
        out = folder_at(arguments.out or Path(temporary) / "hf", "--out")
        folder = Path(temporary) / "hf" if is_remote(out) else out
        with must_write(out, setting="--out", hint="name another folder"), store_errors(out):
            if is_remote(out) and listed_anew(out):
                raise InputError(
                    f"--out {out} exists already; name a new folder, or remove it first"
                )
            place = arguments.push_to_hub or Path(arguments.out).name
            card = model_card(
                trained, model.config, text, place=place, license_name=arguments.license
            )
            export_hf_folder(model, folder, text, card)
            if is_remote(out):
                copy_to_store(folder, out)
        if arguments.push_to_hub:
            kept = f"; the export is whole in {out}" if arguments.out else ""
            pushed = push_to_hub(folder, arguments.push_to_hub, public=arguments.public, kept=kept)
    return {
        "out": arguments.out and str(arguments.out),
        "checkpoint": str(trained.folder),
        "parameters": count_parameters(model.config).total,
        "max_positions": text.max_positions,
        "tokenizer": text.source,
        "bos_id": text.bos_id,
        "eos_id": text.eos_id,
        **pushed,
    }


def copy_to_store(folder: Path, url: Path) -> None:
    """Copy the folder to a URL; last config.json, without which none loads."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        with path.open("rb") as file, (url / path.name).open("wb") as copy:
            shutil.copyfileobj(file, copy, COPIED_BYTES)


def push_to_hub(folder: Path, name: str, *, public: bool, kept: str) -> dict[str, Any]:
    """Upload a folder into a repository, created if it is not there; one keeps its visibility.

    Args:
        kept: ends the error, where the upload failed.
    """
    with needs("huggingface", "--push-to-hub needs huggingface_hub"):
        import huggingface_hub
    api = huggingface_hub.HfApi()
    try:
        repository = api.create_repo(name, private=not public, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload a gns-pretrain export",
        )
        private = api.repo_info(repository).private
    except Exception as error:  # of the network, the hub or the login: its libraries have many
        raise InputError(
            f"--push-to-hub={name} failed ({one_line(error)}); check the name, the network, and "
            f"the login with `hf auth whoami`{kept}"
        ) from error
    return {"url": f"{api.endpoint}/{repository}", "private": private}

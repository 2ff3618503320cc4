"""Turn C4, or any text in its schema, into token shards.

    python scripts/prepare_data.py --out data/c4 --tokenizer meta-llama/Llama-3.2-1B \\
        --max-tokens 4_000_000_000
    python scripts/prepare_data.py --out data/c4 --tokenizer tokenizer.json \\
        --train 'c4/en/c4-train.*.json.gz' --validation 'c4/en/c4-validation.*.json.gz'
    python scripts/prepare_data.py --out data/mine --train-bpe 32_000 \\
        --train 'texts/*.parquet' --validation-fraction 0.01

Killed and started again with the same settings, it goes on from the last whole shard.
"""

import argparse
import json
import sys
from dataclasses import fields
from typing import Any

from rich.console import Console

from gns_pretrain.data.prepare.prepare import prepare
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.errors import InputError, TrainingError


def main() -> int:
    """Exit code 0: the folder is finished; 2: bad input; 3: a worker was killed; 130: Ctrl-C."""
    arguments = vars(_parser().parse_args())
    as_json = arguments.pop("json")
    console = Console(stderr=True, soft_wrap=True)
    try:
        row = prepare(PrepareSettings(**arguments))
    except InputError as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        return 2
    except TrainingError as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        return 3
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from the last whole shard")
        return 130
    if as_json:
        sys.stdout.write(json.dumps(row) + "\n")
        return 0
    Console(soft_wrap=True).print(_summary(row), markup=False, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = {field.name: field.default for field in fields(PrepareSettings)}

    def add(flag: str, about: str, **options: Any) -> None:
        value = default.get(flag.removeprefix("--").replace("-", "_"))
        told = f" (default: {value})" if isinstance(value, int | float | str) else ""
        parser.add_argument(flag, help=about + told, default=argparse.SUPPRESS, **options)

    add("--out", "folder to write; the same command again goes on with it", required=True)
    add("--source", "default: local if --train is given, else hub", choices=("hub", "local"))
    add("--dataset", "data set on the hub, with a column `text`")
    add("--dataset-config", "its configuration; en for C4")
    add("--train", "files or globs: .json.gz .jsonl.gz .json .jsonl .parquet", nargs="+")
    add("--validation", "files or globs of the validation split", nargs="+")
    add("--validation-fraction", "of the training documents, held out by hash", type=float)
    add("--tokenizer", "tokenizer.json, or the name of a model on the hub")
    add("--train-bpe", "entries of a byte-level BPE to train instead", type=int)
    add("--train-bpe-documents", "first documents that it is trained on", type=int)
    boolean = argparse.BooleanOptionalAction
    add("--bos", "a beginning-of-sequence token before each document", action=boolean)
    add("--eos", "an end-of-sequence token after each document", action=boolean)
    add("--bos-token", "its name in the tokenizer, if it is an unusual one")
    add("--eos-token", "its name in the tokenizer, if it is an unusual one")
    add("--shard-tokens", "tokens in a shard; a kill costs at most one", type=int)
    add("--max-tokens", "stop the training split there; default: all", type=int)
    add("--max-validation-tokens", "stop the validation split there; default: all", type=int)
    add("--workers", "processes; 0: one a core", type=int)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _summary(row: dict[str, Any]) -> str:
    splits = ", ".join(
        f"{name} {split['tokens']:,} tokens of {split['documents']:,} documents"
        for name, split in row["splits"].items()
    )
    rate = row["tokens_per_second"]
    speed = f"; {row['tokens_written']:,} tokens at {rate:,} tokens/s" if rate else ""
    return f"{row['status']}: {row['folder']}: {splits}; {row['dtype']}{speed}"


if __name__ == "__main__":
    sys.exit(main())

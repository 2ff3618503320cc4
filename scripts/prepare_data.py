"""Turn C4, or any text in its schema, into token shards.

    python scripts/prepare_data.py --out data/c4 --tokenizer meta-llama/Llama-3.2-1B \\
        --max-tokens 4_000_000_000
    python scripts/prepare_data.py --out data/c4 --tokenizer tokenizer.json \\
        --train 'c4/en/c4-train.*.json.gz' --validation 'c4/en/c4-validation.*.json.gz'
    python scripts/prepare_data.py --out data/mine --train-bpe 32_000 \\
        --train 'texts/*.parquet' --validation-fraction 0.01

Killed and restarted with the same settings, it resumes from the last whole shard.
"""

import argparse
import json
import sys
from typing import Any

from gns_pretrain.data.prepare.prepare import prepare
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.errors import InputError, TrainingError, print_error
from gns_pretrain.fields import add_options, from_options


def main() -> int:
    """Exit code 0: the folder is finished; 2: bad input; 3: a worker was killed; 130: Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, PrepareSettings)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args()
    try:
        row = prepare(from_options(PrepareSettings, options))
    except (InputError, TrainingError) as error:
        return print_error(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command resumes from the last whole shard\n")
        return 130
    sys.stdout.write((json.dumps(row) if options.json else _summary(row)) + "\n")
    return 0


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

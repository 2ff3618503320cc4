"""Turn C4, or text of your own, into token shards.

    gns-pretrain prepare-data --out data/c4 --tokenizer meta-llama/Llama-3.2-1B \\
        --max-tokens 4_000_000_000
    gns-pretrain prepare-data --out data/c4 --tokenizer tokenizer.json \\
        --train 'c4/en/c4-train.*.json.gz' --validation 'c4/en/c4-validation.*.json.gz'
    gns-pretrain prepare-data --out data/mine --train-bpe 32_000 \\
        --train 'texts/*.txt' 'more/*.jsonl.zst' --text-key content --validation-fraction 0.01

Killed and restarted with the same settings, it resumes from the last whole shard.
"""

import json
import sys
from typing import Any

from gns_pretrain.data.prepare.prepare import prepare
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.errors import counted
from gns_pretrain.fields import add_options, from_options, script_parser
from gns_pretrain.system.terminal import write


def main() -> None:
    parser = script_parser(__doc__)
    add_options(parser, PrepareSettings)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args()
    try:
        row = prepare(from_options(PrepareSettings, options))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command resumes from the last whole shard\n")
        sys.exit(130)
    write(json.dumps(row) if options.json else _summary(row))


def _summary(row: dict[str, Any]) -> str:
    splits = ", ".join(
        f"{name} {split['tokens']:,} tokens of {counted(split['documents'], 'document')}"
        + (f" ({counted(bad, 'bad record')} left out)" if (bad := split["skipped_records"]) else "")
        for name, split in row["splits"].items()
    )
    rate = row["tokens_per_second"]
    speed = f"; {row['tokens_written']:,} tokens at {rate:,} tokens/s" if rate else ""
    return f"{row['status']}: {row['folder']}: {splits}; {row['dtype']}{speed}"

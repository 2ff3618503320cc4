"""Turn labelled images into a folder that runs read: decoded once, of one size.

    gns-pretrain prepare-images --out data/cifar10 --dataset uoft-cs/cifar10 --validation test
    gns-pretrain prepare-images --out data/cifar10 \\
        --train 'cifar10/train-*.parquet' --validation 'cifar10/test-*.parquet'
    gns-pretrain prepare-images --out data/imagewoof64 --size 64 \\
        --train imagewoof2/train --validation imagewoof2/val

A folder of images has one folder for each class. The folder written is whole or not there.
"""

import json
import sys
from typing import Any

from gns_pretrain.data.prepare.images import PrepareImagesSettings, prepare_images
from gns_pretrain.fields import add_options, from_options, script_parser
from gns_pretrain.system.terminal import write


def main() -> None:
    parser = script_parser(__doc__)
    add_options(parser, PrepareImagesSettings)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args()
    try:
        row = prepare_images(from_options(PrepareImagesSettings, options))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing is kept\n")
        sys.exit(130)
    write(json.dumps(row) if options.json else _summary(row))


def _summary(row: dict[str, Any]) -> str:
    splits = ", ".join(f"{split} {count:,}" for split, count in row["images"].items())
    return (
        f"{row['status']}: {row['folder']}: {splits} images of {row['height']} x {row['width']} x "
        f"{row['channels']} in {row['classes']} classes; {row['seconds']:.0f} s"
    )

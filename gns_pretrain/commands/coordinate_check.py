"""Check whether learning rates transfer between widths, before a sweep is paid for.

    gns-pretrain coordinate-check model=demo optimizer=muon model.parametrization=mup
    gns-pretrain coordinate-check model=llama3_160m data=shards optimizer=adamw --widths 192 384 768

With the settings of a run, at several widths (heads and ffn_dim grow with them): how far a few
steps at the peak learning rate move the outputs of each kind of layer, as a root mean square, and
the power of the width by which that grows. On the CPU.
"""

import json

from hydra import compose, initialize_config_dir
from rich.table import Table

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.hydra_errors import as_input_error
from gns_pretrain.config.register import CONFIG_FOLDER, register_configs
from gns_pretrain.config.schema import Config
from gns_pretrain.config.typed import as_typed
from gns_pretrain.errors import OneLineError
from gns_pretrain.fields import add_options, from_options, script_parser
from gns_pretrain.launch.coordinate_check import (
    LIMIT,
    Change,
    CoordinateCheckRequest,
    coordinate_check,
)
from gns_pretrain.system.terminal import Console, write


def main() -> None:
    parser = script_parser(__doc__)
    add_options(parser, CoordinateCheckRequest)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args()
    request = from_options(CoordinateCheckRequest, options)
    changes = coordinate_check(composed(request.settings), request)
    if options.json:
        shown = {each.layer: {"rms": each.rms, "exponent": each.exponent} for each in changes}
        write(json.dumps({"widths": request.widths, "layers": shown}))
        return
    Console(soft_wrap=True).print(table_of(changes, request))
    most = max(changes, key=lambda each: abs(each.exponent))
    found = f"{most.layer}: change as width^{most.exponent:.2f}"
    verdict = "the best learning rate stays, as far as a few steps can show"
    if abs(most.exponent) > LIMIT:
        verdict = "the best learning rate moves with the width"
    write(f"{found}: {verdict} (limit {LIMIT})")


def composed(words: list[str]) -> Config:
    """The settings of a run, from the words of its command line."""
    words = list(map(as_typed, words))
    register_configs()
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            return settings_from(compose("train", words), words)
    except OneLineError:
        raise
    except Exception as error:
        raise as_input_error(error, words) from error


def table_of(changes: list[Change], request: CoordinateCheckRequest) -> Table:
    """Format one row for each kind of layer."""
    table = Table(title=f"root mean square change of outputs in {request.steps} steps, by width")
    table.add_column("")
    for column in (*map(str, request.widths), "power of width"):
        table.add_column(column, justify="right")
    for each in changes:
        table.add_row(each.layer, *(f"{rms:.2e}" for rms in each.rms), f"{each.exponent:+.2f}")
    return table

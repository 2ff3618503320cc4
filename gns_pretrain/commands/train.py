"""Train a Llama: `gns-pretrain train [group=choice] [setting=value] ...`; see README.md."""

import os
import sys
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.hydra_errors import as_input_error
from gns_pretrain.config.register import CONFIG_FOLDER, register_configs
from gns_pretrain.config.typed import as_typed
from gns_pretrain.errors import InputError, OneLineError, print_error
from gns_pretrain.launch.sweep import failed_runs_raise
from gns_pretrain.launch.train import launch


def main() -> None:
    """Let Hydra compose the settings of the command line; train a run, or start a sweep's."""
    sys.argv[1:] = map(as_typed, sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors of composition reach the lines below
    start = hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="train")
    try:
        register_configs()
        with failed_runs_raise():
            start(train)()
    except OneLineError:
        raise
    except Exception as error:
        raise as_input_error(error, given_overrides()) from error


def train(node: DictConfig) -> None:
    """Check the settings, then train; exits with the code of a run that is not finished."""
    try:
        code = launch(settings_from(node, HydraConfig.get().overrides.task))
    except InputError as error:  # Hydra would add a line of its own
        code = print_error(error)
    if code:
        sys.exit(code)


def given_overrides() -> list[str]:
    """The command line's settings, a --config-dir among them as Hydra's search path."""
    given = get_args_parser().parse_args()
    if given.config_dir is None:
        return given.overrides
    return [*given.overrides, f"hydra.searchpath=[file://{Path(given.config_dir).resolve()}]"]

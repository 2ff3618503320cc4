"""Train a Llama: `python train.py [group=choice] [setting=value] ...`; see README.md."""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.hydra_errors import as_input_error
from gns_pretrain.config.register import register_configs
from gns_pretrain.errors import InputError, OneLineError, print_error
from gns_pretrain.launch.sweep import failed_runs_raise
from gns_pretrain.launch.train import launch
from gns_pretrain.system.processes import rank_process


@hydra.main(version_base="1.3", config_path="gns_pretrain/conf", config_name="train")
def main(node: DictConfig) -> None:
    """Check the settings, then train."""
    try:
        code = launch(settings_from(node, HydraConfig.get().overrides.task))
    except InputError as error:
        code = print_error(error)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors of composition reach the lines below
    with rank_process():
        try:
            register_configs()
            with failed_runs_raise():
                main()
        except OneLineError as error:
            sys.exit(print_error(error))
        except Exception as error:
            sys.exit(print_error(as_input_error(error, sys.argv[1:])))

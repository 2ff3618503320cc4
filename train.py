"""Train a Llama: `python train.py [group=choice] [setting=value] ...`; see README.md."""

import os
import sys

import hydra
from omegaconf import DictConfig

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.hydra_errors import as_input_error
from gns_pretrain.config.schema import register_schemas
from gns_pretrain.errors import InputError, TrainingError
from gns_pretrain.launch.sweep import failure_of_sweep
from gns_pretrain.launch.train import launch, say


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(node: DictConfig) -> None:
    """Check the settings, then train."""
    try:
        code = launch(settings_from(node))
    except InputError as error:
        code = say(error)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    register_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors of composition reach the lines below
    try:
        main()
    except (InputError, TrainingError) as error:  # of a sweep as a whole
        sys.exit(say(error))
    except Exception as error:
        failure = failure_of_sweep() if isinstance(error, ValueError) else None
        # Optuna's way to say that no trial ended well is a ValueError.
        sys.exit(say(failure or as_input_error(error, sys.argv[1:])))
    if failure := failure_of_sweep():
        sys.exit(say(failure))

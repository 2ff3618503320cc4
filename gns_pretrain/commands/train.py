"""Train a run: `gns-pretrain train [group=choice] [setting=value] ...`; see README.md."""

import os
import sys
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.hydra_errors import as_input_error
from gns_pretrain.config.register import CONFIG_FOLDER, choices_of, register_configs
from gns_pretrain.config.typed import as_typed
from gns_pretrain.errors import InputError, OneLineError, print_error
from gns_pretrain.launch.sweep import failed_runs_raise
from gns_pretrain.launch.train import launch
from gns_pretrain.system.terminal import write

HELP = """\
Pretrain a Llama, measure the gradient noise scale, and let it choose the batch size.

usage: {command} [group=choice] [setting=value] ...

  model=small token_budget=10M optimizer.lr=1e-3    choices and settings, in any order
  launch.nproc_per_node=8                           FSDP2 on 8 ranks of this machine
  data=shards data.path=data/c4                     text that gns-pretrain prepare-data has made
  workload=cifar10                                  ResNet-18 on images in place of a Llama on text
  optimizer=muon noise_scale=nuclear                measure the noise scale of Muon's geometry
  +experiment=demo/adaptive                         let the batch follow it
  dry_run=true                                      check all, show the plan, write nothing
  -m optimizer.lr=1e-3,2e-3 seed=0,1                a sweep: every combination
  --cfg job                                         all settings, with their values
  --config-dir mine                                 also choices from a folder of YAML files

The run is outputs/<run_name>/, by default named by model, optimizer, seed and what is set here;
the same command resumes it. Tab completion: eval "$({command} -sc install=bash)"

{groups}
"""
SHOWN_GROUPS = (
    *("model", "data", "optimizer", "schedule", "noise_scale", "batch_size", "parallel", "metrics"),
    *("workload", "scale", "+experiment/demo", "+sweep"),
)


def main() -> None:
    """Let Hydra compose the settings of the command line; train a run, or start a sweep's."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        register_configs()
        write(help_text())
        return
    sys.argv[1:] = map(as_typed, sys.argv[1:])
    if unknown := get_args_parser().parse_known_args()[1]:
        raise InputError(
            f"{unknown[0]}: there is no such option; settings are written without dashes, "
            "as in optimizer.lr=1e-3; see --help"
        )
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors of composition reach the lines below
    start = hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="train")
    try:
        register_configs()
        with failed_runs_raise(), TemporaryDirectory() as folder:
            if "dry_run=true" in sys.argv:  # a sweep's settings, which Hydra itself writes
                sys.argv.append(f"hydra.sweep.dir={folder}")
            start(train)()
    except OneLineError:
        raise
    except Exception as error:
        raise as_input_error(error, given_overrides()) from error


def help_text() -> str:
    """What the command does, in a screen."""
    groups = [
        f"{shown:16} {textwrap.shorten(', '.join(choices_of(shown.lstrip('+'))), 80)}"
        for shown in SHOWN_GROUPS
    ]
    command = sys.argv[0] if sys.argv[0].startswith("gns-pretrain") else "python train.py"
    return HELP.format(command=command, groups="\n".join(groups))


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

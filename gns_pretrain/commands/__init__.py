"""The commands: `gns-pretrain NAME ...` runs the `main` of one module, as train.py and scripts/ do.

Nothing heavy is imported before a command is known.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import NamedTuple

from gns_pretrain.errors import EXIT_FINISHED, InputError, OneLineError, print_error
from gns_pretrain.system.processes import rank_process
from gns_pretrain.system.streams import outlive_output

# Before torch is imported: threads that wait for one another then sleep instead of spinning. On two
# cores that others used too, the small model trained 1.5 to 15 times as fast for it; on the same
# cores left alone it cost 6 % (micro-batches of 8 sequences) to 24 % (of 2).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Command(NamedTuple):
    """One command.

    Its main reads sys.argv and returns the exit code, None for 0.
    """

    summary: str
    module: str
    is_rank: bool = False  # may join a process group, under torchrun or by its own ranks


COMMANDS = {
    "train": Command("train a run, or with --multirun a sweep", f"{__name__}.train", is_rank=True),
    "demo": Command("train an adaptive and a constant batch, compare them", f"{__name__}.demo"),
    "prepare-data": Command("turn text into token shards", f"{__name__}.prepare_data"),
    "prepare-images": Command("turn images into arrays", f"{__name__}.prepare_images"),
    "measure-noise": Command(
        "noise scale of a checkpoint, without training", f"{__name__}.measure_noise", is_rank=True
    ),
    "evaluate": Command(
        "loss, bits per byte and tasks of checkpoints", f"{__name__}.evaluate", is_rank=True
    ),
    "generate": Command("text from a checkpoint", f"{__name__}.generate"),
    "status": Command("state of the runs in a folder", f"{__name__}.status"),
    "upload-wandb": Command("upload finished runs to W&B", f"{__name__}.upload_wandb"),
    "wandb-workspace": Command("a W&B workspace for a table", f"{__name__}.wandb_workspace"),
    "make-table": Command("a table of the paper, from run records", f"{__name__}.make_table"),
    "plot-runs": Command("draw runs and published curves", f"{__name__}.plot_runs"),
    "report": Command("a page to compare runs in a browser", f"{__name__}.report"),
    "best-of-search": Command("best points of searches", f"{__name__}.best_of_search"),
    "critical-batch": Command("critical batch from branches", f"{__name__}.critical_batch"),
    "replay": Command("a policy's choices on a recorded run", "gns_pretrain.results.replay"),
    "noisy-quadratic": Command(
        "batch sizes and policies on a problem with known losses", f"{__name__}.noisy_quadratic"
    ),
    "coordinate-check": Command(
        "whether learning rates transfer between widths", f"{__name__}.coordinate_check"
    ),
    "export-hf": Command("export a checkpoint for transformers", f"{__name__}.export_hf"),
}


def main() -> None:
    """Run `gns-pretrain NAME ...`, and exit with the command's code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(overview())
    elif name in COMMANDS:
        sys.argv[:2] = [f"gns-pretrain {name}"]
        run_command(name)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(COMMANDS)}"
        sys.exit(print_error(InputError(f"{name}: there is no such command; {hint}")))


def run_command(name: str) -> None:
    """Run a command with the options in sys.argv[1:], and exit with its code."""
    outlive_output(logs=COMMANDS[name].is_rank)
    with rank_process() if COMMANDS[name].is_rank else nullcontext():
        try:
            with loading_notice() if COMMANDS[name].is_rank else nullcontext():
                command = load(name)
            sys.exit(command.main() or EXIT_FINISHED)
        except OneLineError as error:
            sys.exit(print_error(error))


@contextmanager
def loading_notice() -> Iterator[None]:
    """Show on a terminal what the first seconds go by with; it vanishes with the block."""
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    completes = {"-sc", "--shell_completion"} & set(sys.argv)  # while somebody types
    if not first or completes or not sys.stderr.isatty():
        yield
        return
    print("loading torch ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def load(name: str) -> ModuleType:
    """Import a command's module; InputError where packages that it needs are not installed."""
    try:
        return importlib.import_module(COMMANDS[name].module)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "gns_pretrain":
            raise
        raise InputError(
            f"gns-pretrain {name} needs {package}; pip install 'gns-pretrain[train]'"
        ) from error


def overview() -> str:
    """List the commands."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {command.summary}\n" for name, command in COMMANDS.items()]
    return f"usage: gns-pretrain COMMAND ...; COMMAND --help explains one\n\n{''.join(rows)}"

"""Upload runs to W&B after they have trained, from their records.

    gns-pretrain upload-wandb outputs                          every run in a folder
    gns-pretrain upload-wandb outputs/RUN --project study      one, into another project
    gns-pretrain upload-wandb outputs/RUN --mode offline       files for `wandb sync`

A run looks as if metrics=wandb had shown it while it trained: its id, name, group, tags and
settings are those of its directory. Repeated, the command adds the steps that W&B does not have.
"""

from gns_pretrain.errors import InputError, OneLineError, TrainingError, counted
from gns_pretrain.fields import path_argument, script_parser
from gns_pretrain.launch.upload import upload
from gns_pretrain.runs.directory import run_directories
from gns_pretrain.system.terminal import write


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("folders", nargs="+", type=path_argument, help="run directories or folders of them")
    option("--project", help="instead of the run's metrics.wandb.project")
    option("--entity", help="user or team, instead of the run's")
    option("--mode", choices=("online", "offline"), help="instead of the run's")
    given = parser.parse_args()
    names = ("project", "entity", "mode")
    changed = {name: value for name in names if (value := getattr(given, name))}
    runs = [run for folder in given.folders for run in run_directories(folder)]
    if not runs:
        raise InputError(f"{given.folders[0]} holds no run; name a run, or a folder of some")
    failures = []
    for run in runs:
        try:
            number = upload(run, log=write, changed=changed)
            write(f"{run}: {counted(number, 'record')}")
        except OneLineError as error:
            failures.append(str(error))
    if len(failures) > 1:
        write(*failures)
    if failures:
        alone = len(runs) == 1
        some = f"{len(failures)} of {counted(len(runs), 'run')} are not uploaded"
        raise TrainingError(failures[0] if alone else some)

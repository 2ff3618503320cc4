"""Save a W&B workspace for a table: the command `gns-pretrain wandb-workspace`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("wandb-workspace")

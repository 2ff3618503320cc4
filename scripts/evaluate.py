"""Evaluate checkpoints on text and tasks: the command `gns-pretrain evaluate`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("evaluate")

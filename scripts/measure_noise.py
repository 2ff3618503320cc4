"""Measure the noise scale of a checkpoint: the command `gns-pretrain measure-noise`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("measure-noise")

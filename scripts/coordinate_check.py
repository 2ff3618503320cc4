"""Check whether learning rates transfer: the command `gns-pretrain coordinate-check`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("coordinate-check")

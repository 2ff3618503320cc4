"""Show the state of runs: the command `gns-pretrain status`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("status")

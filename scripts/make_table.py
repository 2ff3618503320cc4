"""Print a table of the paper: the command `gns-pretrain make-table`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("make-table")

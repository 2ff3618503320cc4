"""The critical batch, from branches of runs: the command `gns-pretrain critical-batch`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("critical-batch")

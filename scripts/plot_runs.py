"""Draw runs: the command `gns-pretrain plot-runs`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("plot-runs")

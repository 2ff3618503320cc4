"""The demo of `make train`: the command `gns-pretrain demo`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("demo")

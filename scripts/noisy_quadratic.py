"""Try policies on a noisy quadratic: the command `gns-pretrain noisy-quadratic`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("noisy-quadratic")

"""Generate text from a checkpoint: the command `gns-pretrain generate`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("generate")

"""Export a checkpoint for transformers: the command `gns-pretrain export-hf`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("export-hf")

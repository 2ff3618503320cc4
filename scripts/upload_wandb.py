"""Upload finished runs to W&B: the command `gns-pretrain upload-wandb`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("upload-wandb")

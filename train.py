"""Train a Llama: `python train.py ...` is the command `gns-pretrain train ...`; see README.md."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("train")

"""What searches found: the command `gns-pretrain best-of-search`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("best-of-search")

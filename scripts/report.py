"""Put runs on one page to explore: the command `gns-pretrain report`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("report")

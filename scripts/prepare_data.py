"""Turn text into token shards: the command `gns-pretrain prepare-data`."""

from gns_pretrain.commands import run_command

if __name__ == "__main__":
    run_command("prepare-data")

"""`python -m gns_pretrain`, the same as the command gns-pretrain."""

from gns_pretrain.commands import main

if __name__ == "__main__":
    main()

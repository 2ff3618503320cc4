"""Everything that talks to other ranks; the only package that names torch.distributed."""

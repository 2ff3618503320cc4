"""Behind `gns-pretrain prepare-data`: text to token shards."""

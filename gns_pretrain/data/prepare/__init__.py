"""Behind scripts/prepare_data.py: text to token shards."""

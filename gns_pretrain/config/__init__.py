"""Settings: the schema, its checks, what Hydra composes and how its errors read."""

"""Run directories: what identifies a run, its lock and the history of its starts."""

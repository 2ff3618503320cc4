"""From a command to the ranks that train: build, start, report failures, requeue, sweep."""

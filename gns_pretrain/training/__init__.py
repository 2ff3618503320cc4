"""The training loop and what it steps, evaluates, schedules, saves and records."""

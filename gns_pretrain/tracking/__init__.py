"""What a run tells: metrics.jsonl is the record; console, W&B and TensorBoard are views of it."""

"""What a run records: metrics.jsonl is the truth; console, W&B and TensorBoard are views of it."""

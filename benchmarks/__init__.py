"""Behind scripts/benchmark.py: where a step's time goes, how fast it is, and what it should cost.

What measures one part alone stands beside it: `model/benchmark.py`, `data/benchmark.py`,
`optim/benchmark.py` and `noise_benchmark.py`.
"""

"""Measure this code's speed, each thing by a sub-command.

python scripts/benchmark.py model                      against transformers, same shape
python scripts/benchmark.py data                       tokens/s of reading and preparation
python scripts/benchmark.py noise_scale --ranks 1 2    what a measurement costs a step
python scripts/benchmark.py optimizer                  Muon against torch's, sign rules
python scripts/benchmark.py profile --trace out.json   where a step's time goes
python scripts/benchmark.py speed --model llama3_160m  tokens/s, share of the matmul rate, Muon
python scripts/benchmark.py startup                    from `python train.py` to the first step
python scripts/benchmark.py memory                     growth over 1,000 steps
python scripts/benchmark.py roofline                   FLOPs and bytes on 8 and 64 GPUs, an estimate
python scripts/benchmark.py all --json FILE            everything; --quick: smoke test
"""

import sys

from benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], about=__doc__))

from pathlib import Path

import pytest

from benchmarks.cost_model import Roofline, StepCost
from gns_pretrain.model.config import LlamaConfig

DOCUMENT = Path(__file__).parents[3] / "docs" / "performance.md"

# One block: wq, wk, wv, wo 4 x 4, w1, w2, w3 6 x 4, so 64 + 72 = 136 weights, and two norms of 4.
MODEL = LlamaConfig(
    name="test", dim=4, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=6, vocab_size=10
)
IN_BLOCK, ROOT = 136 + 8, 2 * 40 + 4


def cost(num_ranks, num_shards):
    return StepCost(MODEL, num_ranks, num_shards, sequences=1, accumulation=3, sequence_length=5)


def work(phases):
    return {phase.name: phase.work for phase in phases}


def test_traffic_of_a_step_by_hand():
    # 8 ranks in 2 groups of 4: a rank gets 3/4 of what it gathers, in bfloat16, the block twice and
    # the root once for each of three micro-batches; gradients go once, in float32.
    phases = work(cost(8, 4).step())
    assert phases["all-gather"] == 3 * 2 * (2 * IN_BLOCK + ROOT) * 3 / 4
    assert phases["reduce-scatter"] == 4 * (IN_BLOCK + ROOT) * 3 / 4
    # Twice (R - 1) / R of the shard, R = 2.
    assert phases["all-reduce over replicas"] == 4 * (IN_BLOCK + ROOT) / 4


def test_matmuls_of_a_step_by_hand():
    # 15 tokens, 6 operations a weight of block, last norm and output, and attention of 6 L D T.
    phases = work(cost(1, 1).step())
    blocks = phases["blocks, forward"] + phases["blocks, backward"]
    assert phases["output matrix"] == 6 * 15 * 40
    assert blocks == pytest.approx(15 * (6 * (IN_BLOCK + 4) + 6 * 1 * 4 * 5))


def test_newton_schulz_by_hand():
    # Five steps of 4 s^2 l + 2 s^3: 4 x 384 + 3 x 512 operations a step on one rank.
    phases = work(cost(1, 1).muon())
    assert phases["Muon: Newton-Schulz"] == 5 * (4 * 384 + 3 * 512)


def test_a_measurement_by_hand():
    manhattan = work(cost(4, 4).manhattan())
    assert manhattan["Manhattan: reduce-scatter"] == 3 * 4 * (IN_BLOCK + ROOT) * 3 / 4
    nuclear = work(cost(4, 4).nuclear())
    # Seven float64 Grams of 4 x 4 for each of three samples.
    assert nuclear["Nuclear: Grams to owners"] == 3 * 7 * 8 * 16 * 3 / 4
    assert nuclear["Nuclear: Grams"] == 3 * 2 * (4 * 64 + 3 * 96)
    # Seven matrices on four ranks: the busiest has two, each with two roots of 36 products.
    assert nuclear["Nuclear: square roots"] == 2 * 2 * 36 * 2 * 64


def test_documented_tables_are_what_the_command_prints():
    (row,) = Roofline().run()
    assert row["markdown"] in DOCUMENT.read_text()

import pytest

from benchmarks.harness import this_process
from benchmarks.optimizer import Optimizer
from gns_pretrain.model.config import LlamaConfig

# 16 x 16 twice, 8 x 16 twice, 24 x 16 three times.
BLOCK = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16


class SmallOptimizer(Optimizer):
    def shape(self):
        return LlamaConfig(
            name="test",
            dim=16,
            num_layers=3,
            num_heads=2,
            num_kv_heads=1,
            ffn_dim=24,
            vocab_size=31,
        )


def test_both_muons_are_timed_on_the_same_updates():
    row = SmallOptimizer(layers=2, pairs=3).compare_muon(this_process())
    assert (row["matrices"], row["parameters"]) == (2 * 7, 2 * BLOCK)
    # torch's Newton-Schulz rounds to 8 bits some 15 times, each up to 3.4445 times as steep.
    assert 0 < row["relative_difference"] < 3.4445 * 15 * 2**-9
    low, high = row["times_as_fast_quartiles"]
    assert low <= row["times_as_fast"] <= high


@pytest.mark.parametrize(("momentum", "name"), [(0.0, "signsgd"), (0.9, "signum")])
def test_sign_rule_is_timed_against_one_pass_over_its_tensors(momentum, name):
    row = SmallOptimizer(pairs=3, eager=True).measure_sign_rule(momentum, this_process())
    assert (row["measured"], row["parameters"]) == (name, 3 * BLOCK)
    low, high = row["times_the_floor_quartiles"]
    assert low <= row["times_the_floor"] <= high

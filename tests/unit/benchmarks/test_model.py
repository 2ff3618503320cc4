import sys

import pytest

from benchmarks.model import Model
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, count_parameters
from gns_pretrain.model.flops import flops_per_token


def config(**changes):
    values = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24}
    return LlamaConfig(name="test", vocab_size=31, **(values | changes))


class SmallModel(Model):
    tied = False

    def shape(self):
        return config(tie_embeddings=self.tied)


class SmallTiedModel(SmallModel):
    tied = True


def test_flops_by_hand():
    # Attention adds 6 * L * D * T = 6 * 2 * 16 * 100 to 6 for each parameter that multiplies.
    shape = config()
    flops = 6 * count_parameters(shape).with_output + 6 * 2 * 16 * 100
    assert flops_per_token(shape, 100) == flops


@pytest.mark.parametrize("command", [SmallModel, SmallTiedModel])
def test_both_models_compute_the_same_loss_and_are_timed(command):
    (row,) = command(batch_size=2, sequence_length=8, pairs=3).run()
    assert abs(row["loss_difference"]) < 1e-5
    low, high = row["ratio_quartiles"]
    assert low <= row["ratio"] <= high
    assert row["tokens_per_second"] > 0


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'gns-pretrain\[huggingface\]'"):
        list(SmallModel(batch_size=2, sequence_length=8, pairs=3).run())

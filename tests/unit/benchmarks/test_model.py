import sys

import pytest
import torch

from benchmarks.model import compare_with_transformers, flops_per_token
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, count_parameters


def config(**changes):
    values = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24}
    return LlamaConfig(name="test", vocab_size=31, **(values | changes))


def test_flops_by_hand():
    # 1,112 = 2 * 16 * 16 + 2 * 16 * 8 + ... is counted elsewhere; attention adds 6 * 2 * 16 * 100.
    shape = config()
    parameters = count_parameters(shape).with_output
    assert flops_per_token(shape, 100) == 6 * parameters + 6 * 2 * 16 * 100


def test_both_models_compute_the_same_loss_and_are_timed():
    for tied in (False, True):
        row = compare_with_transformers(
            config(tie_embeddings=tied),
            batch_size=2,
            sequence_length=8,
            pairs=3,
            device=torch.device("cpu"),
        )
        assert abs(row["loss_difference"]) < 1e-5
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio"] <= high
        assert row["tokens_per_second"] > 0
        assert row["flops_share"] is None


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'gns-pretrain\[huggingface\]'"):
        compare_with_transformers(
            config(), batch_size=2, sequence_length=8, pairs=3, device=torch.device("cpu")
        )

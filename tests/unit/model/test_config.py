from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, RopeScaling, count_parameters
from gns_pretrain.model.llama import Llama

CONFIGS = Path(__file__).parents[3] / "gns_pretrain" / "conf" / "model"


def from_yaml(name, **changes):
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml")) | changes
    del values["defaults"]
    scaling = RopeScaling(**values.pop("rope_scaling", {}))
    return LlamaConfig(**values, rope_scaling=scaling)


def config(**changes):
    values = {
        "name": "test",
        "dim": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_dim": 40,
        "vocab_size": 50,
    }
    return LlamaConfig(**(values | changes))


@pytest.mark.parametrize(
    ("name", "in_blocks", "with_output", "total"),
    [("llama3_160m", 127e6, 226e6, 324e6), ("llama3_1b", 0.90e9, 1.13e9, 1.36e9)],
)
def test_the_papers_models_have_the_papers_parameter_counts(name, in_blocks, with_output, total):
    counts = count_parameters(from_yaml(name))
    unit = 1e6 if total < 1e9 else 1e7  # the digits that the paper gives
    assert [round(count / unit) for count in counts] == [
        round(count / unit) for count in (in_blocks, with_output, total)
    ]


LLAMAS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "schema_llama" in path.read_text()]


@pytest.mark.parametrize("path", LLAMAS, ids=lambda path: path.stem)
def test_counted_parameters_are_those_of_the_built_model(path):
    shape = from_yaml(path.stem)
    shape.vocab_size = shape.vocab_size or 4096
    with torch.device("meta"):
        model = Llama(shape)
    assert shape.name == path.stem
    assert sum(weight.numel() for weight in model.parameters()) == count_parameters(shape).total
    in_blocks = sum(weight.numel() for weight in model.layers.parameters())
    assert in_blocks == count_parameters(shape).in_blocks


def test_llama_3_2_1b_has_the_published_number_of_parameters():
    # Its model card says 1.23 B; the safetensors on the hub hold 1,235,814,400.
    assert count_parameters(from_yaml("llama3_2_1b")).total == 1_235_814_400


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"num_heads": 5}, "model.num_heads=5"),
        ({"num_heads": 8, "num_kv_heads": 8}, "odd"),
        ({"num_kv_heads": 3}, "model.num_kv_heads=3"),
        ({"num_kv_heads": 8}, "model.num_kv_heads=8"),
        ({"dim": 0}, "model.dim=0"),
        ({"num_layers": -1}, "model.num_layers=-1"),
        ({"vocab_size": 0}, "model.vocab_size=0"),
        ({"rope_theta": float("nan")}, "model.rope_theta=nan"),
        ({"rope_theta": float("inf")}, "model.rope_theta=inf"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
    ],
)
def test_an_impossible_shape_is_refused_by_the_name_of_the_setting(changes, setting):
    with pytest.raises(InputError, match=setting) as refusal:
        config(**changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"factor": 0.5}, "model.rope_scaling.factor=0.5"),
        ({"high_frequency_factor": 1.0}, "model.rope_scaling.high_frequency_factor=1.0"),
        ({"original_sequence_length": 0}, "model.rope_scaling.original_sequence_length=0"),
    ],
)
def test_an_impossible_rope_scaling_is_refused_by_the_name_of_the_setting(changes, setting):
    with pytest.raises(InputError, match=setting):
        RopeScaling(**changes)


def test_a_model_without_a_vocabulary_is_not_built():
    with pytest.raises(InputError, match="vocab_size=null"):
        Llama(config(vocab_size=None))

import math

import pytest
import torch

from gns_pretrain.model.config import LlamaConfig, RopeScaling
from gns_pretrain.model.llama import inverse_frequencies, rotary_tables, rotate

CPU = torch.device("cpu")


def config(head_dim=8, **scaling):
    return LlamaConfig(
        name="test",
        dim=2 * head_dim,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        ffn_dim=8,
        vocab_size=8,
        rope_theta=10_000.0,
        rope_scaling=RopeScaling(**scaling),
    )


def test_frequencies_by_hand():
    # theta^(-2i/8) with theta = 10^4: 1, 10^-1, 10^-2, 10^-3.
    expected = torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(inverse_frequencies(config()), expected)


def test_scaled_frequencies_by_hand():
    # In 200 pi tokens the frequencies 1, 0.1, 0.01, 0.001 turn 100, 10, 1 and 0.1 times. With
    # low = 1 and high = 19, ten turns are halfway: f/2 + f/(2 * 8).
    scaled = inverse_frequencies(
        config(
            enabled=True,
            factor=8.0,
            low_frequency_factor=1.0,
            high_frequency_factor=19.0,
            original_sequence_length=round(200 * math.pi),
        )
    )
    expected = torch.tensor([1.0, 0.1 * (1 / 2 + 1 / 16), 0.01 / 8, 0.001 / 8])
    # 628 tokens instead of 628.3: 5e-4 of the turns, less of the frequency.
    torch.testing.assert_close(scaled, expected, rtol=5e-4, atol=0.0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_frequencies_are_those_of_transformers(factor):
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours = inverse_frequencies(config(head_dim=64, enabled=True, factor=factor))
    theirs = TheirConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    torch.testing.assert_close(ours, LlamaRotaryEmbedding(theirs).inv_freq, rtol=0.0, atol=0.0)


def test_a_pair_turns_by_position_times_frequency():
    # Width 2 has the single frequency 1: position t turns (1, 0) to (cos t, sin t).
    frequencies = inverse_frequencies(config(head_dim=2))
    cos, sin = rotary_tables(frequencies, 4, CPU)
    turned = rotate(torch.tensor([1.0, 0.0]).expand(1, 4, 1, 2), cos, sin)
    angles = torch.arange(4.0)
    expected = torch.stack((angles.cos(), angles.sin()), dim=-1).view(1, 4, 1, 2)
    torch.testing.assert_close(turned, expected)


def test_scores_depend_on_the_distance_of_positions_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)
    cos, sin = rotary_tables(inverse_frequencies(config()), 12, CPU)
    q, k = rotate(q.expand(1, 12, 1, 8), cos, sin), rotate(k.expand(1, 12, 1, 8), cos, sin)
    scores = torch.einsum("bthd,bshd->ts", q, k)
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_bfloat16_is_turned_in_float32_and_rounded_once():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 2, 8, generator=generator).to(torch.bfloat16)
    cos, sin = rotary_tables(inverse_frequencies(config()), 300, CPU)
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(
        turned, rotate(x.float(), cos, sin).to(torch.bfloat16), rtol=0.0, atol=0.0
    )

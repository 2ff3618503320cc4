import json
from dataclasses import asdict

from gns_pretrain.batch_size.feasible import Split
from gns_pretrain.training.state import TrainState, crossed


def test_state_survives_json_bit_for_bit():
    state = TrainState(batch_size=16, micro_batch_size=4, accumulation=2, lr_multiplier=2**0.5)
    state.advance(sequence_length=128)
    assert TrainState.from_dict(json.loads(json.dumps(asdict(state)))) == state


def test_state_counts_tokens_of_a_changing_batch():
    state = TrainState.before_first_step(Split(2, micro_batch_size=4, accumulation=2))
    state.advance(sequence_length=10)
    state.take(Split(2, micro_batch_size=4, accumulation=4), lr_multiplier=2**0.5)
    assert (state.batch_size, state.accumulation) == (32, 4)
    state.advance(sequence_length=10)
    assert (state.step, state.samples, state.tokens) == (2, 48, 480)


def test_state_of_a_checkpoint_that_held_averages_too_is_read():
    values = {
        "batch_size": 16,
        "micro_batch_size": 4,
        "step": 3,
        "samples": 48,
        "tokens": 480,
        "lr_multiplier": 2**0.5,
        "recent_noise_scales": {"manhattan/plug_in": [3.0]},
        "averages": {"manhattan/plug_in": {"noise": 1.0}},
        "shadow_batch_sizes": {"patient": 32},
    }
    assert TrainState.from_dict(values) == TrainState(
        16, 4, step=3, samples=48, tokens=480, lr_multiplier=2**0.5
    )


def test_crossing_counts_a_multiple_that_is_reached_and_not_one_that_was_left():
    assert crossed(10, before=9, after=10)
    assert crossed(10, before=5, after=25)
    assert not crossed(10, before=10, after=19)

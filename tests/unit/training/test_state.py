import json

from gns_pretrain.training.state import TrainState, crossed


def test_state_survives_json_bit_for_bit():
    state = TrainState(batch_size=16, micro_batch_size=4, lr_multiplier=2**0.5)
    state.averages["manhattan/plug_in"] = {"noise": 1 / 3, "signal": 1e-300}
    state.advance(sequences=16, sequence_length=128)
    assert TrainState.from_dict(json.loads(json.dumps(state.as_dict()))) == state


def test_state_counts_tokens_of_a_changing_batch():
    state = TrainState(batch_size=16, micro_batch_size=4)
    for sequences in (16, 32):
        state.advance(sequences=sequences, sequence_length=10)
    assert (state.step, state.samples, state.tokens) == (2, 48, 480)


def test_crossing_counts_a_multiple_that_is_reached_and_not_one_that_was_left():
    assert crossed(10, before=9, after=10)
    assert crossed(10, before=5, after=25)
    assert not crossed(10, before=10, after=19)

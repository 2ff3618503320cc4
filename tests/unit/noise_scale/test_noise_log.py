import pytest

from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.meter import Reading
from gns_pretrain.training.state import TrainState
from gns_pretrain.training.step_log import SPREAD_OVER, fallbacks_of, spread_of_last


def test_spread_is_the_deviation_of_the_last_measurements_and_skips_those_without_signal():
    state = TrainState(batch_size=8, micro_batch_size=2)
    assert spread_of_last(state, "manhattan/plug_in", 3.0) is None
    assert spread_of_last(state, "manhattan/plug_in", None) is None
    # 3 and 5: one apart from their mean on either side, so sqrt(2).
    assert spread_of_last(state, "manhattan/plug_in", 5.0) == pytest.approx(2**0.5)
    for _ in range(SPREAD_OVER):
        last = spread_of_last(state, "manhattan/plug_in", 7.0)
    assert last == 0.0


def test_noise_line_counts_slow_square_roots_where_there_were_some():
    total = Measurement("nuclear", "plug_in", 2.0, 1.0, 8, 64)
    assert fallbacks_of(Reading(total, {}, 0.1)) == {}
    assert fallbacks_of(Reading(total, {}, 0.1, num_fallbacks=3)) == {"square_root_fallbacks": 3}

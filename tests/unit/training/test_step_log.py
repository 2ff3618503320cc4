"""Lines of the noise scale in the record."""

import math

from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.meter import Reading
from gns_pretrain.noise_scale.smoothing import NoiseTracker, SmoothingSettings
from gns_pretrain.tracking.record import Record
from gns_pretrain.training.step_log import record_noise


class Written(Record):
    """A record that keeps its lines and messages."""

    def __init__(self):
        self.lines, self.messages = [], []

    def write(self, line, **shown):
        self.lines.append(line.as_record())

    def message(self, text):
        self.messages.append(text)


def recorded(reading: Reading, *before: Measurement) -> Written:
    tracker = NoiseTracker("nuclear", "plug_in", SmoothingSettings(0.5, 0.5))
    for measurement in (*before, reading.total):
        tracker.include(measurement)
    record, state = Written(), tracker.state_dict()
    record_noise(record, 7, [reading], {"nuclear/plug_in": tracker})
    assert tracker.state_dict() == state
    return record


def measured(noise: float, signal: float = 1.0) -> Measurement:
    return Measurement("nuclear", "plug_in", noise, signal, 8, 64)


def test_noise_line_has_the_measurement_its_averages_and_their_spread():
    (line,) = recorded(Reading(measured(5.0), {}, 0.1, step=7), measured(3.0)).lines
    # Half of 5 and a quarter of 3, over three quarters.
    assert line == {
        "kind": "noise",
        "step": 7,
        "geometry": "nuclear",
        "estimate": "plug_in",
        "noise": 5.0,
        "signal": 1.0,
        "noise_scale": 5.0,
        "noise_ema": 3.25 / 0.75,
        "signal_ema": 1.0,
        "noise_scale_ema": 3.25 / 0.75,
        "num_samples": 8,
        "seconds": 0.1,
        "spread": 2**0.5,
    }


def test_noise_line_of_an_earlier_step_says_when_it_was_read():
    (line,) = recorded(Reading(measured(5.0), {}, 0.1, step=4)).lines
    assert (line["step"], line["read_at_step"]) == (4, 7)


def test_noise_line_counts_slow_square_roots_and_has_parts_where_there_are_some():
    details = {"square_root_fallbacks": 3}
    reading = Reading(measured(5.0), {"norm": measured(1.0, 2.0)}, 0.1, details, 7)
    (line,) = recorded(reading).lines
    assert line["square_root_fallbacks"] == 3
    assert line["parts"] == {"norm": {"noise": 1.0, "signal": 2.0}}


def test_measurement_that_is_not_finite_gives_a_message_and_no_line():
    record = recorded(Reading(measured(math.nan), {}, 0.1, step=7), measured(3.0))
    assert record.lines == []
    assert record.messages == [
        "step 7: the measurement is left out of the averages: nuclear noise is nan"
    ]

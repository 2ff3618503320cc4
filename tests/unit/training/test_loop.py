"""The trainer's loop: it follows the class that anybody's loop would use."""

from gns_pretrain.batch_size import AdaptiveBatchSize, BatchSizeSettings
from gns_pretrain.launch.train import launch
from gns_pretrain.noise_scale.geometries import Measurement
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.noise_scale.smoothing import SmoothingSettings
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.loop import crossed
from tests.settings import SEQUENCE_LENGTH, small_run


class Read:
    """A reading, as a noise meter returns it."""

    def __init__(self, line):
        names = ("geometry", "estimate", "noise", "signal", "num_samples")
        self.total = Measurement(**{name: line[name] for name in names}, batch_size=0)


def test_trainer_decides_what_the_class_decides_on_the_same_readings(tmp_path, shards):
    config = small_run(
        tmp_path,
        shards,
        micro_batch_size=1,
        batch_size=BatchSizeSettings(
            "adaptive", initial=8, micro_batch_max=2, theta=0.5, cap=64, decide_every_steps=3
        ),
        noise_scale=NoiseScaleSettings(
            ["manhattan"], every_steps=2, smoothing=SmoothingSettings(0.5, 0.7)
        ),
    )
    assert launch(config) == 0
    records = list(read_records(tmp_path / "small" / "metrics.jsonl"))
    measured = {line["step"]: Read(line) for line in records if line["kind"] == "noise"}
    adaptive = AdaptiveBatchSize(
        batch_size=8,
        micro_batch_size=1,
        micro_batch_max=2,
        total_samples=20 * 8,
        theta=0.5,
        cap=64,
        decide_every_steps=3,
        smoothing=SmoothingSettings(0.5, 0.7),
    )
    taken = []
    for line in (line for line in records if line["kind"] == "train"):
        assert line["batch_size"] == adaptive.batch_size
        assert line["micro_batch_size"] == adaptive.micro_batch_size
        assert line["accumulation"] == adaptive.accumulation
        reading = measured.get(line["step"])
        if decision := adaptive.step([reading] if reading else []):
            taken.append((adaptive.steps + 1, decision.previous, decision.split.batch_size))
            taken[-1] += (decision.target, adaptive.lr_multiplier)
        assert (line["step"], line["samples"]) == (adaptive.steps, adaptive.samples)
    assert line["tokens"] == adaptive.samples * SEQUENCE_LENGTH
    names = ("step", "from", "to", "target", "lr_multiplier")
    changes = [line for line in records if line["kind"] == "batch_size"]
    assert len(changes) >= 2
    assert taken == [tuple(line[name] for name in names) for line in changes]


def test_crossing_counts_a_multiple_that_is_reached_and_not_one_that_was_left():
    assert crossed(10, before=9, after=10)
    assert crossed(10, before=5, after=25)
    assert not crossed(10, before=10, after=19)

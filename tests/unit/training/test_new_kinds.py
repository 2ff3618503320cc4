"""A new geometry and a new policy are one class each: a run then measures and follows them."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from gns_pretrain.batch_size import BatchSizeSettings
from gns_pretrain.batch_size.policies import POLICIES, Policy
from gns_pretrain.batch_size.settings import ShadowSettings
from gns_pretrain.config.checks import check_batch_size
from gns_pretrain.config.compose import settings_from
from gns_pretrain.config.register import register_configs
from gns_pretrain.data.batches import inputs_and_targets
from gns_pretrain.launch.train import launch
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale.geometries import GEOMETRIES, Geometry
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.noise_scale.sample_sums import Needs
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.tracking.jsonl import read_records
from gns_pretrain.training.step import accumulate_gradients
from tests.settings import SEQUENCE_LENGTH, VOCABULARY, odd_model, small_run

CONF = Path(__file__).parents[3] / "gns_pretrain" / "conf"
ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")


def by_row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().reshape(len(tensor), -1)


@pytest.fixture
def rows():
    """Define the sum of the rows' norms, dual to an optimizer that normalizes each row."""

    class Rows(Geometry):
        name = "rows"
        estimates = ("plug_in",)

        @property
        def needs(self):
            return Needs(squares=True)

        def totals(self, sums, batch_size):
            totals = sums.square_norms.new_zeros(len(sums.square_norms), len(self.columns))
            for index, mean in enumerate(sums.means):
                variance = sums.variance(index, batch_size=batch_size)
                totals[index, 0] = by_row(variance).sum(1).sqrt().sum()
                totals[index, 1] = by_row(mean).norm(dim=1).sum()
            return totals

    yield
    del GEOMETRIES[Rows.name]


@pytest.fixture
def doubling():
    """Define twice the batch after every 640 tokens."""

    class Doubling(Policy):
        name = "doubling"

        def target(self, position, noise):
            return self.initial_batch_size * 2.0 ** (position.tokens // 640)

    yield
    del POLICIES[Doubling.name]


def of_kind(folder, kind):
    records = read_records(folder / "small" / "metrics.jsonl")
    return [record for record in records if record["kind"] == kind]


def test_new_geometry_measures_what_its_equations_say(rows):
    model = Llama(odd_model())
    model.init_weights(seed=1)
    tokens = torch.randint(VOCABULARY, (4, 1, 9), generator=torch.Generator().manual_seed(3))
    meter = NoiseMeter(model, geometries=["rows", "euclidean"])
    with meter.measure():
        accumulate_gradients(model, map(inputs_and_targets, tokens), accumulation=4, meter=meter)
    found = meter.read(batch_size=4)[0].total

    noise = signal = 0.0
    samples = {name: [] for name, _ in model.named_parameters()}
    for sequences in tokens:
        model.zero_grad()
        model(sequences[:, :-1], sequences[:, 1:]).backward()
        for name, weight in model.named_parameters():
            samples[name].append(by_row(weight.grad))
    for each in samples.values():
        gradients = torch.stack(each)
        # Sample variances of 4 samples of one sequence, added over a row.
        noise += gradients.var(0).sum(1).sqrt().sum().item()
        signal += gradients.mean(0).norm(dim=1).sum().item()
    assert found.noise == pytest.approx(noise**2, rel=1e-4)
    assert found.signal == pytest.approx(signal**2, rel=1e-4)


def test_new_geometry_steers_a_run_and_is_known_to_the_configuration(rows, tmp_path, shards):
    settings = BatchSizeSettings(
        "adaptive",
        initial=8,
        cap=32,
        geometry="rows",
        target="maximum_efficiency",
        warmup_fraction=0.0,
        shadows=[ShadowSettings(geometry="rows", theta=0.4)],
    )
    noise_scale = NoiseScaleSettings(["rows", "manhattan"], every_steps=5)
    config = small_run(
        tmp_path, shards, micro_batch_size=1, batch_size=settings, noise_scale=noise_scale
    )
    assert launch(config) == 0
    measured = of_kind(tmp_path, "noise")
    assert [line["geometry"] for line in measured[:2]] == ["rows", "manhattan"]
    (change,) = of_kind(tmp_path, "batch_size")
    followed = [
        line for line in measured if line["geometry"] == "rows" and line["step"] < change["step"]
    ][-1]
    assert change["target"] == 4.0 * followed["noise_scale_ema"]  # Eq. 45

    register_configs()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = ["noise_scale.geometries=[rows]", "batch_size=adaptive", "batch_size.geometry=rows"]
        composed = settings_from(
            compose("train", [*words, "micro_batch_size=2", "data.path=data"]), words
        )
    check_batch_size(composed, num_ranks=1)


def test_new_policy_is_followed(doubling, tmp_path, shards):
    settings = BatchSizeSettings("doubling", initial=8, cap=32)
    assert launch(small_run(tmp_path, shards, batch_size=settings)) == 0
    changes = of_kind(tmp_path, "batch_size")
    assert [(line["from"], line["to"]) for line in changes] == [(8, 16), (16, 32)]
    tokens = {line["step"]: line["tokens"] for line in of_kind(tmp_path, "train")}
    first, second = (tokens[line["step"] - 1] for line in changes)
    assert (first, second) == (640, 640 + 3 * 16 * SEQUENCE_LENGTH)


def test_base_without_a_name_is_not_a_choice():
    class Planned(Policy):
        """A base of policies that follow a plan."""

    class Rescaled(GEOMETRIES["manhattan"]):
        """Like Manhattan, for subclasses; its inherited name is not its own."""

    assert Planned not in POLICIES.values()
    assert Rescaled not in GEOMETRIES.values()

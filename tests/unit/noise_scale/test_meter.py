"""The tap and the meter on one process: what they leave alone, and what they are asked for."""

import pytest
import torch
from torch import Tensor

from gns_pretrain.data.batches import inputs_and_targets
from gns_pretrain.model.llama import Llama, parameter_kind
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.training.step import StepResult, train_step
from tests.settings import VOCABULARY, odd_model

ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")
GEOMETRIES = ["euclidean", "manhattan", "nuclear"]


def micro_batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randint(VOCABULARY, (count, 2, 9), generator=generator))


def model_of(**changes) -> Llama:
    model = Llama(odd_model(**changes))
    model.init_weights(seed=2)
    return model


def one_step(model: Llama, settings: NoiseScaleSettings | None, count: int = 4) -> StepResult:
    return train_step(
        model,
        AdamWSettings().build(model),
        map(inputs_and_targets, micro_batches(count)),
        accumulation=count,
        gradient_clip=1.0,
        batch_size=2 * count,
        meter=NoiseMeter(model, settings, kinds=parameter_kind) if settings else None,
    )


def readings(settings: NoiseScaleSettings, model: Llama | None = None) -> list[Reading]:
    return one_step(model or model_of(), settings).readings


def test_measured_step_trains_with_the_bits_of_an_unmeasured_one():
    plain, measured = model_of(), model_of()
    one_step(plain, None)
    found = one_step(
        measured, NoiseScaleSettings(GEOMETRIES, ["plug_in", "debiased", "cross_fitted"])
    )
    assert len(found.readings) == 8
    for mine, theirs in zip(plain.parameters(), measured.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_no_hook_and_no_sum_is_left_after_a_measured_step():
    model = model_of()
    meter = NoiseMeter(model, geometries=GEOMETRIES, estimates=["plug_in", "cross_fitted"])
    with meter.step(1):
        assert all(weight._backward_hooks for weight in model.parameters())
        for batch in micro_batches(2):
            with meter.sample():
                (model(batch[:, :-1], batch[:, 1:]) / 2).backward()
    meter.read(batch_size=4)
    assert not any(weight._backward_hooks for weight in model.parameters())
    assert (meter.tap.squares, meter.tap.signed_sums, meter.tap.grams) == ([], [], {})


def test_gradient_of_the_output_is_let_go_when_it_has_been_seen():
    model = model_of()
    meter = NoiseMeter(model, geometries=GEOMETRIES)
    tap = meter.tap
    waiting: list[list[int]] = []
    batch = micro_batches(1)[0]
    with meter.step(1), meter.sample():
        # Hooks run in the order in which they came: this one after the tap's.
        model.output.weight.register_hook(lambda gradient: waiting.append(list(tap.waiting)))
        model.embedding.weight.register_hook(lambda gradient: waiting.append(list(tap.waiting)))
        model(batch[:, :-1], batch[:, 1:]).backward()
    assert waiting == [[], []]


def test_parts_by_layer_are_the_blocks_alone():
    found = readings(NoiseScaleSettings(["euclidean"], per_layer=True))[0]
    assert set(found.parts) == {"layers.0", "layers.1"}


def test_square_roots_that_took_eigenvalues_are_told_with_the_nuclear_reading(monkeypatch):
    settings = NoiseScaleSettings(["manhattan", "nuclear"], square_root="iterative")
    assert [r.details for r in readings(settings)] == [{}, {}]
    monkeypatch.setattr("gns_pretrain.geometry.square_root.TOLERANCE", 0.0)  # nothing is proven
    # Covariance and mean of 2 blocks of 7 matrices.
    fallbacks = {"square_root_fallbacks": 2 * 2 * 7}
    assert [r.details for r in readings(settings)] == [{}, fallbacks]


def test_meter_of_one_geometry_gathers_nothing_for_the_others():
    euclidean = NoiseMeter(model_of(), geometries=["euclidean"])
    with euclidean.step(1):
        assert (euclidean.tap.squares, euclidean.tap.signed_sums) == ([], [])


def test_frozen_weights_are_left_out_and_the_others_measured_as_before():
    settings = NoiseScaleSettings(["euclidean", "nuclear"], per_kind=True)
    whole, frozen = model_of(), model_of()
    frozen.embedding.weight.requires_grad_(False)
    before, after = readings(settings, whole), readings(settings, frozen)
    assert "embedding" not in after[0].parts
    assert after[0].parts["attention"] == before[0].parts["attention"]
    assert after[1].total == before[1].total


def test_weight_that_took_no_gradient_has_no_noise_and_no_signal():
    class Idle(Llama):
        """A Llama whose second block is stepped over."""

        def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
            blocks, self.layers = self.layers, self.layers[:1]
            try:
                return super().forward(tokens, targets)
            finally:
                self.layers = blocks

    model = Idle(odd_model())
    model.init_weights(seed=2)
    found = readings(NoiseScaleSettings(GEOMETRIES, per_layer=True), model)
    for reading in found:
        assert (reading.parts["layers.1"].noise, reading.parts["layers.1"].signal) == (0.0, 0.0)
        assert reading.parts["layers.0"].noise > 0.0
        assert reading.total.noise > 0.0


def test_parts_by_kind_add_up_to_the_whole_before_squaring():
    euclidean, manhattan, nuclear = readings(NoiseScaleSettings(GEOMETRIES, per_kind=True))
    kinds = {"embedding", "attention", "feed_forward", "norm", "output"}
    assert set(euclidean.parts) == set(manhattan.parts) == kinds
    assert set(nuclear.parts) == {"attention", "feed_forward"}
    for reading, root in ((euclidean, 1.0), (manhattan, 0.5), (nuclear, 0.5)):
        for name in ("noise", "signal"):
            parts = sum(getattr(part, name) ** root for part in reading.parts.values())
            assert parts == pytest.approx(getattr(reading.total, name) ** root, rel=1e-9)


def test_block_matrices_alone_are_the_attention_and_feed_forward_parts():
    whole = readings(NoiseScaleSettings(["manhattan"], per_kind=True))[0]
    blocks = readings(NoiseScaleSettings(["manhattan"], parameters="block_matrices"))[0]
    expected = sum(whole.parts[name].noise ** 0.5 for name in ("attention", "feed_forward"))
    assert blocks.total.noise == pytest.approx(expected**2, rel=1e-9)


def test_all_2d_adds_embedding_and_output_to_the_nuclear_scale():
    narrow = readings(NoiseScaleSettings(["nuclear"], per_kind=True))[0]
    wide = readings(NoiseScaleSettings(["nuclear"], nuclear_parameters="all_2d", per_kind=True))[0]
    assert set(wide.parts) - set(narrow.parts) == {"embedding", "output"}
    assert wide.parts["attention"] == narrow.parts["attention"]


def test_authors_factor_multiplies_the_nuclear_scale_by_the_local_batch():
    plain = readings(NoiseScaleSettings(["nuclear"]))[0].total
    theirs = readings(NoiseScaleSettings(["nuclear"], nuclear_local_batch_factor=True))[0].total
    assert plain.noise_scale is not None
    assert theirs.noise_scale == pytest.approx(2 * plain.noise_scale)


def test_iterative_square_roots_agree_with_exact_ones_within_their_promise():
    exact = readings(NoiseScaleSettings(["nuclear"], square_root="exact"))[0].total
    iterative = readings(NoiseScaleSettings(["nuclear"], square_root="iterative"))[0].total
    # Each trace errs by at most 1e-3, and its square by twice that.
    assert iterative.noise == pytest.approx(exact.noise, rel=2e-3)
    assert iterative.signal == pytest.approx(exact.signal, rel=2e-3)


def test_compiled_blocks_show_the_same_gradients():
    settings = NoiseScaleSettings(GEOMETRIES, ["plug_in"], square_root="exact")
    compiled = model_of()
    for block in compiled.layers:
        block.compile(backend="aot_eager")
    for found, expected in zip(readings(settings, compiled), readings(settings), strict=True):
        assert found.total.noise == pytest.approx(expected.total.noise, rel=1e-5)
        assert found.total.signal == pytest.approx(expected.total.signal, rel=1e-5)


def test_bfloat16_copies_are_measured_on_float32_sums():
    model = parallelize(model_of(), ALONE, compute_dtype=torch.bfloat16)
    found = readings(NoiseScaleSettings(GEOMETRIES), model)
    for reading, expected in zip(found, readings(NoiseScaleSettings(GEOMETRIES)), strict=True):
        # bfloat16 keeps 8 bits: a few per cent at most, not garbage.
        assert reading.total.noise == pytest.approx(expected.total.noise, rel=0.1)

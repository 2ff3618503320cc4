"""What is refused before anything is measured."""

import pytest

from gns_pretrain.errors import InputError
from gns_pretrain.noise_scale.settings import NoiseScaleSettings


@pytest.mark.parametrize(
    ("geometries", "estimates", "told"),
    [
        (
            ["manhattan", "nuclear", "manhattan"],
            ["plug_in"],
            r"geometries=\[manhattan, nuclear, manhattan\] names one twice"
            r".*; use \[manhattan, nuclear\]$",
        ),
        (
            ["manhattan"],
            ["plug_in", "plug_in"],
            r"estimates=\[plug_in, plug_in\] names one twice.*; use \[plug_in\]$",
        ),
        (
            ["manhattan", "nuclear"],
            ["debiased"],
            r"estimates=\[debiased\] leaves geometry nuclear nothing to measure; "
            "add plug_in or cross_fitted or nested, or leave it out$",
        ),
        (["manhattan"], [], r"estimates=\[\] names none; use \[plug_in\]"),
    ],
)
def test_geometries_and_estimates_that_measure_nothing_or_twice_are_refused(
    geometries, estimates, told
):
    with pytest.raises(InputError, match=rf"^noise_scale\.{told}"):
        NoiseScaleSettings(geometries, estimates)


@pytest.mark.parametrize("geometries", [["nuclear"], ["composite"], ["nuclear", "composite"]])
def test_norms_alone_are_refused_where_no_geometry_reads_them_alone(geometries):
    with pytest.raises(InputError, match=r"^noise_scale\.parameters=norms is not read by .*all$"):
        NoiseScaleSettings(geometries, parameters="norms")
    NoiseScaleSettings([*geometries, "adam"], parameters="norms")


def test_nested_needs_an_eighth_of_the_micro_batches():
    assert NoiseScaleSettings(["manhattan"], ["nested"]).fewest_samples == 8
    with pytest.raises(InputError, match=r"^noise_scale\.min_samples=4 is too few .*; use 8"):
        NoiseScaleSettings(["manhattan"], ["plug_in", "nested"], min_samples=4)
    NoiseScaleSettings(["manhattan"], ["plug_in", "cross_fitted"], min_samples=4)


def test_nuclear_passes_over_debiased_where_another_estimate_is_asked_for():
    settings = NoiseScaleSettings(["euclidean", "nuclear"], ["plug_in", "debiased"])
    assert settings.estimates_of("nuclear") == ["plug_in"]
    assert settings.estimates_of("euclidean") == ["plug_in", "debiased"]

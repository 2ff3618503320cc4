"""Feasible sizes: ranks x micro-batch x accumulation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns_pretrain.batch_size.feasible import FeasibleSizes
from gns_pretrain.errors import InputError

PUBLISHED = FeasibleSizes(
    num_ranks=8,
    micro_batch_size=8,
    micro_batch_max=16,
    micro_batch_step=4,
    min_samples=8,
    names={"min_samples": "noise_scale.min_samples"},
)


def ladder(sizes: FeasibleSizes, *, up_to: int) -> list[int]:
    """Every feasible size up to one, by asking for each."""
    return [
        size
        for size in range(1, up_to + 1)
        if (split := sizes.at_most(size)) and split.batch_size == size
    ]


def test_batch_is_ranks_times_micro_batch_times_accumulation():
    for size, sizes, accumulation in (
        (64, FeasibleSizes(2, micro_batch_size=8, micro_batch_max=8), 4),
        (8, FeasibleSizes(8, micro_batch_size=1, micro_batch_max=1), 1),
    ):
        assert sizes.require(size, "batch_size.initial").accumulation == accumulation


def test_batch_that_ranks_cannot_split_names_the_unit_and_the_nearest_size():
    sizes = FeasibleSizes(4, micro_batch_size=2, micro_batch_max=2)
    with pytest.raises(InputError, match=r"batch_size.initial=20 .* 4 ranks .* multiple of 8 .*16"):
        sizes.require(20, "batch_size.initial")


def test_sizes_of_the_published_runs_grow_by_micro_batch_and_then_by_accumulation():
    assert ladder(PUBLISHED, up_to=700) == [64, 96, 128, 256, 384, 512, 640]
    assert [str(PUBLISHED.at_most(size)) for size in (96, 384)] == [
        "96 = 8 ranks x 12",
        "384 = 8 ranks x 3 micro-batches of 16",
    ]


def test_few_ranks_accumulate_first_and_keep_their_samples():
    sizes = FeasibleSizes(
        num_ranks=3, micro_batch_size=2, micro_batch_max=5, micro_batch_step=2, min_samples=8
    )
    # 3 micro-batches on each of 3 ranks are the first whole number above 8 samples.
    assert ladder(sizes, up_to=80) == [18, 36, 45, 60, 75]


def test_a_micro_batch_that_is_held_gives_every_multiple():
    sizes = FeasibleSizes(num_ranks=2, micro_batch_size=4, micro_batch_max=4)
    assert ladder(sizes, up_to=40) == [8, 16, 24, 32, 40]
    assert {sizes.at_least(size).micro_batch_size for size in range(1, 100)} == {4}


def test_nothing_is_feasible_below_the_smallest_size():
    assert PUBLISHED.at_most(63.9) is None
    assert PUBLISHED.at_least(1e-9).batch_size == 64


@given(
    num_ranks=st.integers(1, 9),
    smallest=st.integers(1, 6),
    growth=st.integers(0, 9),
    step=st.integers(1, 4),
    min_samples=st.integers(1, 12),
    size=st.floats(0.0, 5000.0),
)
def test_neighbours_enclose_any_size_and_keep_the_samples(
    num_ranks, smallest, growth, step, min_samples, size
):
    sizes = FeasibleSizes(num_ranks, smallest, smallest + growth, step, min_samples)
    below, above = sizes.at_most(size), sizes.at_least(size)
    assert above.batch_size >= size
    for split in filter(None, (below, above)):
        assert smallest <= split.micro_batch_size <= smallest + growth
        assert split.accumulation * num_ranks >= min_samples
        assert sizes.at_most(split.batch_size) == sizes.at_least(split.batch_size) == split
    if below:
        assert below.batch_size <= size
        assert sizes.at_least(below.batch_size + 1).batch_size >= above.batch_size


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (80, "batch_size.cap=80 is not feasible on 8 ranks in micro-batches of 8 to 16"),
        (80, "use batch_size.cap=64 or batch_size.cap=96"),
        (32, "at least noise_scale.min_samples=8 of them a step"),
        (32, "or micro_batch_size=4"),
    ],
)
def test_size_that_is_not_feasible_names_its_neighbours_and_a_hint(size, told):
    with pytest.raises(InputError) as error:
        PUBLISHED.require(size, "batch_size.cap")
    assert told in str(error.value)


def test_batch_with_too_few_samples_names_the_micro_batch_that_gives_them():
    sizes = FeasibleSizes(num_ranks=1, micro_batch_size=8, micro_batch_max=8, min_samples=8)
    with pytest.raises(InputError, match=r"initial=16 .*initial=64, or micro_batch_size=2$"):
        sizes.require(16, "batch_size.initial")

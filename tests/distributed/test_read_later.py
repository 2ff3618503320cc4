"""Readings that come some steps later are those of immediate ones on every layout."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from gns_pretrain.data.batches import inputs_and_targets
from gns_pretrain.noise_scale.meter import NoiseMeter, Reading
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, joined
from gns_pretrain.training.step import train_step
from tests.distributed.harness import run_ranks
from tests.distributed.test_noise_scale import ALL, FEW, LAYOUTS, Case

LATER = 2
SAVED_AT = 2  # between the measurement of step 1 and its reading at the end of step 3


def steps(place: RankInfo, kind: str, later: int) -> tuple[list[list[tuple]], dict[str, Any]]:
    """Train three steps; return what was read in each, and what is saved after the second."""
    settings = replace(ALL, read_after_steps=later, per_layer=True)
    with joined(place, ParallelSettings(kind=kind), torch.device("cpu")) as world:
        model = Case(kind).laid(world)
        meter = NoiseMeter(model, settings)
        found, saved = [], {}
        for step in range(1, 2 + LATER):
            result = train_step(
                model,
                torch.optim.SGD(model.parameters(), lr=0.1),
                map(inputs_and_targets, FEW.tensors()[place.rank :: place.num_ranks]),
                accumulation=FEW.count // place.num_ranks,
                gradient_clip=1.0,
                batch_size=FEW.count,
                meter=meter,
                step=step,
            )
            found.append(numbers(result.readings))
            if step == SAVED_AT:
                saved = meter.state_dict()
        return found, saved


def numbers(readings: list[Reading]) -> list[tuple]:
    """All that a reading says but for the clock's seconds."""
    return [(r.step, r.total, r.parts, r.details) for r in readings]


def on_layouts(place: RankInfo) -> dict[str, tuple]:
    """Of each layout what is read at once and later, and what is saved in between."""
    found = {}
    for kind in LAYOUTS:
        once, _ = steps(replace(place, rendezvous=f"{place.rendezvous}-{kind}-0"), kind, 0)
        late = steps(replace(place, rendezvous=f"{place.rendezvous}-{kind}-1"), kind, LATER)
        found[kind] = (once, *late)
    return found


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory) -> list[dict[str, tuple]]:
    return run_ranks(2, on_layouts, tmp_path_factory.mktemp("ranks"))


def test_every_layout_reads_the_bits_of_immediate_readings_at_one_step(on_ranks):
    for of_rank in on_ranks:
        for kind, (once, late, _) in of_rank.items():
            assert late == [[], [], once[0]], kind
            assert once[0] == on_ranks[0][kind][0][0], kind
            assert len(once[0]) == len(ALL.measured)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_one_process_reads_what_two_ranks_have_saved(kind, on_ranks):
    with joined(RankInfo(), ParallelSettings(kind="single"), torch.device("cpu")) as world:
        model = Case("single").laid(world)
        meter = NoiseMeter(model, replace(ALL, read_after_steps=LATER))
    once, _, saved = on_ranks[0][kind]
    meter.load_state_dict(json.loads(json.dumps(saved)))
    with meter.step(1 + LATER):
        assert numbers(meter.read(batch_size=FEW.count)) == once[0]

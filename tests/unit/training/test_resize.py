"""Measuring leaves no memory behind, and other ranks take over the batch of a state."""

import gc
import json
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor

from gns_pretrain.batch_size import AdaptiveBatchSize, BatchSizeSettings
from gns_pretrain.launch.build import build_adaptive_batch_size, build_run
from gns_pretrain.noise_scale.settings import NoiseScaleSettings
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.optim.base import keep_token_half_life
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.training.checkpoint import CheckpointSettings
from gns_pretrain.training.loop import apply_decision, one_step, train
from tests.settings import SEQUENCE_LENGTH, planned, small_run

ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")
EVERY = 4


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage once, less the sequences read ahead."""
    storages = {}
    for thing in gc.get_objects():
        # torch.compile elsewhere in this process leaves tensors without memory behind.
        if issubclass(type(thing), FakeTensor):
            continue
        if issubclass(type(thing), torch.Tensor) and thing.dtype != torch.int64:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def finished(config, folder: Path, step) -> bool:
    """Train a run in this process whose steps `step` takes."""
    run = build_run(config, ALONE, folder)
    try:
        return train(run, lambda: False, step=step)
    finally:
        run.workload.close()
        run.record.close()


@pytest.mark.parametrize("geometry", ["manhattan", "nuclear"])
def test_memory_stays_what_it_was_after_the_first_measurement(geometry, tmp_path, shards):
    seen = {}

    def take_and_weigh(run, log):
        readings = one_step(run, log)
        log.flush()
        gc.collect()
        seen[run.adaptive.steps] = live_bytes()
        return readings

    config = small_run(
        tmp_path,
        shards,
        micro_batch_size=1,
        noise_scale=NoiseScaleSettings(geometries=[geometry], every_steps=EVERY),
        # The batch grows by accumulation: the micro-batch keeps its size.
        batch_size=BatchSizeSettings(
            initial=8,
            policy="linear_ramp",
            ramp_size=32,
            ramp_tokens=15 * 8 * SEQUENCE_LENGTH,
        ),
        metrics=MetricsSettings(log_every=1, progress="never"),
        # A save beside training would be weighed with the step that it is still written in.
        checkpoint=CheckpointSettings(every_steps=5, keep=2, asynchronous=False),
    )
    assert finished(config, tmp_path, take_and_weigh)
    measured = [seen[step] for step in sorted(seen) if step == 1 or step % EVERY == 0]
    assert len(measured) >= 3
    assert set(measured) == {measured[0]}
    assert max(seen.values()) == measured[0]


def grows_after_two_steps(size: int) -> BatchSizeSettings:
    """From 8 sequences to another number."""
    tokens = [2 * 8 * SEQUENCE_LENGTH]
    return BatchSizeSettings(initial=8, policy="staged", stage_tokens=tokens, stage_sizes=[size])


class Recorded:
    """A record that keeps its lines."""

    def __init__(self):
        self.changes = []

    def write(self, line, **shown):
        self.changes.append(line.as_record() | shown)


def moved(
    batch_size: int, *, num_ranks: int, cap: int | None = None
) -> tuple[AdaptiveBatchSize, list[dict], float]:
    """A batch of 8 sequences at first, taken over by other ranks in the middle of its run.

    Its optimizer is tied to tokens with a momentum of 0.9, whose new value comes last.
    """
    config = small_run(
        Path("outputs"),
        Path("data"),
        micro_batch_size=2,
        batch_size=BatchSizeSettings(initial=8, policy="adaptive", micro_batch_max=4, cap=cap),
        noise_scale=NoiseScaleSettings(geometries=["manhattan"], min_samples=4),
    )
    record = Recorded()
    optimizer = torch.optim.SGD([torch.zeros(1)], momentum=0.9)
    keep_token_half_life(optimizer, 8)
    adaptive = build_adaptive_batch_size(config, planned(config), num_ranks=num_ranks)
    state = {
        "batch_size": batch_size,
        "micro_batch_size": 99,
        "accumulation": 1,
        "step": 7,
        "samples": 56,
        "tokens": 56 * SEQUENCE_LENGTH,
        "lr_multiplier": 7.0,
        "averages": {},
        "recent_noise_scales": {},
        "shadow_batch_sizes": {},
    }
    if forced := adaptive.load_state_dict(state):
        apply_decision(forced, adaptive.steps + 1, optimizer, record)
    return adaptive, record.changes, optimizer.param_groups[0]["momentum"]


@pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(1, 4), (2, 4), (4, 4), (8, 2)])
def test_batch_that_the_ranks_can_take_is_kept(num_ranks, micro_batch_size):
    adaptive, changes, momentum = moved(16, num_ranks=num_ranks)
    assert (adaptive.batch_size, adaptive.micro_batch_size) == (16, micro_batch_size)
    assert adaptive.lr_multiplier == 7.0
    assert changes == []
    assert momentum == 0.9  # as the checkpoint had it


def test_batch_that_the_ranks_cannot_take_becomes_the_next_larger_with_its_learning_rate():
    # 3 ranks take 2 micro-batches each, of 2 to 4 sequences: 12, 18, 24, then 36.
    adaptive, changes, momentum = moved(26, num_ranks=3)
    assert (adaptive.batch_size, adaptive.micro_batch_size) == (36, 4)
    assert adaptive.lr_multiplier == 4.5**0.5
    assert momentum == 0.9**4.5
    (change,) = changes
    assert (change["step"], change["from"], change["to"], change["target"]) == (8, 26, 36, None)
    assert "26 is not feasible on 3 ranks" in change["why"]
    assert "cap" not in change["why"]


@pytest.mark.parametrize(("cap", "told"), [(32, ", above cap=32"), (36, "")])
def test_batch_that_other_ranks_take_past_its_cap_says_so(cap, told):
    adaptive, (change,), _ = moved(26, num_ranks=3, cap=cap)
    assert adaptive.batch_size == 36
    assert change["why"].endswith(
        f"the next larger size, 36 = 3 ranks x 3 micro-batches of 4{told}"
    )


def test_run_tied_to_tokens_forgets_as_fast_in_tokens_after_its_batch_has_grown(tmp_path, shards):
    betas = {}

    def take_and_look(run, log):
        betas[run.adaptive.batch_size] = run.optimizer.param_groups[0]["momentum"]
        return one_step(run, log)

    config = small_run(
        tmp_path,
        shards,
        steps=6,
        optimizer=SignumSettings(momentum=0.95, tie_to_tokens=True),
        batch_size=grows_after_two_steps(24),
    )
    assert finished(config, tmp_path, take_and_look)
    assert betas == {8: 0.95, 24: 0.95**3}


@pytest.mark.parametrize(
    ("settings", "betas"),
    [
        ({"tie_to_tokens": True}, [0.9**4, 0.9]),  # 0.95^4 = 0.81
        ({"tie_to_tokens": True, "tied_beta2": [0.0, 1.0]}, [0.9**4, 0.95**4]),
        ({"weight_decay_timescale": "0.5"}, None),  # averages stay as they are
    ],
)
def test_run_records_what_follows_its_batch(settings, betas, tmp_path, shards):
    config = small_run(
        tmp_path,
        shards,
        steps=6,
        optimizer=AdamWSettings(lr=1e-2, **settings),
        batch_size=grows_after_two_steps(32),
    )
    assert finished(config, tmp_path, one_step)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    (line,) = (line for line in lines if line["kind"] == "batch_size")
    assert line.get("betas") == betas
    # lambda = 1 / (0.5 x 0.01 x 6), or 0.1; 4 times the batch at twice the rate doubles it.
    decay = 0.1 if "tie_to_tokens" in settings else 1 / 0.03
    assert line["weight_decay"] == pytest.approx(2 * decay)

"""What a thread saves beside training is what training itself would have saved, on every layout."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, beside_training, joined
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.training import checkpoint
from gns_pretrain.training.checkpoint import Checkpoints
from gns_pretrain.training.checkpoint_reader import damage
from tests.distributed.harness import run_ranks
from tests.settings import VOCABULARY, odd_model

LAYOUTS = {
    "ddp": ParallelSettings(kind="ddp"),
    "fsdp": ParallelSettings(kind="fsdp"),
    "hsdp": ParallelSettings(kind="hsdp", shard_size=2),
    "tensor": ParallelSettings(kind="fsdp", tensor_size=2),
}


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step with its collectives: gathers of weights and reductions of gradients."""
    tokens = torch.arange(17).view(1, 17) % VOCABULARY
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def save_both_ways(place: RankInfo, folder: Path, names: list[str]) -> None:
    """One rank's part: the same step saved before training goes on, and beside six more steps.

    The thread writes no tensor before three of them have changed the weights.
    """
    writer_to = checkpoint.writer_to
    for name in names:
        here = replace(place, rendezvous=f"{place.rendezvous}-{name}")
        with joined(here, LAYOUTS[name], torch.device("cpu")) as world:
            llama = Llama(odd_model(dim=24, num_heads=4, num_kv_heads=2))
            llama.init_weights(seed=0)
            model = parallelize(llama, world, compute_dtype=torch.float32)
            optimizer = AdamWSettings(lr=1e-2).build(model)
            take_step(model, optimizer)
            changed = threading.Event()
            beside = beside_training(world, LAYOUTS[name])
            for way, thread in {"before": None, "beside": beside}.items():
                checkpoints = Checkpoints(
                    folder / f"{name}_{way}", keep=1, world=world, beside=thread
                )
                if thread:
                    checkpoint.writer_to = lambda to, held=changed: held.wait() and writer_to(to)
                checkpoints.save(model, optimizer, {"step": 1})
            for step in range(6):
                if step == 3:
                    changed.set()
                take_step(model, optimizer)
            checkpoints.wait()
            checkpoints.close()
            checkpoint.writer_to = writer_to


@pytest.mark.parametrize("names", [["ddp", "fsdp", "hsdp"], ["tensor"]])
def test_thread_saves_the_same_bytes_while_the_weights_change(names, tmp_path):
    run_ranks(4, save_both_ways, tmp_path, tmp_path, names)
    for name in names:
        before, beside = (tmp_path / f"{name}_{way}/step_00000001" for way in ("before", "beside"))
        assert damage(beside) is None
        sums = [json.loads((folder / "manifest.json").read_text()) for folder in (before, beside)]
        for entries in sums:
            del entries[".metadata"]  # names its own folder
        assert sums[0] == sums[1]
        assert len(list(beside.glob("*.distcp"))) == 4

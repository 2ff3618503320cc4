"""How ranks meet and part."""

import gc
import weakref

import pytest
import torch

from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, joined


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_group_that_was_left_ends_no_threads_under_the_interpreters_lock(kind):
    # torch 2.13 waits for them in the group's destructor, and they may want that lock: a deadlock.
    with joined(RankInfo(), ParallelSettings(kind=kind), torch.device("cpu")) as world:
        assert world.mesh is not None
        group = weakref.ref(world.mesh.get_group())
    del world
    gc.collect()
    assert group() is not None

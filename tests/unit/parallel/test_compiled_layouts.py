"""Compiled blocks on every layout; the other ranks of FSDP2 and HSDP are a fake process group."""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

from gns_pretrain.data.batches import inputs_and_targets
from gns_pretrain.model import loss
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import Llama
from gns_pretrain.noise_scale.meter import NoiseMeter
from gns_pretrain.parallel import mesh
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, joined
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.training.step import train_step

MODEL = LlamaConfig(
    name="test", dim=16, num_layers=3, num_heads=2, num_kv_heads=1, ffn_dim=24, vocab_size=31
)


def join_nobody(place, device, timeout):
    """Three ranks that answer at once, with nothing; DDP's reducer would wait for more."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=place.num_ranks)


@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp", "hsdp"])
def test_micro_batches_of_any_size_and_measurements_share_one_graph(kind, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    ranks = 4 if kind in ("fsdp", "hsdp") else 1
    if ranks > 1:
        monkeypatch.setattr(mesh, "start_process_group", join_nobody)
    place = RankInfo(num_ranks=ranks, ranks_per_node=ranks)
    with joined(place, ParallelSettings(kind=kind), torch.device("cpu")) as world:
        model = Llama(MODEL)
        model.init_weights(0)
        model.compile_blocks(backend="aot_eager")
        parallel = parallelize(model, world, compute_dtype=torch.float32)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.0)
        meter = NoiseMeter(parallel, geometries=["euclidean"])
        # Of what the other ranks did not send no reading can be made; the tap does not mind.
        monkeypatch.setattr(meter, "read", lambda batch_size: [])
        graphs = []
        for size, measured in [(4, False), (4, True), (6, False), (6, True), (2, False), (9, True)]:
            train_step(
                parallel,
                optimizer,
                [inputs_and_targets(torch.randint(31, (size, 13)))] * 2,
                accumulation=2,
                gradient_clip=1.0,
                batch_size=2 * size * ranks,
                meter=meter if measured else None,
            )
            graphs.append(counters["stats"]["unique_graphs"])
    # The softmax has a graph where the loss is ours and not torch's.
    assert graphs == [1 + int(not loss._HAS_LINEAR_CROSS_ENTROPY)] * len(graphs)

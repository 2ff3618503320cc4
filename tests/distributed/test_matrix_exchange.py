import pytest
import torch

from gns_pretrain.parallel.matrix_ownership import MatrixExchange, balanced_owners
from gns_pretrain.parallel.mesh import ParallelSettings, RankInfo, joined
from gns_pretrain.parallel.sharding import MatrixShards, ShardLayout
from tests.distributed.harness import run_ranks

# Fewer rows than ranks, rows that no rank count divides, a single row.
SHAPES = [(5, 3), (2, 7), (9, 4), (1, 6), (8, 8), (13, 2)]


def whole_matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def there_and_back(place: RankInfo) -> list[int]:
    with joined(place, ParallelSettings(kind="fsdp"), torch.device("cpu")) as world:
        layout = ShardLayout.of_mesh(world.mesh)
        whole = whole_matrices()
        owners = balanced_owners([min(shape) ** 3 for shape in SHAPES], world.num_ranks)
        exchange = MatrixExchange([MatrixShards.of_rows(s, layout) for s in SHAPES], owners)
        shards = [matrix[layout.rows_of(layout.shard, len(matrix))] for matrix in whole]
        owned = exchange.to_owners(shards)
        for index, matrix in owned.items():
            torch.testing.assert_close(matrix, whole[index], rtol=0, atol=0)
        back = exchange.start_to_shards({i: 2 * m for i, m in owned.items()}, like=whole[0]).wait()
        for shard, again in zip(shards, back, strict=True):
            torch.testing.assert_close(again, 2 * shard, rtol=0, atol=0)
        return sorted(owned)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_matrix_reaches_one_owner_whole_and_returns_row_by_row(num_ranks, tmp_path):
    owned = run_ranks(num_ranks, there_and_back, tmp_path)
    assert sorted(index for rank in owned for index in rank) == list(range(len(SHAPES)))

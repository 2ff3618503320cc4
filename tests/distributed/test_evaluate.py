"""`gns-pretrain evaluate` on several ranks."""

from pathlib import Path

import pytest

from gns_pretrain.launch.evaluate import Evaluation, EvaluationRequest, evaluate
from gns_pretrain.parallel.mesh import RankInfo
from tests.distributed.harness import run_ranks
from tests.trained import write_trained_run


def on_each_rank(place: RankInfo, run: Path) -> list[Evaluation]:
    return evaluate(EvaluationRequest([str(run)], batch_size=3, device="cpu"), place)


def test_two_ranks_give_the_number_of_one(tmp_path):
    run = write_trained_run(tmp_path / "trained")
    alone = on_each_rank(RankInfo(), run)[0]
    first, second = run_ranks(2, on_each_rank, tmp_path, run)
    assert first[0].loss == pytest.approx(alone.loss, rel=1e-6)
    assert (first[0].tokens, first[0].bytes) == (alone.tokens, alone.bytes)
    assert second == []

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """SLURM with two nodes of 8 GPUs, all of them this machine."""
    if reason := missing():
        pytest.skip(f"SLURM: {reason}")
    cluster = Cluster(Path(tmp_path_factory.mktemp("slurm")))
    try:
        cluster.start()
    except RuntimeError as error:
        cluster.stop()
        pytest.skip(f"SLURM does not start here: {error}")
    yield cluster
    cluster.stop()

"""What only a GPU can show: its kernels, NCCL, and that the host does not wait for them."""

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    """The first GPU, or a skipped test."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    return torch.device("cuda", 0)

from pathlib import Path

import numpy as np
import pytest
import torch

from gns_pretrain.data.batches import Batches, read_in_order
from gns_pretrain.data.mixture import Mixture, Source
from gns_pretrain.data.order import SequenceOrder
from gns_pretrain.data.shards import TokenShards
from gns_pretrain.errors import InputError
from tests.conftest import write_shards

LENGTH = 4
NUM_SEQUENCES = 20
SEED = 11


def write_split(folder: Path, vocab_size: int = 81) -> TokenShards:
    """Token k is k: 20 sequences of 4 tokens and the last target, in two shards."""
    tokens = np.arange(NUM_SEQUENCES * LENGTH + 1, dtype=np.uint16)
    write_shards(folder, {"train": [tokens[:33], tokens[33:]]}, vocab_size)
    return TokenShards.open(folder, "train")


@pytest.fixture
def split(tmp_path) -> TokenShards:
    return write_split(tmp_path / "shards")


@pytest.fixture
def batches(split):
    batches = open_batches(split)
    yield batches
    batches.close()


def open_batches(split: TokenShards, **ranks: int) -> Batches:
    device = torch.device("cpu")
    return Batches(alone(split), sequence_length=LENGTH, seed=SEED, device=device, **ranks)


def alone(split: TokenShards) -> Mixture:
    return Mixture([Source("shards", 1, split)])


def take(batches, cursor, batch_size, micro_batch_size) -> list[torch.Tensor]:
    return list(
        batches.micro_batches(cursor, batch_size=batch_size, micro_batch_size=micro_batch_size)
    )


def expected(start: int, stop: int) -> torch.Tensor:
    """The sequences at positions [start, stop), token by token."""
    sequences = SequenceOrder(NUM_SEQUENCES, SEED)(np.arange(start, stop))
    return torch.from_numpy(sequences[:, None] * LENGTH + np.arange(LENGTH + 1))


def test_step_takes_the_next_sequences_of_the_order_across_epochs(batches):
    for cursor in (0, 6, 12, 18, 24):
        step = take(batches, cursor, 6, 2)
        assert [micro_batch.dtype for micro_batch in step] == [torch.int64] * 3
        torch.testing.assert_close(torch.cat(step), expected(cursor, cursor + 6))


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_ranks_share_the_micro_batches_of_one_process(split, batches, num_ranks):
    of_one_rank = take(batches, 7, 12, 2)
    for rank in range(num_ranks):
        other = open_batches(split, rank=rank, num_ranks=num_ranks)
        part = take(other, 7, 12, 2)
        other.close()
        assert len(part) == 6 // num_ranks
        for micro_batch, same in zip(part, of_one_rank[rank::num_ranks], strict=True):
            torch.testing.assert_close(micro_batch, same)


def test_wrong_guess_of_the_next_step_changes_nothing(batches):
    take(batches, 0, 4, 2)  # reads [4, 8) ahead
    torch.testing.assert_close(torch.cat(take(batches, 4, 8, 4)), expected(4, 12))  # larger batch
    torch.testing.assert_close(
        torch.cat(take(batches, 2, 8, 4)), expected(2, 10)
    )  # earlier position


def test_step_that_was_read_ahead_is_not_read_again(batches, monkeypatch):
    cursors = []
    read = batches._ahead._read
    monkeypatch.setattr(
        batches._ahead, "_read", lambda request: cursors.append(request.cursor) or read(request)
    )
    for cursor in (0, 4, 8):
        take(batches, cursor, 4, 2)
    batches.close()  # ends the reading ahead, or cancels it
    assert cursors in ([0, 4, 8], [0, 4, 8, 12])


def test_failed_read_ahead_surfaces_in_the_step_that_wants_it(tmp_path):
    # The vocabulary ends at 80, which only the last sequence holds, as its last target.
    batches = open_batches(write_split(tmp_path / "shards", vocab_size=80))
    bad = int(np.argmax(SequenceOrder(NUM_SEQUENCES, SEED)(np.arange(NUM_SEQUENCES)) == 19))
    for cursor in range(bad):
        take(batches, cursor, 1, 1)
    with pytest.raises(InputError, match=r"train-00001\.npy holds the token id 80"):
        take(batches, bad, 1, 1)
    batches.close()


def test_data_is_used_up_after_its_last_sequence(batches):
    assert [batches.used_up(cursor) for cursor in (0, 19, 20, 40)] == [[], [], *[["shards"]] * 2]


def test_evaluation_reads_in_file_order(split):
    torch.testing.assert_close(
        read_in_order(split, LENGTH, 2, 4),
        torch.tensor([[8, 9, 10, 11, 12], [12, 13, 14, 15, 16]]),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pins memory only for a GPU")
def test_micro_batches_reach_the_gpu_whole(split):
    device = torch.device("cuda")
    batches = Batches(alone(split), sequence_length=LENGTH, seed=SEED, device=device)
    step = take(batches, 0, 6, 2)
    batches.close()
    torch.testing.assert_close(torch.cat(step).cpu(), expected(0, 6))

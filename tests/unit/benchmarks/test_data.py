import numpy as np

from benchmarks.data import BATCH_SIZE, Data
from tests.conftest import write_shards
from tests.unit.data_samples import make_texts, write_gzip, write_tokenizer


def test_reading_counts_the_tokens_of_whole_steps(tmp_path):
    shards = {"train": [np.zeros(1001, dtype=np.uint16)]}
    folder = write_shards(tmp_path / "shards", shards, 10)
    row = Data(data=folder, sequence_length=10, seconds=0.01).reading(tmp_path)
    assert row["tokens"] > 0
    assert row["tokens"] % (10 * BATCH_SIZE) == 0
    assert row["tokens_per_second"] > 0


def test_preparation_is_timed_against_the_bare_tokenizer(tmp_path):
    path = write_gzip(tmp_path / "a.json.gz", make_texts(200))
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    row = Data(files=[str(path)], tokenizer=str(tokenizer), rounds=1).preparation(tmp_path)
    assert row["ratio_to_bare"] > 0
    assert row["tokens_per_second"] > 0

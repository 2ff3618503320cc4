import numpy as np
import pytest
from tokenizers import Tokenizer, models

from gns_pretrain.data.shards import token_dtype
from gns_pretrain.data.tokenization import (
    DocumentEncoder,
    read_tokenizer,
    special_token_id,
    train_bpe,
    vocabulary_size,
)
from gns_pretrain.errors import InputError
from tests.unit.data_samples import ids_of, make_texts, write_tokenizer

UINT16 = np.dtype(np.uint16)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def open_tokenizer(path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def test_documents_stand_whole_between_one_pair_of_tokens(tokenizer_file):
    # The tokenizer by itself would add the pair once more, and cut each text at 8 tokens.
    texts = make_texts(20)
    encoder = DocumentEncoder(open_tokenizer(tokenizer_file), dtype=UINT16, bos_id=0, eos_id=1)
    ids, starts = encoder.encode(texts)
    assert ids.dtype == np.uint16
    assert starts.tolist() == np.flatnonzero(ids == 0).tolist()
    assert ids.tolist() == ids_of(tokenizer_file, texts)
    assert np.count_nonzero(ids == 0) == np.count_nonzero(ids == 1) == 20


@pytest.mark.parametrize(("bos_id", "eos_id"), [(None, 1), (0, None), (None, None)])
def test_each_of_the_pair_can_be_left_out(tokenizer_file, bos_id, eos_id):
    ids, _ = DocumentEncoder(
        open_tokenizer(tokenizer_file), dtype=UINT16, bos_id=bos_id, eos_id=eos_id
    ).encode(["a"])
    middle = ids_of(tokenizer_file, ["a"])[1:-1]
    before = [] if bos_id is None else [bos_id]
    after = [] if eos_id is None else [eos_id]
    assert ids.tolist() == before + middle + after


def test_name_of_a_special_token_in_a_text_ends_no_document(tokenizer_file):
    encoder = DocumentEncoder(open_tokenizer(tokenizer_file), dtype=UINT16, bos_id=0, eos_id=1)
    ids = encoder.encode(["a<|end_of_text|>b"])[0].tolist()
    assert ids[1:-1].count(1) == 0


def test_vocabulary_past_16_bits_gives_32():
    vocabulary = {"a": 0, "b": 2**16}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    assert vocabulary_size(tokenizer) == 2**16 + 1
    dtype = token_dtype(vocabulary_size(tokenizer))
    ids, _ = DocumentEncoder(tokenizer, dtype=dtype, bos_id=None, eos_id=None).encode(["b"])
    assert ids.dtype == np.uint32
    assert ids.tolist() == [2**16]


def test_same_texts_train_the_same_bpe():
    texts = make_texts(200)
    first, second = (train_bpe(texts, 400).to_str() for _ in range(2))
    assert first == second
    assert vocabulary_size(Tokenizer.from_str(first)) == 400


def test_trained_bpe_gives_every_text_back():
    tokenizer = train_bpe(make_texts(50), 300)
    text = "An unseen text:\n\ttabs, 数, \u0000 and 🙂  "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_unknown_special_token_names_the_setting(tokenizer_file):
    tokenizer = open_tokenizer(tokenizer_file)
    assert special_token_id(tokenizer, "bos", None) == 0
    assert special_token_id(tokenizer, "bos", "<|end_of_text|>") == 1
    with pytest.raises(InputError, match=r"no token <s>; .*--bos-token.*--no-bos"):
        special_token_id(tokenizer, "bos", "<s>")


def test_tokenizer_is_read_from_a_file_or_its_folder(tokenizer_file):
    text = tokenizer_file.read_text()
    assert read_tokenizer(str(tokenizer_file)) == read_tokenizer(str(tokenizer_file.parent)) == text


@pytest.mark.parametrize("name", ["missing.json", "folder", "broken.json"])
def test_file_that_is_no_tokenizer_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(InputError, match=f"--tokenizer=.*{name}"):
        read_tokenizer(str(tmp_path / name))

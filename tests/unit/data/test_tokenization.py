import json
from itertools import chain

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from gns_pretrain.data.shards import token_dtype
from gns_pretrain.data.tokenization import (
    DocumentEncoder,
    as_in_training,
    read_tokenizer,
    special_token_id,
    train_bpe,
    vocabulary_size,
)
from gns_pretrain.errors import InputError
from tests.unit.data_samples import (
    TOKENIZERS,
    by_words,
    edited,
    ids_of,
    make_texts,
    unigram,
    write_tokenizer,
)

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


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_text_gives_the_id_of_a_special_token(kind):
    tokenizer = TOKENIZERS[kind]()
    bos_id, eos_id = (special_token_id(tokenizer, name, None) for name in ("bos", "eos"))
    encoder = DocumentEncoder(tokenizer, dtype=UINT16, bos_id=bos_id, eos_id=eos_id)
    # Whole words, parts of words, in full-width letters that NFKC makes usual ones.
    texts = ["a </s> b", "a</s>b <s> <pad>", "</s>", "\uff1c/s\uff1e", "<s", "/s>", ""]
    ids, starts = encoder.encode(texts)
    assert starts.tolist() == np.flatnonzero(ids == bos_id).tolist()
    assert np.count_nonzero(ids == bos_id) == np.count_nonzero(ids == eos_id) == len(texts)
    if kind != "not special":  # there <pad> is an ordinary piece
        assert tokenizer.token_to_id("<pad>") not in ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_texts_are_encoded_as_the_tokenizer_does(kind):
    tokenizer = TOKENIZERS[kind]()
    texts = ["a b", "ab ba  a", "unknown 数 a"]
    ids, _ = DocumentEncoder(tokenizer, dtype=UINT16, bos_id=None, eos_id=None).encode(texts)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids.tolist() == list(chain(*expected))


def test_merges_that_drop_out_at_random_do_not():
    tokenizer = train_bpe(["abcd abcd"] * 10, 300)
    at_random = edited(tokenizer, dropout=0.9)
    texts = ["abcd abcd"] * 20
    expected = [tokenizer.encode(text).ids for text in texts]
    encoder = DocumentEncoder(at_random, dtype=UINT16, bos_id=None, eos_id=None)
    assert encoder.encode(texts)[0].tolist() == list(chain(*expected))
    exported = as_in_training(at_random, None)
    assert [exported.encode(text).ids for text in texts] == expected


def test_special_name_in_a_text_keeps_its_letters():
    tokenizer = unigram()
    encoder = DocumentEncoder(tokenizer, dtype=UINT16, bos_id=1, eos_id=2)
    ids = encoder.encode(["a </s> b"])[0].tolist()
    assert tokenizer.decode(ids[1:-1], skip_special_tokens=False) == "a </s> b"


@pytest.mark.parametrize("eos_id", [0, None])
def test_one_token_stands_between_documents_where_bos_and_eos_are_the_same(eos_id):
    tokenizer = train_bpe(["a b"] * 10, 300)
    ids, starts = DocumentEncoder(tokenizer, dtype=UINT16, bos_id=0, eos_id=eos_id).encode(
        ["a", "b"]
    )
    a, b = (tokenizer.token_to_id(letter) for letter in "ab")
    assert ids.tolist() == ([a, 0, b, 0] if eos_id == 0 else [0, a, 0, b])
    assert starts.tolist() == [0, 2]


def test_piece_of_ordinary_text_cannot_end_documents():
    with pytest.raises(InputError, match=r"no token a among its added_tokens; .*--eos-token"):
        special_token_id(unigram(), "eos", "a")


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece"])
def test_token_for_unknown_text_cannot_end_documents(kind):
    with pytest.raises(InputError, match="<unk> is also the tokenizer's token for unknown text"):
        DocumentEncoder(TOKENIZERS[kind](), dtype=UINT16, bos_id=None, eos_id=0)


@pytest.mark.parametrize("model", [models.WordPiece, models.WordLevel, models.BPE])
def test_tokenizer_without_its_unknown_token_is_refused(model):
    tokenizer = edited(by_words(model), unk_token="[UNK]")
    with pytest.raises(InputError, match=r"unk_token=\[UNK\], is not in its vocabulary"):
        DocumentEncoder(tokenizer, dtype=UINT16, bos_id=1, eos_id=2)


def test_tokenizer_with_two_tokens_of_one_id_is_refused():
    vocabulary = json.loads(by_words(models.BPE).to_str())["model"]["vocab"]
    tokenizer = edited(by_words(models.BPE), vocab=vocabulary | {"a": vocabulary["</s>"]})
    with pytest.raises(InputError, match="has 2 tokens of id 2; correct"):
        DocumentEncoder(tokenizer, dtype=UINT16, bos_id=1, eos_id=2)


def test_document_that_cannot_be_encoded_is_quoted():
    encoder = DocumentEncoder(edited(unigram(), unk_id=None), dtype=UINT16, bos_id=1, eos_id=2)
    with pytest.raises(InputError, match=r"cannot encode the document 'a 数' \(.*unk_id"):
        encoder.encode(["a", "a 数", "b"])


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
    with pytest.raises(InputError, match=r"no token <s> among.*--bos-token.*--no-bos"):
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

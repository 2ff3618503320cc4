"""Texts to token ids, with beginning- and end-of-sequence tokens around each document.

A tokenizer is a tokenizer.json: a file, a name on the hub, or a byte-level BPE trained here.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gns_pretrain.errors import InputError, one_line

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")
TOKENIZER_FILE = "tokenizer.json"
MIN_BPE_VOCABULARY = 256 + 2  # every byte, and the two tokens around a document


def read_tokenizer(name: str) -> str:
    """Read the text of a tokenizer.json: a file, one in a folder, or that of a model on the hub."""
    path = Path(name) / TOKENIZER_FILE if Path(name).is_dir() else Path(name)
    if path.is_file():
        try:
            text = path.read_bytes().decode("utf-8")
            Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise InputError(
                f"--tokenizer={path} is not a tokenizer.json ({one_line(error)})"
            ) from error
        return text
    if path.suffix == ".json" or Path(name).exists():
        raise InputError(
            f"--tokenizer={name} has no tokenizer.json; give such a file or a hub name"
        )
    try:
        return Tokenizer.from_pretrained(name).to_str()
    except Exception as error:
        raise InputError(
            f"--tokenizer={name} is neither a file nor a model on the hub "
            f"({one_line(error)}); give a tokenizer.json, or --train-bpe"
        ) from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of vocab_size entries, with Llama 3's names of the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_NAMES[0], EOS_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id: a vocabulary may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def special_token_id(tokenizer: Tokenizer, setting: str, name: str | None) -> int:
    """Return the id of the token `name`, or of the first usual one that the tokenizer has.

    Args:
        setting: bos or eos.
    """
    names = (name,) if name else {"bos": BOS_NAMES, "eos": EOS_NAMES}[setting]
    for candidate in names:
        token_id = tokenizer.token_to_id(candidate)
        if token_id is not None:
            return token_id
    raise InputError(
        f"the tokenizer has no token {' or '.join(names)}; name one that it has with "
        f"--{setting}-token, or leave it out with --no-{setting}"
    )


class DocumentEncoder:
    """Encodes documents with one tokenizer; the ids of a document stand between bos_id and eos_id.

    The tokenizer's own template, truncation and padding are disabled: they would add the two
    tokens twice, or cut long documents. A special token's name inside a text is encoded as
    text, so that no document can end itself.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, dtype: np.dtype, bos_id: int | None, eos_id: int | None
    ):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._before = [] if bos_id is None else [bos_id]
        self._after = [] if eos_id is None else [eos_id]
        self._dtype = dtype

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate the documents' ids; return them, and where each document begins.

        Returns:
            ids: [tokens], uint16 or uint32.
            starts: [documents], int64, positions in the ids.
        """
        ids: list[int] = []
        starts: list[int] = []
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            starts.append(len(ids))
            ids += self._before
            ids += encoding.ids
            ids += self._after
        return np.array(ids, dtype=self._dtype), np.array(starts, dtype=np.int64)

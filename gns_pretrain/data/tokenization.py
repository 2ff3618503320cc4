"""Texts to token ids, with beginning- and end-of-sequence tokens around each document.

A tokenizer is a tokenizer.json: a file, a name on the hub, or a byte-level BPE trained here.
"""

import errno
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gns_pretrain.errors import InputError, one_line
from gns_pretrain.system.files import shortened

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")
TOKENIZER_FILE = "tokenizer.json"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # what no other token of a vocabulary has
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
            f"--tokenizer={name} is neither a file nor a model on the hub ({one_line(error)}); "
            + hub_hint(error, "give a tokenizer.json, or --train-bpe")
        ) from error


def hub_hint(error: BaseException, otherwise: str) -> str:
    """What to do about an error of Hugging Face's libraries, which keep files under HF_HOME."""
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC):
        return "name a folder that can be written in the environment variable HF_HOME"
    return otherwise


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

    Only an added token counts: any other one is a piece of ordinary text, which the documents may
    hold, and which could not be kept from ending them without losing it.

    Args:
        setting: bos or eos.
    """
    names = (name,) if name else {"bos": BOS_NAMES, "eos": EOS_NAMES}[setting]
    added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
    for candidate in names:
        if candidate in added:
            return added[candidate]
    raise InputError(
        f"the tokenizer has no token {' or '.join(names)} among its added_tokens; name one that it "
        f"has with --{setting}-token, or leave it out with --no-{setting}"
    )


def without_special_tokens(tokenizer: Tokenizer, document_ids: Iterable[int]) -> Tokenizer:
    """Return a copy that encodes every text as text: no text gives the id of a special token.

    `encode_special_tokens` by itself leaves the names in the model's vocabulary, where Unigram
    finds them in a text, WordPiece, WordLevel and BPE with ignore_merges as words, and BPE by
    merges. The copy knows each by a name of its own that no text holds; all ids stay.

    Args:
        tokenizer: of any kind; not changed.
        document_ids: of the tokens around a document, special or not.

    Raises:
        InputError: two tokens have one id; the token for unknown text is missing, or is one of
            `document_ids`.
    """
    ids = Counter(tokenizer.get_vocab(with_added_tokens=True).values())
    if ids and (most := ids.most_common(1)[0])[1] > 1:
        raise InputError(
            f"the tokenizer has {most[1]} tokens of id {most[0]}; correct its tokenizer.json"
        )
    content = json.loads(tokenizer.to_str())
    model: dict[str, Any] = content["model"]
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    around = {str(tokenizer.id_to_token(token_id)) for token_id in document_ids}
    secret = secrets.token_hex(16)
    renamed = {name: f"{secret} {number}" for number, name in enumerate(sorted(special | around))}

    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model["unk_id"] is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    if unknown is not None and tokenizer.token_to_id(unknown) is None:
        raise InputError(
            f"the tokenizer's token for unknown text, unk_token={unknown}, is not in its "
            "vocabulary; correct its tokenizer.json"
        )
    if unknown in around:
        raise InputError(
            f"{unknown} is also the tokenizer's token for unknown text, which would then begin or "
            "end documents; name another one with --bos-token or --eos-token, or leave it out "
            "with --no-bos or --no-eos"
        )

    for token in content["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    if model["type"] == "Unigram":
        model["vocab"] = [(renamed.get(piece, piece), score) for piece, score in model["vocab"]]
    else:
        model["vocab"] = {renamed.get(piece, piece): id for piece, id in model["vocab"].items()}
        model["unk_token"] = renamed.get(unknown, unknown)
    prefix = model.get("continuing_subword_prefix") or ""
    if "merges" in model:
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if not renamed.keys() & {left, right, left + right[len(prefix) :]}
        ]
    content |= {"truncation": None, "padding": None, "post_processor": None}
    if "dropout" in model:  # of BPE's merges, at random: no two preparations would be the same
        model["dropout"] = None
    return Tokenizer.from_str(json.dumps(content))


def bytes_of_tokens(tokenizer: Tokenizer, ids: int, document_ids: Iterable[int]) -> np.ndarray:
    """Count the UTF-8 bytes that each token stands for within a text, int64 [ids].

    A byte-level token has a character for each byte, whole characters of text or not; one of
    another kind has the bytes that it adds to the decoded text after another token, and a byte of
    its own (<0x0A>) is one. Special tokens, those of `document_ids` and unused ids have none.

    Args:
        ids: of the vocabulary; further ones of the tokenizer are left out.
        document_ids: of the tokens around a document, special or not.
    """
    counts = np.zeros(ids, dtype=np.int64)
    content = json.loads(tokenizer.to_str())
    is_byte_level = '"ByteLevel"' in json.dumps(content["decoder"])
    added = {token["id"]: token for token in content["added_tokens"]}
    before = tokenizer.encode("a", add_special_tokens=False).ids
    alone = len(tokenizer.decode(before).encode())
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id >= ids or token_id in document_ids:
            continue
        if token_id in added:
            counts[token_id] = 0 if added[token_id]["special"] else len(token.encode())
        elif is_byte_level:
            counts[token_id] = len(token)
        elif BYTE_TOKEN.fullmatch(token):
            counts[token_id] = 1
        else:
            counts[token_id] = len(tokenizer.decode([*before, token_id]).encode()) - alone
    return counts


def as_in_training(tokenizer: Tokenizer, bos_id: int | None) -> Tokenizer:
    """Return a copy that encodes a prompt as training encoded the beginning of a document.

    So bos comes first where documents had one, and nothing at the end: a prompt goes on. Names of
    special tokens stay special, for those who write prompts with them.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    if hasattr(copy.model, "dropout"):
        copy.model.dropout = None
    bos = [] if bos_id is None else [(tokenizer.id_to_token(bos_id), bos_id)]
    names = [name for name, _ in bos]
    copy.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B"], special_tokens=bos
    )
    return copy


class DocumentEncoder:
    """Encodes documents with one tokenizer; the ids of a document stand between bos_id and eos_id.

    Where both are one id, one stands between two documents. The tokenizer's own template,
    truncation, padding and dropout of merges are disabled: they would add the two tokens twice, cut
    long documents, or tokenize at random.
    A special token's name inside a text is encoded as text, so that no document can end itself.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, dtype: np.dtype, bos_id: int | None, eos_id: int | None
    ):
        around = {token_id for token_id in (bos_id, eos_id) if token_id is not None}
        self._tokenizer = without_special_tokens(tokenizer, around)
        self._before = [] if bos_id in (None, eos_id) else [bos_id]
        self._after = [] if eos_id is None else [eos_id]
        self._dtype = dtype

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate the documents' ids; return them, and where each document begins.

        Returns:
            ids: [tokens], uint16 or uint32.
            starts: [documents], int64, positions in the ids.

        Raises:
            InputError: the tokenizer cannot encode a document.
        """
        ids: list[int] = []
        starts: list[int] = []
        for encoding in self._encodings(texts):
            starts.append(len(ids))
            ids += self._before
            ids += encoding.ids
            ids += self._after
        return np.array(ids, dtype=self._dtype), np.array(starts, dtype=np.int64)

    def _encodings(self, texts: list[str]) -> list[Encoding]:
        try:
            return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises the base class
            if len(texts) > 1:  # which of them?
                return [encoding for text in texts for encoding in self._encodings([text])]
            raise InputError(
                f"the tokenizer cannot encode the document {shortened(texts[0])} "
                f"({one_line(error)}); mend or replace its tokenizer.json"
            ) from error

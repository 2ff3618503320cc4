"""Small corpora in C4's schema, and a tokenizer, for the tests of data preparation."""

import gzip
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.decoders import Metaspace

from gns_pretrain.data.tokenization import train_bpe

WORDS = ["the", "gradient", "noise", "scale", "grows", "as", "training", "goes", "on", "é", "東京"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 5 to 60 words, no two alike."""
    generator = random.Random(seed)
    lengths = [generator.randint(5, 60) for _ in range(count)]
    return [f"{k} " + " ".join(generator.choices(WORDS, k=n)) for k, n in enumerate(lengths)]


def as_line(text: str) -> bytes:
    """One record as C4 has it."""
    record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.com"}
    return json.dumps(record).encode() + b"\n"


def write_gzip(path: Path, texts: list[str]) -> Path:
    path.write_bytes(gzip.compress(b"".join(map(as_line, texts))))
    return path


def write_tokenizer(path: Path) -> Path:
    """A small BPE whose own template adds both special tokens, and which cuts texts at 8 tokens."""
    tokenizer = train_bpe(make_texts(100), 300)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>",
        special_tokens=[("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)],
    )
    tokenizer.enable_truncation(8)
    tokenizer.save(str(path))
    return path


def ids_of(tokenizer_file: Path, texts: list[str]) -> list[int]:
    """What the shards should hold: each document encoded by itself, between ids 0 and 1."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    ids = [[0, *tokenizer.encode(text, add_special_tokens=False).ids, 1] for text in texts]
    return [token for document in ids for token in document]


# Tokenizers of every kind of model, with ordinary pieces for all that their tests encode.
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
PIECES = [*"▁<>/sabdpunk", "▁a", "▁b", "</", "s>"]


def edited(tokenizer: Tokenizer, **model: object) -> Tokenizer:
    """The tokenizer with other settings of its model."""
    content = json.loads(tokenizer.to_str())
    content["model"] |= model
    return Tokenizer.from_str(json.dumps(content))


def unigram(**options: object) -> Tokenizer:
    pieces = [(piece, 0.0) for piece in SPECIAL] + [(piece, -5.0) for piece in PIECES]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, **options))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def by_words(kind: type, **options: object) -> Tokenizer:
    """WordPiece, WordLevel or BPE, of words between spaces."""
    vocabulary = {piece: id for id, piece in enumerate(SPECIAL + PIECES)}
    merges = {"merges": []} if kind is models.BPE else {}
    tokenizer = Tokenizer(kind(vocabulary, **merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return edited(tokenizer, **options)


def with_tokens_that_are_not_special() -> Tokenizer:
    tokenizer = by_words(models.BPE)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    return Tokenizer.from_str(json.dumps(content))


def byte_level_with_template() -> Tokenizer:
    """As GPT-2's kind, with a template that ends a prompt."""
    tokenizer = train_bpe(["a b"] * 10, 300)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(t, tokenizer.token_to_id(t)) for t in SPECIAL[1:3]]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    return tokenizer


TOKENIZERS = {
    "Unigram": unigram,
    "Unigram with bytes": lambda: unigram(byte_fallback=True),
    "WordPiece": lambda: by_words(models.WordPiece),
    "WordLevel": lambda: by_words(models.WordLevel),
    "BPE that looks words up": lambda: by_words(models.BPE, ignore_merges=True),
    "BPE with merges to a special token": lambda: by_words(
        models.BPE, merges=[("<", "/"), ("s", ">"), ("</", "s>")]
    ),
    "BPE with bytes": lambda: by_words(models.BPE, byte_fallback=True, ignore_merges=True),
    "not special": with_tokens_that_are_not_special,
    "byte level": byte_level_with_template,
}

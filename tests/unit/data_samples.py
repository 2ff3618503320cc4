"""Small corpora in C4's schema, and a tokenizer, for the tests of data preparation."""

import gzip
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, processors

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

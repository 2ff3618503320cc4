"""What `scripts/benchmark.py all` runs: a list of its own sub-commands with their arguments."""

import gzip
import json
from pathlib import Path

from gns_pretrain.benchmark.workload import write_random_tokens
from gns_pretrain.data.tokenization import train_bpe

Plan = list[list[str]]


def gpu_plan() -> Plan:
    """The table for one GPU, the most wanted figures first; under ten minutes on an H200."""
    return [
        ["speed", "--model", "llama3_160m"],
        ["speed", "--model", "llama3_1b", "--pairs", "3"],
        ["profile", "--model", "llama3_160m", "--batch-size", "16"],
        ["profile", "--model", "llama3_160m", "--batch-size", "16", "--geometry", "nuclear"],
        ["memory", "--steps", "200"],
    ]


def cpu_plan() -> Plan:
    """The table for a CPU."""
    return [
        ["model"],
        ["model", "--compile"],
        ["speed"],
        ["noise_scale", "--ranks", "1", "2", "--pairs", "10"],
        ["optimizer", "--layers", "2"],
        ["profile"],
        ["data"],
        ["startup"],
        ["memory"],
    ]


def quick_plan(folder: Path) -> Plan:
    """Every sub-command at its smallest: that it works, not how fast.

    Args:
        folder: empty; takes the data.
    """
    shards = folder / "shards"
    shards.mkdir()
    write_random_tokens(shards, 64, {"train": 2**13, "validation": 2**10})
    documents, tokenizer = write_documents(folder)
    model = ["--model", "demo", "--vocab-size", "64"]
    text = ["--data", str(shards), "--files", str(documents), "--tokenizer", str(tokenizer)]
    sample = [*model, "--micro-batch-size", "1", "--sequence-length", "8"]
    step = [*sample, "--batch-size", "2", "--no-compile"]
    run = ["data=shards", f"data.path={shards}", "data.sequence_length=8", "token_budget=1024"]
    run += ["model=demo", "evaluation.num_sequences=1", "compile=never", "launch.threads=1"]
    return [
        ["model", *model, "--batch-size", "1", "--sequence-length", "8", "--pairs", "2"],
        ["data", *text, "--seconds", "0", "--rounds", "1", "--sequence-length", "8"],
        ["noise_scale", *sample, "--geometry", "manhattan", "--samples", "2", "--pairs", "2"],
        ["optimizer", *model, "--layers", "1", "--pairs", "2", "--eager"],
        ["profile", *step, "--steps", "1", "--geometry", "nuclear"],
        ["speed", *step, "--pairs", "2", "--product-size", "64"],
        ["startup", "--starts", "1", "--warm", *run],
        ["memory", *model, "--steps", "12"],
        ["paper", "--ranks", "8"],
    ]


def write_documents(folder: Path) -> tuple[Path, Path]:
    """A few documents in C4's schema, and a tokenizer of their words."""
    texts = ["the gradient of a small batch is noise", "a larger batch hears the signal"] * 8
    documents, tokenizer = folder / "documents.json.gz", folder / "tokenizer.json"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    documents.write_bytes(gzip.compress(lines.encode()))
    train_bpe(texts, 300).save(str(tokenizer))
    return documents, tokenizer

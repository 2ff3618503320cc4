"""`gns-pretrain evaluate` against a plain loop: loss, tokens and bytes of shards and of texts."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from gns_pretrain.commands import evaluate as command
from gns_pretrain.data import settings
from gns_pretrain.data.tokenization import bytes_of_tokens, without_special_tokens
from gns_pretrain.errors import InputError
from gns_pretrain.launch.evaluate import Evaluation, EvaluationRequest, evaluate
from gns_pretrain.model.huggingface import export_hf_folder
from gns_pretrain.parallel.mesh import RankInfo
from gns_pretrain.training.checkpoint_reader import load_model
from gns_pretrain.training.trained_model import TrainedModel
from tests.trained import POSITIONS, TEXTS, write_text_shards, write_trained_run
from tests.unit.data_samples import TOKENIZERS, as_line, write_gzip

NEWEST = "step_00000002"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("trained"))


def evaluated(checkpoint: Path, **changes) -> Evaluation:
    values = {"batch_size": 3, "device": "cpu"}
    return evaluate(EvaluationRequest([str(checkpoint)], **(values | changes)))[0]


def plain_loop(run: Path, texts: list[str], length: int = POSITIONS) -> dict[str, float]:
    """Each token after the first, predicted from those of its window before it, one at a time."""
    model = load_model(run / "checkpoints" / NEWEST)
    tokenizer = Tokenizer.from_file(str(run.parent / "data" / "tokenizer.json"))
    tokenizer.no_truncation()
    ids = [
        token
        for text in texts
        for token in [0, *tokenizer.encode(text, add_special_tokens=False).ids, 1]
    ]
    nats = 0.0
    with torch.no_grad():
        for position in range(1, len(ids)):
            window = (position - 1) // length * length
            logits = model(torch.tensor([ids[window:position]]))[0, -1]
            nats += F.cross_entropy(logits.double(), torch.tensor(ids[position])).item()
    num_bytes = sum(len(text.encode()) for text in texts)
    return {
        "loss": nats / (len(ids) - 1),
        "perplexity": math.exp(nats / (len(ids) - 1)),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "tokens": len(ids) - 1,
        "bytes": num_bytes,
    }


def test_every_token_of_the_runs_validation_split_is_predicted_once(run):
    found = evaluated(run)
    expected = plain_loop(run, TEXTS["validation"])
    assert expected["tokens"] % POSITIONS  # so that a shorter sequence is left
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert (found.step, found.tokens_seen) == (2, 16 * POSITIONS)
    data = {"data": str(run.parent / "data")}
    assert evaluated(run / "checkpoints" / NEWEST, **data).loss == found.loss
    train = evaluated(run, split="train", **data)
    assert train.tokens == plain_loop(run, TEXTS["train"])["tokens"]


def test_texts_are_evaluated_as_their_shards_are(run, tmp_path):
    texts = TEXTS["validation"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(map(as_line, texts[:5])))
    write_gzip(tmp_path / "b1.jsonl.gz", texts[5:9])
    write_gzip(tmp_path / "b2.jsonl.gz", texts[9:])
    found = evaluated(run, text=[str(tmp_path / "a.jsonl"), str(tmp_path / "b*.jsonl.gz")])
    shards = evaluated(run)
    assert (found.loss, found.tokens, found.bytes) == (shards.loss, shards.tokens, shards.bytes)
    other = plain_loop(run, texts, length=10)
    shorter = evaluated(run, text=[str(tmp_path) + "/*"], sequence_length=10)
    assert shorter.loss == pytest.approx(other["loss"], rel=1e-5)


def test_first_sequences_give_the_loss_that_training_records(run):
    model = load_model(run / "checkpoints" / NEWEST)
    tokens = np.concatenate([np.load(p) for p in sorted((run.parent / "data").glob("val*.npy"))])
    sequences = [tokens[i * POSITIONS : (i + 1) * POSITIONS + 1] for i in range(5)]
    batch = torch.from_numpy(np.stack(sequences).astype(np.int64))
    with torch.no_grad():
        expected = model(batch[:, :-1], batch[:, 1:]).item()
    found = evaluated(run, num_sequences=5)
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.tokens == 5 * POSITIONS


def test_exported_model_gives_the_loss_of_its_checkpoint(run, tmp_path):
    trained = TrainedModel.find(run)
    export_hf_folder(trained.load(), tmp_path / "hf", trained.text())
    own = evaluated(run)
    found = evaluated(tmp_path / "hf", data=str(run.parent / "data"))
    assert (found.loss, found.bits_per_byte) == (own.loss, own.bits_per_byte)
    with pytest.raises(InputError, match="is in no run directory; name its text with --data"):
        evaluated(tmp_path / "hf")


def test_embedded_text_is_that_of_the_run(run, monkeypatch):
    monkeypatch.setattr(settings, "ensure_embedded", lambda vocab_size: run.parent / "data")
    assert evaluated(run, data="embedded").loss == evaluated(run).loss


def test_table_has_a_row_for_each_checkpoint(run, capsys, monkeypatch):
    words = ["evaluate", "--checkpoint", str(run), "--all", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*words, "--format", "json"])
    command.main()
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] != rows[1]["loss"]
    assert rows[1]["loss"] == pytest.approx(evaluated(run).loss, rel=1e-6)
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    shown = capsys.readouterr().out
    assert all(f"{row['loss']:.4f}" in shown for row in rows)


def other_data(run: Path, tmp_path: Path) -> str:
    """Shards of the same number of ids, from another tokenizer."""
    folder = write_text_shards(tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer_sha256": None}))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sequences": 4000}, "use more text, or a lower --num-sequences"),
        ({"split": "test"}, "--split=test is not in .* it has train, validation"),
        ({"text": ["nothing.jsonl"]}, "--text=nothing.jsonl matches no file"),
        ({"text": ["a"], "data": "b"}, "--data and --text exclude each other"),
        ({"data": __file__}, "is no folder of shards; --text evaluates a file"),
        ({"data": other_data}, "was prepared with another tokenizer than that of"),
    ],
)
def test_bad_request_is_named(run, tmp_path, changes, message):
    values = {k: v(run, tmp_path) if callable(v) else v for k, v in changes.items()}
    with pytest.raises(InputError, match=message):
        evaluated(run, **values)


def test_shards_without_a_tokenizer_have_no_bytes(run, tmp_path):
    folder = write_text_shards(tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    meta = json.loads((folder / "meta.json").read_text())
    meta |= {"tokenizer": None, "tokenizer_sha256": None}
    (folder / "meta.json").write_text(json.dumps(meta))
    found = evaluated(run, data=str(folder))
    assert (found.loss, found.bytes, found.bits_per_byte) == (evaluated(run).loss, None, None)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_of_tokens_add_up_to_those_of_their_text(kind):
    tokenizer = TOKENIZERS[kind]()
    counts = bytes_of_tokens(tokenizer, 1000, {1, 2})
    plain = without_special_tokens(tokenizer, {1, 2})
    for text in ("a b", "ab ba a", "ab"):
        ids = plain.encode(text, add_special_tokens=False).ids
        decoded = plain.decode([*plain.encode("a", add_special_tokens=False).ids, *ids])
        assert counts[ids].sum() == len(decoded.encode()) - 1
    assert counts[[1, 2]].tolist() == [0, 0]
    if kind == "byte level":
        assert counts[plain.encode("數 é").ids].sum() == len("數 é".encode())


TASK = """\
task: next_words
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
QUESTIONS = [
    ("the gradient", [" noise", " scale"]),
    ("training", [" goes on", " grows", " as é"]),
    ("noise scale", [" 東京", " the", " on"]),
    ("", ["the", "gradient"]),
]


def log_likelihood(run: Path, question: str, choice: str) -> float:
    model = load_model(run / "checkpoints" / NEWEST)
    tokenizer = Tokenizer.from_file(str(run.parent / "data" / "tokenizer.json"))
    tokenizer.no_truncation()
    whole = [0, *tokenizer.encode(question + choice, add_special_tokens=False).ids]
    start = 1 + len(tokenizer.encode(question, add_special_tokens=False).ids)
    with torch.no_grad():
        logs = model(torch.tensor([whole]))[0].log_softmax(-1)
    return sum(logs[i - 1, whole[i]].item() for i in range(start, len(whole)))


def test_harness_scores_the_model_as_our_logits_do(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness takes 200 MB: extra eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    likelihoods = [[log_likelihood(run, q, c) for c in choices] for q, choices in QUESTIONS]
    best = [row.index(max(row)) for row in likelihoods]
    rows = [
        {"question": q, "choices": choices, "answer": best[i] if i else 1 - best[i]}
        for i, (q, choices) in enumerate(QUESTIONS)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "next_words.yaml").write_text(TASK % (tmp_path / "data.jsonl"))
    words = ["--tasks", "next_words", "--include-path", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", str(run), *words])
    command.main()
    shown = capsys.readouterr().out
    assert "next_words" in shown
    assert "0.7500" in shown
    assert "bits/byte" not in shown
    with pytest.raises(InputError, match="--tasks=no_such is no task of lm-evaluation-harness"):
        evaluated(run, tasks=["no_such"])


def test_tasks_without_their_package_or_on_several_ranks_are_one_line(run, monkeypatch):
    with pytest.raises(InputError, match="--tasks runs on one process, not on 2"):
        evaluate(EvaluationRequest([str(run)], tasks=["a,b"]), RankInfo(0, 2))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"--tasks needs .*; pip install 'gns-pretrain\[eval\]'"):
        evaluated(run, tasks=["a"])

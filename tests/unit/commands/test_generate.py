"""`gns-pretrain generate`: exact at temperature 0, repeatable, and never beyond the positions."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from gns_pretrain.commands import generate as command
from gns_pretrain.commands.generate import Generated, GenerationRequest, generate
from gns_pretrain.errors import InputError
from gns_pretrain.model.huggingface import export_hf_folder
from gns_pretrain.training.checkpoint_reader import load_model
from gns_pretrain.training.trained_model import TrainedModel
from tests.trained import POSITIONS, write_trained_run

PROMPTS = ["", "the", "noise scale grows as training", "gradient 東京 goes é", "\tthe"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    trained = TrainedModel.find(run)
    export_hf_folder(trained.load(), folder, trained.text())
    return folder


def generated(checkpoint: Path, prompts: list[str] = PROMPTS, **changes) -> list[Generated]:
    values = {"max_new_tokens": 12, "temperature": 0.0, "device": "cpu"}
    return list(generate(GenerationRequest(str(checkpoint), prompts, **(values | changes))))


def greedy(run: Path, prompt: str, number: int) -> list[int]:
    """The likeliest token of our own model's logits, one after the other, until eos."""
    model = load_model(run / "checkpoints" / "step_00000002")
    tokenizer = Tokenizer.from_file(str(run.parent / "data" / "tokenizer.json"))
    tokenizer.no_truncation()
    ids = [0, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    new: list[int] = []
    with torch.no_grad():
        while len(new) < number:
            token = model(torch.tensor([ids + new]))[0, -1].argmax().item()
            if token == 1:
                break
            new.append(token)
    return new


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_tokens_are_those_of_our_logits_whatever_is_padded(run, exported, batch_size):
    expected = [greedy(run, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)  # so that mixing them up shows
    for checkpoint in (run, exported):
        found = generated(checkpoint, batch_size=batch_size)
        assert [each.prompt for each in found] == PROMPTS
        assert [each.ids for each in found] == expected
        assert [each.ended for each in found] == [len(ids) < 12 for ids in expected]


def test_transformers_generates_the_same_from_the_exported_folder(run, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    new = model.generate(**batch, max_new_tokens=12, do_sample=False)
    texts = tokenizer.batch_decode(new[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [each.text for each in generated(run)] == texts


def test_samples_repeat_with_their_seed_and_do_not_depend_on_other_prompts(run):
    sampled = {"temperature": 1.0, "num_samples": 2, "top_k": 0}
    once = generated(run, **sampled)
    assert generated(run, **sampled) == once
    assert [each.sample for each in once] == [1, 2] * len(PROMPTS)
    assert once[0].ids != once[1].ids
    assert generated(run, PROMPTS[2:], **sampled) == once[4:]
    assert generated(run, seed=1, **sampled) != once
    likeliest = generated(run, temperature=1.0, top_k=1)
    assert [each.ids for each in likeliest] == [each.ids for each in generated(run)]
    assert [each.ids for each in generated(run, temperature=1.0, top_p=1e-9, top_k=0)] == [
        each.ids for each in likeliest
    ]


def test_text_ends_at_the_positions_or_is_refused(run):
    long = "the " * 60
    tokens = len(TrainedModel.find(run).text().tokenizer.encode(long).ids)
    assert tokens > POSITIONS
    with pytest.raises(InputError, match=f"prompt 2 has {tokens} tokens, which leaves none"):
        generated(run, ["the", long], max_new_tokens=None)
    with pytest.raises(InputError, match=f"--max-new-tokens=58 .* {POSITIONS} .* at most 57"):
        generated(run, ["the"], max_new_tokens=58)
    assert len(generated(run, ["the"], max_new_tokens=57)) == 1
    together = generated(run, ["the", "the " * 8], max_new_tokens=None, batch_size=2)
    alone = [generated(run, [each.prompt], max_new_tokens=None)[0] for each in together]
    assert together == alone
    assert all(each.ended or len(each.ids) > 12 for each in together)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 2}, "--num-samples=2 would be the same text each time"),
        ({"temperature": -1.0}, "--temperature=-1.0 must be at least 0"),
        ({"top_p": 0.0}, "--top-p=0.0 must be positive"),
        ({"top_p": 1.5}, "--top-p=1.5 must be at most 1"),
        ({"prompts_file": Path("x")}, "exclude each other"),
        ({"tokenizer": "nowhere.json"}, "--tokenizer=nowhere.json has no tokenizer.json"),
    ],
)
def test_bad_request_is_named(run, changes, message):
    with pytest.raises(InputError, match=message):
        generated(run, **changes)


def test_what_has_no_tokenizer_or_no_checkpoint_is_named(run, exported, tmp_path):
    bare = shutil.copytree(exported, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="bare has no tokenizer; name one with --tokenizer"):
        generated(bare)
    named = str(run.parent / "data" / "tokenizer.json")
    assert generated(bare, ["the"], tokenizer=named)
    with pytest.raises(InputError, match=r"--checkpoint=.* is no run directory, step_\* folder or"):
        generated(tmp_path)


def printed(arguments: list[str], capsys, monkeypatch, stdin: bytes = b"") -> str:
    monkeypatch.setattr(sys, "argv", ["generate", *arguments, "--device", "cpu"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    command.main()
    return capsys.readouterr().out


def test_command_streams_the_text_that_it_gives_as_json(run, capsys, monkeypatch, tmp_path):
    words = ["--checkpoint", str(run), "--max-new-tokens", "8", "--seed", "3"]
    streamed = printed([*words, *PROMPTS[1:]], capsys, monkeypatch)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]) + "\n")
    file = [*words, "--prompts-file", str(tmp_path / "prompts.txt")]
    lines = printed([*file, "--format", "json"], capsys, monkeypatch).splitlines()
    texts = [json.loads(line)["prompt"] + json.loads(line)["text"] for line in lines]
    assert streamed == "---\n".join(command.shown(f"{text}\n") for text in texts)
    assert printed(words, capsys, monkeypatch, stdin="\n".join(PROMPTS[1:]).encode()) == streamed
    batches = [*file, "--batch-size", "3", "--temperature", "0"]
    assert printed(batches, capsys, monkeypatch).count("---\n") == len(PROMPTS) - 2


def test_without_any_prompt_nothing_is_generated(run, capsys, monkeypatch):
    with pytest.raises(InputError, match="standard input holds no prompt; give one"):
        printed(["--checkpoint", str(run)], capsys, monkeypatch)


def test_a_terminal_is_shown_text_and_obeys_none():
    assert command.shown("a\x1b[2J\tb\n") == "a\\x1b[2J\tb\n"

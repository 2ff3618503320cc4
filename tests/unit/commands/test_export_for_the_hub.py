"""`gns-pretrain export-hf` of a run directory: model card, padding, and upload."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from tokenizers import AddedToken, Tokenizer, models

from gns_pretrain.commands import export_hf
from gns_pretrain.errors import InputError
from gns_pretrain.model.huggingface import ExportedText
from tests.trained import POSITIONS, write_trained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("trained"))


def export(run: Path, monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["export-hf", "--checkpoint", str(run), *words])
    export_hf.main()


def front_matter(folder: Path) -> tuple[dict, str]:
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_card_says_what_was_trained_and_where_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(run, monkeypatch, "--out", "named", "--license", "apache-2.0")
    head, body = front_matter(tmp_path / "named")
    assert (head["license"], head["library_name"]) == ("apache-2.0", "transformers")
    for said in (
        f"{16 * POSITIONS:,} tokens of\nthe token shards data",
        "| validation loss | 4.0000, perplexity 54.60 |",
        f"| {8 * POSITIONS:,} | 1 | 5.0000 |\n| {16 * POSITIONS:,} | 2 | 4.0000 |",
        'model="named"',
    ):
        assert said in body
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["optimizer"]["lr"] == 1e-2
    assert not any(name in body for name in ("/tmp", str(run.parent), "output_directory"))
    older = run / "checkpoints" / "step_00000001"
    export(older, monkeypatch, "--out", "older")
    head, body = front_matter(tmp_path / "older")
    assert "license" not in head
    assert "No licence has been chosen" in body
    assert "| validation loss | 5.0000, perplexity 148.41 |" in body


def test_batches_of_prompts_are_padded_as_one_prompt_is_not(run, tmp_path, monkeypatch):
    from transformers import pipeline

    export(run, monkeypatch, "--out", str(tmp_path / "hf"))
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    # There it would take the embedding of eos out of any further training.
    assert "pad_token_id" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    speak = pipeline("text-generation", model=str(tmp_path / "hf"), device="cpu")
    prompts = ["the", "noise scale grows as training goes on"]
    options = {"max_new_tokens": 8, "do_sample": False}
    together = [row[0] for row in speak(prompts, batch_size=2, **options)]
    assert together == [speak(prompt, **options)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("tokens", "pad"), [(["<s>", "</s>"], 1), (["<s>", "</s>", "<pad>"], 2), (["<s>"], 0), ([], 0)]
)
def test_padding_is_the_tokenizers_own_token_else_eos_else_bos(tokens, pad):
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(tokens)}, "<s>"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in tokens])
    ends = {"bos_id": 0, "eos_id": 1 if "</s>" in tokens else None}
    assert ExportedText(8, tokenizer if tokens else None, **ends).pad_id == pad


def test_newest_whole_checkpoint_of_a_run_is_taken_and_a_damaged_one_named(
    run, tmp_path, monkeypatch, capsys
):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "checkpoints" / "step_00000002" / "model.json").write_text("{}")
    export(copy, monkeypatch, "--out", str(tmp_path / "hf"), "--json")
    said = capsys.readouterr()
    assert json.loads(said.out)["checkpoint"] == str(copy / "checkpoints" / "step_00000001")
    assert "step_00000002 is damaged (model.json has" in said.err
    with pytest.raises(InputError, match="is a Hugging Face folder already"):
        export(tmp_path / "hf", monkeypatch, "--out", str(tmp_path / "again"))


class FakeHub:
    """What huggingface_hub.HfApi is asked for."""

    endpoint = "https://hub.test"
    calls: list = []  # noqa: RUF012
    private = True
    failure: Exception | None = None

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> SimpleNamespace:
        if self.failure:
            raise self.failure
        self.calls.append((name, private, exist_ok))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    def repo_info(self, repository: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)


FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
FILES += ["tokenizer.json", "tokenizer_config.json"]


def test_upload_is_private_unless_asked_otherwise(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    export(run, monkeypatch, "--push-to-hub", "mine")
    assert FakeHub.calls == [("mine", True, True), ("me/mine", FILES)]
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub.test/me/mine (private)"
    export(run, monkeypatch, "--push-to-hub", "mine", "--public", "--out", str(tmp_path / "out"))
    assert FakeHub.calls[2] == ("mine", False, True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


def test_upload_that_fails_is_one_line_and_leaves_the_export(run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "failure", RuntimeError("401\nno token"))
    out = tmp_path / "out"
    with pytest.raises(InputError) as refused:
        export(run, monkeypatch, "--push-to-hub", "mine", "--out", str(out))
    assert "--push-to-hub=mine failed (401 no token); check the name" in str(refused.value)
    assert str(refused.value).endswith(f"the export is whole in {out}")
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --out, a folder to write, or --push-to-hub"),
        (["--out", "x", "--public"], "--public is for --push-to-hub alone"),
    ],
)
def test_bad_request_is_named(run, monkeypatch, words, message):
    with pytest.raises(InputError, match=message):
        export(run, monkeypatch, *words)


def test_card_names_datasets_of_the_hub_and_every_source_of_a_mixture(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run.parent, tmp_path / "copy")
    meta = json.loads((copy / "data" / "meta.json").read_text())
    made = {"source": "hub", "dataset": "allenai/c4", "dataset_config": "en"}
    (copy / "data" / "meta.json").write_text(json.dumps(meta | {"settings": made}))
    provenance = json.loads((copy / "small" / "run.json").read_text())
    provenance["data"]["folder"] = str(copy / "data")
    provenance["init"] = {"from": "/secret/base", "what": "weights", "step": 3, "sha256": ""}
    (copy / "small" / "run.json").write_text(json.dumps(provenance))
    export(copy / "small", monkeypatch, "--out", str(tmp_path / "hub"))
    head, body = front_matter(tmp_path / "hub")
    assert head["datasets"] == ["allenai/c4"]
    assert "tokens of\nallenai/c4 en." in body
    assert "It began from base." in body
    settings = yaml.safe_load((copy / "small" / "config.yaml").read_text())
    both = [{"path": str(copy / "data"), "weight": 3.0}, {"path": "embedded", "weight": 1.0}]
    settings["data"] |= {"path": "mixture", "sources": both}
    (copy / "small" / "config.yaml").write_text(yaml.safe_dump(settings))
    export(copy / "small", monkeypatch, "--out", str(tmp_path / "mixed"))
    head, body = front_matter(tmp_path / "mixed")
    assert head["datasets"] == ["allenai/c4"]
    assert "allenai/c4 en (weight 3), docstrings of Python packages (weight 1)." in body
    assert "secret" not in body

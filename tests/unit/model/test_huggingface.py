import json
import math
import os
import signal
import sys
from itertools import count

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from gns_pretrain.data.tokenization import (
    DocumentEncoder,
    as_in_training,
    special_token_id,
    vocabulary_size,
)
from gns_pretrain.errors import InputError
from gns_pretrain.model.config import LlamaConfig, RopeScaling
from gns_pretrain.model.huggingface import ExportedText, export_hf_folder, load_hf_folder
from gns_pretrain.model.llama import Llama
from tests.unit.data_samples import TOKENIZERS

VOCABULARY = 97
TEXT = ExportedText(max_positions=64)


def random_model(**changes):
    values = {"dim": 48, "num_layers": 2, "num_heads": 6, "num_kv_heads": 6, "ffn_dim": 80}
    values["vocab_size"] = VOCABULARY
    model = Llama(LlamaConfig(name="test", **(values | changes)))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():  # larger than at the start, so that mistakes show
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def tokens():
    return torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(2))


def logits(model):
    with torch.no_grad():
        return model(tokens())


def words(ids):
    return Tokenizer(models.WordLevel({f"word{i}": i for i in ids}, "word0"))


@pytest.fixture
def exported(tmp_path):
    export_hf_folder(random_model(), tmp_path / "out", TEXT)
    return tmp_path / "out"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_transformers_computes_our_logits_from_an_exported_folder(
    tmp_path, tied, scaled, num_kv_heads
):
    from transformers import LlamaForCausalLM

    model = random_model(
        tie_embeddings=tied,
        num_kv_heads=num_kv_heads,
        # 32 tokens, so that 64 positions reach all three of its bands.
        rope_scaling=RopeScaling(enabled=scaled, original_sequence_length=32),
    )
    export_hf_folder(model, tmp_path / "out", TEXT)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        their_logits = theirs(tokens()).logits
    torch.testing.assert_close(their_logits, logits(model), rtol=0.0, atol=1e-5)
    assert their_logits.std() > 1.0  # so that 1e-5 says something


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_comes_back_bit_for_bit(tmp_path, tied):
    model = random_model(
        tie_embeddings=tied,
        num_kv_heads=3,
        rope_scaling=RopeScaling(enabled=True, factor=32.0),
    )
    export_hf_folder(model, tmp_path / "test", TEXT)
    back = load_hf_folder(tmp_path / "test")
    assert back.config == model.config
    assert torch.equal(logits(back), logits(model))


def test_a_model_that_transformers_saved_in_several_files_is_read(exported, tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(exported)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_hf_folder(tmp_path / "sharded")), logits(random_model()))


def test_a_config_in_the_older_form_is_read(exported):
    values = json.loads((exported / "config.json").read_text())
    del values["rope_parameters"]
    values["rope_theta"] = 10_000.0
    values["rope_scaling"] = {
        "type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    }
    (exported / "config.json").write_text(json.dumps(values))
    config = load_hf_folder(exported).config
    assert config.rope_theta == 10_000.0
    assert config.rope_scaling == RopeScaling(True, 32.0, 1.0, 4.0, 4096)


def test_bfloat16_weights_are_read_as_float32(exported, tmp_path):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(exported, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half"
    )
    weight = load_hf_folder(tmp_path / "half").embedding.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, random_model().embedding.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mistral"),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("head_dim", 16),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("intermediate_size", 81),
        ("rope_parameters", {"rope_type": "yarn"}),
    ],
)
def test_another_architecture_is_refused(exported, key, value):
    values = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(InputError, match=str(exported)):
        load_hf_folder(exported)


ANY = [None, True, -1, 0, 1.5, 1e308, math.nan, 10**30, "", "8", [], [1], {}, {"a": 1}]


def assert_read_or_one_line(folder, tried):
    line = "read"
    try:
        load_hf_folder(folder)
    except InputError as error:
        line = str(error)
    assert len(line.splitlines()) == 1, tried


def test_whatever_its_json_holds_a_folder_is_read_or_refused_in_one_line(exported):
    path, index = exported / "config.json", exported / "model.safetensors.index.json"
    config = json.loads(path.read_text())
    shapes = [config | {key: value} for key in config for value in ANY]
    for key in config["rope_parameters"] | {"factor": 8.0, "type": "llama3"}:
        shapes += [config | {"rope_parameters": {key: value}} for value in ANY]
    for content in [*shapes, *ANY]:
        path.write_text(json.dumps(content))
        assert_read_or_one_line(exported, content)
    path.write_text(json.dumps(config))
    maps = [{"a": name} for name in [*ANY, "../a.safetensors", f"{'a' * 300}.safetensors"]]
    for content in [*ANY, *({"weight_map": value} for value in [*ANY, *maps])]:
        index.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"index\.json"):
            load_hf_folder(exported)


def test_a_cut_off_file_is_named(exported):
    weights = exported / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_hf_folder(exported)


def test_a_missing_file_is_named(exported):
    (exported / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        load_hf_folder(exported)


def test_an_existing_folder_is_not_written_into(exported):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    with pytest.raises(InputError, match="exists"):
        export_hf_folder(random_model(num_layers=1), exported, TEXT)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_exported_tokenizer_begins_a_prompt_as_training_began_a_document(tmp_path, kind, has_bos):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = TOKENIZERS[kind]()
    bos_id = special_token_id(tokenizer, "bos", None) if has_bos else None
    eos_id = special_token_id(tokenizer, "eos", None)
    encoder = DocumentEncoder(tokenizer, dtype=np.dtype("uint16"), bos_id=bos_id, eos_id=eos_id)
    text = ExportedText(64, as_in_training(tokenizer, bos_id), bos_id, eos_id)
    model = random_model(vocab_size=vocabulary_size(tokenizer))
    export_hf_folder(model, tmp_path / "out", text)
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    for document in ("a b", "ab ba  a", " a 数 b", ""):
        ids = encoder.encode([document])[0].tolist()
        assert ids[-1] == eos_id
        assert exported(document)["input_ids"] == ids[:-1]
    assert (exported.bos_token_id, exported.eos_token_id) == (bos_id, eos_id)
    assert exported.model_max_length == 64
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (generation.bos_token_id, generation.eos_token_id) == (bos_id, eos_id)
    assert (values["bos_token_id"], values["eos_token_id"]) == (bos_id, eos_id)


@pytest.mark.parametrize(
    ("ids", "eos_id", "message"),
    [
        (range(VOCABULARY + 1), 0, r"has the id 97, which the model's model\.vocab_size=97"),
        ([*range(5), 900], 0, "has the id 900, which"),
        (range(5), 7, "has no token of eos_id=7"),
    ],
)
def test_a_tokenizer_that_does_not_fit_leaves_nothing_behind(tmp_path, ids, eos_id, message):
    text = ExportedText(64, words(ids), eos_id=eos_id)
    with pytest.raises(InputError, match=message):
        export_hf_folder(random_model(), tmp_path / "out", text)
    assert list(tmp_path.iterdir()) == []


def dies_at(number, call, calls):
    def dying(*arguments, **options):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    return dying


def end_of_export(model, out, text, *, killed_at):
    """How a process ends that dies in its n-th call that puts something on disk."""
    child = os.fork()
    if child == 0:
        try:
            calls = count(1)
            for name in ("mkdir", "fsync", "replace", "rename"):
                setattr(os, name, dies_at(killed_at, getattr(os, name), calls))
            export_hf_folder(model, out, text)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_what_a_killed_export_leaves_goes_with_the_next(tmp_path):
    model, text = random_model(), ExportedText(64, words(range(5)), eos_id=1)
    for killed_at in range(1, 50):
        code = end_of_export(model, tmp_path / "out", text, killed_at=killed_at)
        left = [path.name for path in tmp_path.iterdir()]
        if code == 0:
            break
        assert code == signal.SIGKILL
        assert "out" not in left
        assert len(left) <= 1, "of this one alone"
    assert killed_at > 10
    assert left == ["out"]
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    export_hf_folder(random_model(), tmp_path / "there", TEXT)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for refused in (
        lambda: export_hf_folder(random_model(), tmp_path / "new", TEXT),
        lambda: load_hf_folder(tmp_path / "there"),
    ):
        with pytest.raises(InputError, match=r"pip install 'gns-pretrain\[huggingface\]'"):
            refused()
    assert not (tmp_path / "new").exists()


def test_two_descriptions_of_the_rotation_must_agree(tmp_path):
    export_hf_folder(random_model(), tmp_path / "out", TEXT)
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    values["rope_scaling"] = {"type": "default"}
    path.write_text(json.dumps(values))
    load_hf_folder(path.parent)
    values["rope_scaling"] = {"rope_type": "default", "factor": 8.0}
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"rope_parameters and rope_scaling differ"):
        load_hf_folder(path.parent)

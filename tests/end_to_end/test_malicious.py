"""A stranger's files: nothing in them is executed, no name in them leads out of its folder."""

import io
import json
import os
import pickle
import shutil
from contextlib import nullcontext
from enum import Enum
from hashlib import sha256
from pathlib import Path, PosixPath

import numpy as np
import pytest
import torch
from rich.console import Console as RichConsole
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    MetadataIndex,
)

from gns_pretrain.commands import run_command
from gns_pretrain.data.prepare.prepare import prepare
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.data.settings import DataSettings
from gns_pretrain.data.shards import TokenShards, checked_tokenizer, read_meta
from gns_pretrain.data.staging import compile_cache, staged
from gns_pretrain.errors import InputError, TrainingError, print_error
from gns_pretrain.launch.measure_noise import MeasurementRequest, measure
from gns_pretrain.model.huggingface import ExportedText, export_hf_folder, load_hf_folder
from gns_pretrain.model.llama import Llama
from gns_pretrain.optim.adamw import AdamWSettings
from gns_pretrain.parallel.mesh import World
from gns_pretrain.runs.directory import read_settings, run_directories
from gns_pretrain.runs.history import append_event
from gns_pretrain.runs.lock import locked
from gns_pretrain.tracking.console import ConsoleView
from gns_pretrain.tracking.settings import MetricsSettings
from gns_pretrain.training.checkpoint import Checkpoints
from gns_pretrain.training.checkpoint_reader import damage, load_model, tensors_of
from tests.settings import SEQUENCE_LENGTH, odd_model
from tests.unit.data_samples import make_texts, write_gzip, write_tokenizer
from tests.unit.run_records import write_run

ALONE = World(rank=0, num_ranks=1, device=torch.device("cpu"), kind="single")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Global:
    """Calls whatever a pickle can name, dotted names as well, with one argument."""

    def __init__(self, module: str, name: str, argument: str) -> None:
        self.texts = (module, name, argument)

    def pickled(self) -> bytes:
        module, name, argument = (pickle.dumps(text, protocol=4)[:-1] for text in self.texts)
        without_protocol = [part[2:] for part in (module, name, argument)]
        called = b"".join([*without_protocol[:2], b"\x93", without_protocol[2], b"\x85R."])
        return b"\x80\x04" + called


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    model = Llama(odd_model())
    model.init_weights(seed=0)
    optimizer = AdamWSettings().build(model)
    return save(tmp_path / "run" / "checkpoints", model, optimizer)


def save(folder: Path, model: Llama, optimizer: torch.optim.Optimizer) -> Path:
    state = {"step": 1}
    folder.mkdir(parents=True)
    return Checkpoints(folder, keep=1, world=ALONE).save(model, optimizer, state)


def seal(checkpoint: Path) -> None:
    """Write the manifest that a stranger would write."""
    entries = {
        path.name: (path.stat().st_size, sha256(path.read_bytes()).hexdigest())
        for path in checkpoint.iterdir()
        if path.name != "manifest.json"
    }
    (checkpoint / "manifest.json").write_text(json.dumps(entries))


def resume(checkpoint: Path, **changes) -> None:
    model = Llama(odd_model(**changes))
    model.init_weights(seed=1)
    checkpoints = Checkpoints(checkpoint.parent, keep=1, world=ALONE)
    checkpoints.load_latest(model, AdamWSettings().build(model))


def measured(checkpoint: Path, shards: Path) -> None:
    measure(MeasurementRequest(checkpoint, shards, 4, 2, sequence_length=SEQUENCE_LENGTH))


@pytest.mark.parametrize(
    "name",
    [
        ("posix", "mkdir"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.metadata", "os.mkdir"),
        ("pathlib", "PosixPath.mkdir"),
    ],
    ids=".".join,
)
def test_metadata_that_calls_anything_else_is_refused_by_name(checkpoint, marker, shards, name):
    (checkpoint / ".metadata").write_bytes(Global(*name, str(marker)).pickled())
    seal(checkpoint)
    for load in (load_model, lambda folder: measured(folder, shards)):
        with pytest.raises(InputError, match=f"{'.'.join(name)}, as no checkpoint of torch does"):
            load(checkpoint)
    with pytest.raises(TrainingError, match=".".join(name)):
        resume(checkpoint)
    assert not marker.exists()


class EarlyPickler(pickle.Pickler):
    """Pickles members of enums as Python 3.11.0 to 3.11.3 does."""

    def reducer_override(self, obj):
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def test_metadata_of_an_early_python_is_read(checkpoint):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    with (checkpoint / ".metadata").open("wb") as file:
        EarlyPickler(file).dump(metadata)
    seal(checkpoint)
    assert b"getattr" in (checkpoint / ".metadata").read_bytes()
    resume(checkpoint)
    assert load_model(checkpoint).state_dict()


@pytest.mark.parametrize(
    ("owner", "name"), [(PosixPath, "mkdir"), (_MEM_FORMAT_ENCODING, "__class__")]
)
def test_metadata_that_reads_another_attribute_is_refused(checkpoint, owner, name):
    class Reads:
        def __reduce__(self):
            return getattr, (owner, name)

    (checkpoint / ".metadata").write_bytes(pickle.dumps(Reads()))
    seal(checkpoint)
    with pytest.raises(InputError, match=r"builtins\.getattr, as no checkpoint of torch does"):
        load_model(checkpoint)


def test_payload_works_where_it_is_not_refused(marker):
    pickle.loads(Global("posix", "mkdir", str(marker)).pickled())
    assert marker.exists()


def test_value_of_an_optimizer_that_calls_something_is_refused(tmp_path, marker, monkeypatch):
    model = Llama(odd_model())
    model.init_weights(seed=0)
    optimizer = AdamWSettings().build(model)
    with tensors_of(model, optimizer) as tensors, monkeypatch.context() as patch:
        tensors["optimizer"]["param_groups"][0]["weight_decay"] = Payload(marker)
        held = nullcontext(tensors)
        patch.setattr("gns_pretrain.training.checkpoint.tensors_of", lambda *_: held)
        checkpoint = save(tmp_path / "checkpoints", model, optimizer)
    assert damage(checkpoint) is None
    with pytest.raises(InputError, match=r"cannot be loaded .*mkdir"):
        resume(checkpoint)
    assert not marker.exists()


def test_generators_that_call_something_are_refused(checkpoint, marker):
    torch.save({"cpu": Payload(marker)}, checkpoint / "generators.pt")
    seal(checkpoint)
    with pytest.raises(InputError, match=r"generators.pt is refused"):
        resume(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\x80\x04N.", b"nonsense", b"\x80\x04}."])
def test_metadata_that_is_none_is_refused(checkpoint, content):
    (checkpoint / ".metadata").write_bytes(content)
    seal(checkpoint)
    with pytest.raises(InputError, match=r"\.metadata is refused"):
        load_model(checkpoint)


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", ".metadata"])
def test_tensors_are_read_from_the_files_of_the_checkpoint_alone(checkpoint, name):
    metadata: Metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index = MetadataIndex("model.norm.weight", torch.Size([0]))
    metadata.storage_data[index].relative_path = name
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    shutil.copy(checkpoint / "__0_0.distcp", checkpoint.parent / "other.distcp")
    seal(checkpoint)
    with pytest.raises(InputError, match=r"which is not beside"):
        load_model(checkpoint)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/x", "", "..", "a\0b"])
def test_manifest_that_names_another_folder_is_refused(checkpoint, name):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, name: [1, "0"]}))
    assert "not a name inside its folder" in str(damage(checkpoint))


@pytest.mark.parametrize("manifest", ["{}", "[]", "null", '{"model.json": 1}', "[" * 100_000])
def test_manifest_of_another_shape_is_refused(checkpoint, manifest):
    (checkpoint / "manifest.json").write_text(manifest)
    assert "manifest.json" in str(damage(checkpoint))


def test_checkpoint_with_a_link_out_of_it_is_refused(checkpoint):
    model = checkpoint / "model.json"
    model.rename(checkpoint.parent / "model.json")
    model.symlink_to("../model.json")
    assert "is a link to a file outside of its folder" in str(damage(checkpoint))


@pytest.mark.parametrize(
    "change", [{"num_layers": 10**9}, {"dim": "18"}, {"dim": None}, {"rope_scaling": 3}]
)
def test_model_of_a_checkpoint_is_believed_no_further_than_its_weights(checkpoint, change):
    values = json.loads((checkpoint / "model.json").read_text())
    (checkpoint / "model.json").write_text(json.dumps(values | change))
    seal(checkpoint)
    with pytest.raises(InputError, match=r"model\.json"):
        load_model(checkpoint)


@pytest.fixture
def data(tmp_path, shards) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "data"))


def set_first_shard(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    meta["shards"][0] |= changes
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", "sub/victim", "", ".", "a\0b"])
def test_shard_of_another_folder_is_neither_read_nor_copied(data, tmp_path, name):
    set_first_shard(data, file=name)
    with pytest.raises(InputError, match="not a name inside its folder"):
        TokenShards.open(data, "train")
    with pytest.raises(InputError, match="not a name inside its folder"):
        staged(DataSettings(path=str(data), stage_to=str(tmp_path / "node" / "disk")))
    assert not (tmp_path / "node").exists()


def test_shard_that_is_a_link_out_of_the_folder_is_refused(data, tmp_path):
    (shard,) = data.glob("train-00000.npy")
    shard.rename(tmp_path / "elsewhere.npy")
    shard.symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(InputError, match="is a link to a file outside of its folder"):
        TokenShards.open(data, "train")
    with pytest.raises(InputError, match="is a link to a file outside of its folder"):
        staged(DataSettings(path=str(data), stage_to=str(tmp_path / "disk")))


def test_folder_of_shards_may_be_a_link_itself(data, tmp_path):
    (tmp_path / "link").symlink_to(data)
    assert TokenShards.open(tmp_path / "link", "train").num_tokens > 0


def test_tokenizer_of_another_folder_does_not_come_along(data, tmp_path):
    (tmp_path / "private.json").write_text("{}")
    meta = json.loads((data / "meta.json").read_text())
    named = {"tokenizer": "../private.json"}
    (data / "meta.json").write_text(json.dumps(meta | named))
    assert checked_tokenizer(data, read_meta(data)) is None  # a name, as meta-llama/Llama-3.2-1B
    (data / "meta.json").write_text(json.dumps(meta | named | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(InputError, match="not a name inside its folder"):
        TokenShards.open(data, "train")


def write_header(path: Path, descr: object, shape: object) -> None:
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64))


@pytest.mark.parametrize(
    ("descr", "shape"),
    [
        ("<u2", (2**62,)),
        ("<u2", (-1,)),
        ("<u2", ()),
        ("<u2", "many"),
        ("<u2", (1.5,)),
        (">u2", (1500,)),
        ("<f8", (8,)),
        ("|O", (8,)),
        ([("a", "|O")], (8,)),
        ("__import__('os').system('true')", (8,)),
    ],
)
def test_header_of_a_shard_is_checked_before_it_is_believed(data, descr, shape):
    write_header(data / "train-00000.npy", descr, shape)
    with pytest.raises(InputError, match=r"train-00000\.npy"):
        TokenShards.open(data, "train")


def test_shard_that_is_a_pickle_or_an_archive_is_not_opened(data, marker):
    path = data / "train-00000.npy"
    np.save(path, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    for content in (path.read_bytes(), pickle.dumps(Payload(marker)), b"PK\x03\x04" + bytes(64)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"train-00000\.npy"):
            TokenShards.open(data, "train")
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 10**12},
        {"vocab_size": 0},
        {"vocab_size": True},
        {"dtype": "object"},
        {"bos_id": "x"},
        {"eos_id": 10**6},
        {"tokenizer": ["a"]},
        {"shards": [{"file": 3, "split": "train", "tokens": 1, "sha256": ""}]},
        {"shards": {}},
    ],
)
def test_numbers_of_meta_json_are_checked_before_they_are_believed(data, change):
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(InputError, match=r"meta\.json"):
        TokenShards.open(data, "train")


def test_half_prepared_folder_deletes_nothing_outside_of_it(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    corpus = write_gzip(tmp_path / "train.json.gz", make_texts(30))
    settings = PrepareSettings(
        out=str(tmp_path / "out"),
        train=[str(corpus)],
        validation_fraction=0.2,
        tokenizer=str(write_tokenizer(tmp_path / "tokenizer.json")),
    )
    (tmp_path / "out").mkdir()
    shard = {"file": "../victim", "split": "validation", "tokens": 8, "sha256": "0"}
    progress = {
        "settings": settings.identity(settings.find_files()),
        "splits": {"validation": {"shards": [shard]}, "train": {}},
        "tokenizer_sha256": "0",
    }
    (tmp_path / "out" / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(InputError, match="not a name inside its folder"):
        prepare(settings, show_progress=False)
    assert victim.read_text() == "precious"


@pytest.fixture
def exported(tmp_path) -> Path:
    model = Llama(odd_model())
    model.init_weights(seed=0)
    export_hf_folder(model, tmp_path / "model", ExportedText(max_positions=64))
    return tmp_path / "model"


def change_config(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def test_code_beside_a_model_is_not_executed(exported, marker):
    (exported / "modeling_llama.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    change_config(exported, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    load_hf_folder(exported)
    assert not marker.exists()


def test_weights_that_are_a_pickle_are_not_read(exported, marker):
    torch.save({"model.norm.weight": Payload(marker)}, exported / "pytorch_model.bin")
    (exported / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights are read from \.safetensors alone"):
        load_hf_folder(exported)
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"must name \.safetensors files"):
        load_hf_folder(exported)
    (exported / "pytorch_model.bin").rename(exported / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    change_config(exported, num_hidden_layers=1, hidden_size=2, intermediate_size=1, vocab_size=2)
    change_config(exported, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_hf_folder(exported)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", 3, None])
def test_index_that_names_another_folder_is_refused(exported, name):
    shutil.copy(exported / "model.safetensors", exported.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json"):
        load_hf_folder(exported)


def test_weights_that_are_a_link_are_read_from_the_hubs_cache_alone(exported, tmp_path):
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    (exported / "model.safetensors").rename(blob)
    (exported / "model.safetensors").symlink_to(blob)
    with pytest.raises(InputError, match="is a link to a file outside of its folder"):
        load_hf_folder(exported)
    snapshot = blob.parents[1] / "snapshots" / "4567"
    snapshot.mkdir(parents=True)
    shutil.copy(exported / "config.json", snapshot)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert load_hf_folder(snapshot).config.name == "4567"


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**15},
        {"hidden_size": "18"},
        {"hidden_size": True},
        {"num_attention_heads": 0},
        {"intermediate_size": -1},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "llama3"}},
        {"rms_norm_eps": {}},
        {"tie_word_embeddings": "no"},
    ],
)
def test_numbers_of_a_config_are_checked_before_they_are_believed(exported, change):
    change_config(exported, **change)
    with pytest.raises(InputError, match=r"config\.json"):
        load_hf_folder(exported)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "starts.jsonl"])
def test_run_does_not_write_where_a_link_in_its_directory_leads(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(victim)
    with pytest.raises(InputError, match=f"{name} is a link"), locked(run):
        pass
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("!!python/object/apply:os.mkdir [executed]", "could not determine a constructor"),
        ("a: &a [1]\n" + "".join(f"{k}: [*a, *a]\n" for k in "bc"), "alias"),
        ("[" * 10_000, "recursion"),
    ],
    ids=["python", "aliases", "nesting"],
)
def test_settings_of_a_run_are_plain_values(tmp_path, monkeypatch, config, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(InputError, match=f"config.yaml is damaged .*{why}"):
        read_settings(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_links_that_lead_back_are_followed_once(outputs):
    for name in ("a", "b", "c"):
        (outputs / name).symlink_to("..")
        (outputs / "f" / name).symlink_to("..")
    assert sorted(path.name for path in run_directories(outputs)) == [
        HOSTILE,
        f"{HOSTILE}-later",
        "f",
    ]


def test_kernels_in_another_users_folder_are_not_used(tmp_path, monkeypatch):
    cache, owner = tmp_path / "disk" / "compile-cache", os.getuid()
    cache.mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    kernels = compile_cache(str(tmp_path / "shared"), str(tmp_path / "disk"), keep=False)
    with pytest.raises(InputError, match="compile-cache belongs to another user"), kernels:
        pass


# Title, cleared screen, markup, right-to-left order, and a sequence that begins with one character.
HOSTILE = "\x1b]0;title\x07\x1b[2J[red]x[bold]\u202e\x9b31m"
SHOWN = r"\x1b]0;title\x07\x1b[2J[red]x[bold]\u202e\x9b31m"


def controls_in(text: str) -> list[str]:
    return [character for character in text if not character.isprintable() and character != "\n"]


def run_in_process(monkeypatch, *words: object) -> object:
    """Run a command as `gns-pretrain` does; return its exit code."""
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as ended:
        run_command(str(words[0]))
    return ended.value.code


def test_error_is_one_line_whatever_it_quotes(capsys):
    print_error(InputError(f"{HOSTILE}\nerror: forged"))
    assert capsys.readouterr().err == f"error: {SHOWN}\\nerror: forged\n"


def test_name_that_is_not_utf8_is_shown(capsys):
    print_error(InputError(os.fsdecode(b"run-\xff")))
    assert capsys.readouterr().err == "error: run-\\udcff\n"


def test_message_of_the_log_is_shown_as_it_is(tmp_path):
    text = io.StringIO()
    console = RichConsole(file=text, force_terminal=True, color_system=None)
    settings = MetricsSettings(progress="never")
    view = ConsoleView(settings, budget=1, run_directory=tmp_path, console=console)
    view.message(HOSTILE)
    assert text.getvalue() == f"{SHOWN}\n"


@pytest.fixture
def outputs(tmp_path) -> Path:
    """Two finished runs of a table, of which one hides the other, and a failed one."""
    folder = tmp_path / "outputs"
    for name in (HOSTILE, f"{HOSTILE}-later"):
        write_run(folder, "table2", "signum_small", [(1, 5.0), (2, 4.0)], name=name)
    failed = write_run(folder, "table2", "signum_large", [(1, 5.0)], name="f", finished=False)
    append_event(failed, "start")
    append_event(failed, "end", outcome="failed", error=HOSTILE)
    return folder


def test_status_shows_names_and_errors_as_they_are(outputs, monkeypatch, capsys):
    assert run_in_process(monkeypatch, "status", outputs) == 0
    shown = capsys.readouterr().out
    assert controls_in(shown) == []
    table, error, _ = shown.partition(f"f: {SHOWN}")
    assert error
    _, headers, *lines = table.splitlines()
    names = "".join(line[: headers.index("state")].strip() for line in lines)
    assert names.count(SHOWN) == 2  # folded


@pytest.mark.parametrize("form", ["text", "markdown", "latex", "csv", "json"])
def test_table_shows_names_as_they_are(outputs, monkeypatch, capsys, form):
    pytest.importorskip("pandas")
    assert run_in_process(monkeypatch, "make-table", "table2", outputs, "--format", form) == 0
    printed = capsys.readouterr()
    assert controls_in(printed.out + printed.err) == []
    assert "x1b" in printed.out + printed.err or "u001b" in printed.out


def test_folder_whose_name_is_a_formula_is_drawn_as_a_name(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path, "table2", "signum_small", [(1, 5.0), (2, 4.0)], name=r"a$\frac{$b")
    out = tmp_path / "plot.png"
    assert run_in_process(monkeypatch, "plot-runs", run, "--out", out, "--panels", "losses") == 0
    assert out.stat().st_size > 0
    assert controls_in(capsys.readouterr().out) == []

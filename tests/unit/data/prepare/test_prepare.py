import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from tokenizers import models

from gns_pretrain.commands import run_command
from gns_pretrain.data.prepare import corpus as corpus_module
from gns_pretrain.data.prepare import prepare as prepare_module
from gns_pretrain.data.prepare.corpus import is_held_out
from gns_pretrain.data.prepare.prepare import prepare
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.data.shards import TokenShards
from gns_pretrain.data.tokenization import train_bpe
from gns_pretrain.errors import InputError
from gns_pretrain.system.files import folder_lock
from tests.unit.data_samples import (
    as_line,
    by_words,
    edited,
    ids_of,
    make_texts,
    unigram,
    write_gzip,
    write_tokenizer,
)

ROOT = Path(__file__).parents[4]
TRAIN, VALIDATION = make_texts(400, seed=1), make_texts(30, seed=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_gzip(folder / "train.0.json.gz", TRAIN[:150])
    write_gzip(folder / "train.1.json.gz", TRAIN[150:])
    write_gzip(folder / "validation.json.gz", VALIDATION)
    write_tokenizer(folder / "tokenizer.json")
    return folder


def settings_for(inputs: Path, out: Path, **changes) -> PrepareSettings:
    """Settings for the two training files and the validation file, in one process."""
    settings = {
        "out": str(out),
        "train": [f"{inputs}/train.*.json.gz"],
        "validation": [f"{inputs}/validation.json.gz"],
        "tokenizer": f"{inputs}/tokenizer.json",
        "shard_tokens": 5000,
        "workers": 1,
    }
    return PrepareSettings(**{**settings, **changes})


def run(settings: PrepareSettings) -> dict:
    return prepare(settings, show_progress=False)


def tokens_of(folder: Path, split: str) -> list[int]:
    opened = TokenShards.open(folder, split, verify=True)
    return opened.read(0, opened.num_tokens).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory) -> Path:
    """The folder that an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    run(settings_for(inputs, folder))
    return folder


def test_shards_hold_every_document_between_its_two_tokens(inputs, reference):
    tokenizer_file = inputs / "tokenizer.json"
    assert tokens_of(reference, "train") == ids_of(tokenizer_file, TRAIN)
    assert tokens_of(reference, "validation") == ids_of(tokenizer_file, VALIDATION)


def test_folder_is_readable_with_json_and_numpy_alone(inputs, reference):
    meta = json.loads((reference / "meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"], meta["bos_id"], meta["eos_id"]) == (
        "uint16",
        300,
        0,
        1,
    )
    shards = [shard for shard in meta["shards"] if shard["split"] == "train"]
    assert [shard["tokens"] for shard in shards[:-1]] == [5000] * (len(shards) - 1)
    assert len(shards) > 3
    tokens = np.concatenate([np.load(reference / shard["file"]) for shard in shards])
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == ids_of(inputs / "tokenizer.json", TRAIN)
    assert (reference / meta["tokenizer"]).read_bytes() == (inputs / "tokenizer.json").read_bytes()


def test_row_counts_tokens_and_documents(inputs, tmp_path):
    row = run(settings_for(inputs, tmp_path / "out"))
    assert row["splits"]["train"]["documents"] == 400
    assert row["splits"]["validation"]["tokens"] == len(
        ids_of(inputs / "tokenizer.json", VALIDATION)
    )
    assert row["tokens_written"] == sum(split["tokens"] for split in row["splits"].values())
    assert row["tokens_per_second"] == pytest.approx(
        row["tokens_written"] / row["seconds"], rel=0.1
    )


def test_stream_through_datasets_gives_the_same_shards(inputs, reference, tmp_path):
    pytest.importorskip("datasets")
    run(settings_for(inputs, tmp_path / "out", source="hub", dataset="json"))
    for split in ("train", "validation"):
        assert tokens_of(tmp_path / "out", split) == tokens_of(reference, split)


def test_finished_folder_is_reported_and_left_alone(inputs, reference):
    before = contents(reference)
    row = run(settings_for(inputs, reference))
    assert row["status"] == "already prepared"
    assert row["splits"]["train"]["documents"] == 400
    assert contents(reference) == before


# A process that dies in its n-th fsync: of a temporary file, or of the folder after the rename.
KILLER = """
import os, signal, sys
from gns_pretrain.data.prepare.settings import PrepareSettings
from gns_pretrain.data.prepare.prepare import prepare

calls, fsync = 0, os.fsync

def fsync_or_die(descriptor):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

if __name__ == "__main__":
    os.fsync = fsync_or_die
    prepare(PrepareSettings(**eval(sys.argv[2])), show_progress=False)
"""


def run_and_kill(settings: PrepareSettings, at_fsync: int, script: Path) -> None:
    """Run in a process of its own and wait until it is killed, and its workers are gone too."""
    script.write_text(KILLER)
    # The workers inherit standard output: it ends only when the last of them has.
    killed = subprocess.run(
        [sys.executable, str(script), str(at_fsync), repr(vars(settings))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("workers", "deaths"),
    [
        # Fresh: 1 and 2 write progress.json, 3 and 4 the tokenizer, 5 and 6 progress.json, 7 and
        # 8 a shard. Resumed: 1 and 2 write a shard, 3 and 4 progress.json, and so forth.
        (1, [1, 2, 3, 4, 5, 2, 1, 2, 3, 4, 6]),
        (2, [12]),
    ],
)
def test_killed_run_resumes_byte_identical(inputs, reference, tmp_path, workers, deaths):
    settings = settings_for(inputs, tmp_path / "out", workers=workers)
    for at_fsync in deaths:
        run_and_kill(settings, at_fsync, tmp_path / "killer.py")
        assert not (tmp_path / "out" / "meta.json").exists()
    row = run(settings)
    # Not begun anew: some shards were there already.
    assert 0 < row["tokens_written"] < sum(split["tokens"] for split in row["splits"].values())
    assert contents(tmp_path / "out") == contents(reference)


def stop_after(monkeypatch, shards: int) -> None:
    """Make `prepare` break off after so many whole shards, as an interrupt would."""
    save = prepare_module.PreparationProgress.save

    def save_or_stop(self, folder):
        save(self, folder)
        if len(self.shards) >= shards:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module.PreparationProgress, "save", save_or_stop)


def test_interrupted_stream_resumes_byte_identical(inputs, reference, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", 3000)
    settings = settings_for(inputs, tmp_path / "out", source="hub", dataset="json")
    with pytest.MonkeyPatch.context() as stopping:
        stop_after(stopping, shards=4)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    run(settings)
    written, expected = contents(tmp_path / "out"), contents(reference)
    del written["meta.json"], expected["meta.json"]  # they name the source
    assert written == expected


@pytest.fixture
def half_done(inputs, tmp_path) -> Path:
    """A folder with three whole shards and more to come."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, shards=3)
        with pytest.raises(KeyboardInterrupt):
            run(settings_for(inputs, tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.npy"))) == 3
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_tokens": 4000}, "--shard-tokens=4000, but .* was begun with 5000"),
        ({"max_tokens": 9000}, "--max-tokens=9000, but .* was begun with None"),
        ({"bos": False}, "--bos=False"),
        ({"text_key": "content"}, "--text-key=content, but .* was begun with text"),
        ({"skip_bad_records": True}, "--skip-bad-records=True, but .* was begun with False"),
        ({"validation": [], "validation_fraction": 0.5}, "--validation names 0 files"),
        ({"tokenizer": None, "train_bpe": 300}, "--tokenizer=None, but .* with sha256:"),
        ({"source": "hub", "dataset": "json"}, "--source=hub, but .* with local"),
    ],
)
@pytest.mark.parametrize("state", ["half_done", "reference"])
def test_other_settings_are_refused_by_name(inputs, request, state, changes, message):
    folder = request.getfixturevalue(state)
    before = contents(folder)
    with pytest.raises(InputError, match=message):
        run(settings_for(inputs, folder, **changes))
    assert contents(folder) == before


def test_input_that_changed_since_it_was_read_is_refused(inputs, half_done, tmp_path):
    for path in inputs.glob("*"):
        shutil.copy(path, tmp_path / path.name)
    write_gzip(tmp_path / "train.0.json.gz", TRAIN[:149])
    progress = json.loads((half_done / "progress.json").read_text())
    assert progress["splits"]["train"]["cursor"]["file"] == 1
    with pytest.raises(InputError, match=r"already in the shards .* has another size"):
        run(settings_for(tmp_path, half_done))


def test_file_that_was_cut_short_can_be_fetched_again(inputs, reference, tmp_path):
    for path in inputs.glob("*"):
        shutil.copy(path, tmp_path / path.name)
    second = tmp_path / "train.1.json.gz"
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"train\.1\.json\.gz is truncated"):
        run(settings_for(tmp_path, tmp_path / "out"))
    assert not list((tmp_path / "out").glob(".*"))
    second.write_bytes(whole)
    run(settings_for(tmp_path, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_whole_shard_that_was_damaged_meanwhile_is_named(inputs, half_done, damage):
    path = half_done / "train_00001.npy"
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"train_00001\.npy is (missing|truncated)"):
        run(settings_for(inputs, half_done))


def test_tokenizer_that_was_exchanged_meanwhile_is_refused(inputs, half_done):
    (half_done / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not the tokenizer"):
        run(settings_for(inputs, half_done))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_bad_document_leaves_nothing_behind(inputs, tmp_path, split, workers):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(as_line("good") + b'{"text": "bad \xff"}\n')
    settings = settings_for(inputs, tmp_path / "out", workers=workers, **{split: [str(bad)]})
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2: not UTF-8"):
        run(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("held_out", [False, True])
def test_bad_records_that_are_left_out_are_counted_however_often_it_stops(
    inputs, tmp_path, monkeypatch, held_out
):
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", 3000)
    lines = [as_line(text) for text in TRAIN]
    for number in range(0, 400, 40):
        lines.insert(number, b'{"text": "bad \xff"}\n')
    (tmp_path / "train.jsonl").write_bytes(b"".join(lines))
    changes = {"train": [str(tmp_path / "train.jsonl")], "skip_bad_records": True}
    if held_out:
        changes |= {"validation": [], "validation_fraction": 0.1}
    row = run(settings_for(inputs, tmp_path / "whole", **changes))
    counted = [row["splits"][split]["skipped_records"] for split in ("train", "validation")]
    assert counted == [10, 0]
    for shards in range(2, 5):
        with pytest.MonkeyPatch.context() as stopping:
            stop_after(stopping, shards=shards)
            with pytest.raises(KeyboardInterrupt):
                run(settings_for(inputs, tmp_path / "out", **changes))
    run(settings_for(inputs, tmp_path / "out", **changes))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    if not held_out:
        assert tokens_of(tmp_path / "out", "train") == ids_of(inputs / "tokenizer.json", TRAIN)


def test_documents_of_a_last_shard_are_counted_after_a_stop(inputs, tmp_path):
    settings = {"shard_tokens": 2500, "max_tokens": 5000, "max_validation_tokens": 1000}
    run(settings_for(inputs, tmp_path / "whole", **settings))
    with pytest.MonkeyPatch.context() as stopping:
        stop_after(stopping, shards=3)  # all tokens are written, and the last batch not counted
        with pytest.raises(KeyboardInterrupt):
            run(settings_for(inputs, tmp_path / "out", **settings))
    run(settings_for(inputs, tmp_path / "out", **settings))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_folder_of_before_these_settings_resumes(inputs, reference, half_done):
    path = half_done / "progress.json"
    progress = json.loads(path.read_text())
    for name in ("text_key", "txt_documents", "skip_bad_records"):
        del progress["settings"][name]
    path.write_text(json.dumps(progress))
    run(settings_for(inputs, half_done))
    for split in ("train", "validation"):
        assert tokens_of(half_done, split) == tokens_of(reference, split)


@pytest.mark.parametrize("workers", [1, 2])
def test_no_document_ends_itself_in_any_worker(inputs, tmp_path, workers):
    unigram().save(str(tmp_path / "unigram.json"))
    (tmp_path / "a.jsonl").write_bytes(as_line("a </s> b <s> <pad>") * 30)
    changes = {"train": [str(tmp_path / "a.jsonl")], "tokenizer": str(tmp_path / "unigram.json")}
    run(settings_for(inputs, tmp_path / "out", workers=workers, **changes))
    tokens = tokens_of(tmp_path / "out", "train")
    assert [tokens.count(token_id) for token_id in (1, 2, 3)] == [30, 30, 0]


@pytest.mark.parametrize(
    ("tokenizer", "line"),
    [
        (
            edited(by_words(models.WordPiece), unk_token="[UNK]"),
            r"unk_token=\[UNK\], is not",
        ),
        (edited(unigram(), unk_id=None), "cannot encode the document '0 "),
    ],
)
def test_tokenizer_that_cannot_encode_the_texts_leaves_nothing_behind(
    inputs, tmp_path, tokenizer, line
):
    tokenizer.save(str(tmp_path / "bad.json"))
    settings = settings_for(inputs, tmp_path / "out", tokenizer=str(tmp_path / "bad.json"))
    with pytest.raises(InputError, match=line):
        run(settings)
    assert not (tmp_path / "out").exists()


def test_one_token_for_both_ends_stands_once_between_documents(inputs, tmp_path, capsys):
    changes = {"bos_token": "<|end_of_text|>", "max_validation_tokens": 400}
    settings = settings_for(inputs, tmp_path / "out", **changes)
    with pytest.MonkeyPatch.context() as stopping:
        stop_after(stopping, shards=3)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    begun = (tmp_path / "out" / "progress.json").read_text()
    as_before = begun.replace('"separators": 1', '"separators": 2')
    assert as_before != begun
    (tmp_path / "out" / "progress.json").write_text(as_before)
    with pytest.raises(InputError, match="was begun by a version that put two tokens between"):
        run(settings)
    (tmp_path / "out" / "progress.json").write_text(begun)
    prepare(settings)
    assert "<|end_of_text|> is bos and eos: one of it stands" in capsys.readouterr().err
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["bos_id"] == meta["eos_id"] == 1
    expected = [token for token in ids_of(inputs / "tokenizer.json", TRAIN) if token != 0]
    assert tokens_of(tmp_path / "out", "train") == expected


def test_budget_cuts_both_splits_and_takes_part_of_a_document(inputs, tmp_path):
    run(settings_for(inputs, tmp_path / "out", max_tokens=7001, max_validation_tokens=100))
    tokenizer_file = inputs / "tokenizer.json"
    assert tokens_of(tmp_path / "out", "train") == ids_of(tokenizer_file, TRAIN)[:7001]
    assert tokens_of(tmp_path / "out", "validation") == ids_of(tokenizer_file, VALIDATION)[:100]


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
def test_only_documents_that_begin_before_the_cut_are_counted(inputs, tmp_path, bos, eos):
    cut = 2000
    row = run(settings_for(inputs, tmp_path / "out", max_tokens=cut, bos=bos, eos=eos))
    lengths = [len(ids_of(inputs / "tokenizer.json", [text])) - 2 + bos + eos for text in TRAIN]
    starts = np.cumsum([0, *lengths[:-1]])
    assert row["splits"]["train"]["documents"] == np.count_nonzero(starts < cut) < 150
    assert row["splits"]["validation"]["documents"] == 30


class PoolWithoutMemory(prepare_module.EncodingPool):
    """Both its workers are killed; one left alive could encode all before that is noticed."""

    def encode(self, batches, *, held_out):
        with contextlib.suppress(BrokenProcessPool):  # the first may be dead already
            for _ in range(2):
                self._pool.submit(os._exit, 9)
        yield from super().encode(batches, held_out=held_out)


def test_killed_worker_is_reported_in_one_line_and_what_is_written_stays(
    inputs, reference, half_done, monkeypatch, capsys
):
    with monkeypatch.context() as crowded:
        crowded.setattr(prepare_module, "EncodingPool", PoolWithoutMemory)
        words = ["--train", f"{inputs}/train.*.json.gz", "--tokenizer", f"{inputs}/tokenizer.json"]
        words += ["--validation", f"{inputs}/validation.json.gz", "--shard-tokens", "5000"]
        crowded.setattr(
            sys, "argv", ["prepare_data.py", "--out", str(half_done), *words, "--workers", "2"]
        )
        with pytest.raises(SystemExit) as ended:
            run_command("prepare-data")
        assert ended.value.code == 3
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert error[0].startswith("error: a worker process was killed, as when memory runs out")
    run(settings_for(inputs, half_done))
    assert contents(half_done) == contents(reference)


def test_held_out_documents_are_in_one_split_only(inputs, tmp_path):
    settings = settings_for(inputs, tmp_path / "out", validation=[], validation_fraction=0.2)
    run(settings)
    kept = [text for text in TRAIN if not is_held_out(text, 0.2)]
    held_out = [text for text in TRAIN if is_held_out(text, 0.2)]
    tokenizer_file = inputs / "tokenizer.json"
    assert tokens_of(tmp_path / "out", "train") == ids_of(tokenizer_file, kept)
    assert tokens_of(tmp_path / "out", "validation") == ids_of(tokenizer_file, held_out)


def test_split_without_a_document_is_refused(inputs, tmp_path):
    settings = settings_for(inputs, tmp_path / "out", validation=[], validation_fraction=1e-9)
    with pytest.raises(InputError, match=r"for the split validation; .*--txt-documents blank-line"):
        run(settings)
    assert not (tmp_path / "out").exists()


def test_folder_is_answered_with_a_glob(inputs, tmp_path):
    with pytest.raises(InputError, match=f"is a folder; give a quoted glob, as '{inputs}/"):
        run(settings_for(inputs, tmp_path / "out", train=[str(inputs)]))


def test_bpe_is_trained_on_the_first_training_documents(inputs, tmp_path):
    settings = {"tokenizer": None, "train_bpe": 280, "train_bpe_documents": 50}
    row = run(settings_for(inputs, tmp_path / "out", **settings))
    assert row["vocab_size"] == 280
    placed = (tmp_path / "out" / "tokenizer.json").read_text()
    assert placed == train_bpe(TRAIN[:50], 280).to_str()
    assert tokens_of(tmp_path / "out", "train") == ids_of(
        tmp_path / "out" / "tokenizer.json", TRAIN
    )


def test_bpe_sees_no_held_out_document(inputs, tmp_path):
    settings = {"tokenizer": None, "train_bpe": 280, "train_bpe_documents": 50}
    held_out = {"validation": [], "validation_fraction": 0.3}
    run(settings_for(inputs, tmp_path / "out", **settings, **held_out))
    kept = [text for text in TRAIN if not is_held_out(text, 0.3)]
    placed = (tmp_path / "out" / "tokenizer.json").read_text()
    assert placed == train_bpe(kept[:50], 280).to_str()


def test_folder_in_use_is_refused(inputs, tmp_path):
    with folder_lock(tmp_path, wait=False), pytest.raises(InputError, match="another process"):
        run(settings_for(inputs, tmp_path))


def test_folder_with_other_files_is_refused(inputs, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        run(settings_for(inputs, tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": []}, "--validation-fraction"),
        ({"train": []}, "--validation files need --train"),
        ({"validation_fraction": 0.1}, "exclude each other"),
        ({"validation_fraction": 1.0, "validation": []}, "--validation-fraction=1.0"),
        ({"tokenizer": None}, "--tokenizer"),
        ({"train_bpe": 300}, "--train-bpe"),
        ({"tokenizer": None, "train_bpe": 100}, "--train-bpe=100 must be at least 258"),
        ({"shard_tokens": 0}, "--shard-tokens=0 must be at least 1"),
        ({"workers": -1}, "--workers=-1"),
        ({"source": "web"}, "--source=web"),
    ],
)
def test_impossible_settings_are_refused_by_name(inputs, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        settings_for(inputs, tmp_path / "out", **changes)


def test_file_in_both_splits_is_refused(inputs, tmp_path):
    settings = settings_for(inputs, tmp_path / "out", validation=[f"{inputs}/train.1.json.gz"])
    with pytest.raises(InputError, match=r"both name .*train\.1\.json\.gz"):
        run(settings)


def command(*arguments: object) -> subprocess.CompletedProcess:
    script = ROOT / "scripts" / "prepare_data.py"
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_prints_one_object_and_ends_with_0_each_time(inputs, reference, tmp_path):
    arguments = ["--out", tmp_path / "out", "--train", inputs / "train.0.json.gz"]
    arguments += [inputs / "train.1.json.gz", "--validation", inputs / "validation.json.gz"]
    arguments += ["--tokenizer", inputs / "tokenizer.json", "--shard-tokens", 5000, "--json"]
    first, second = command(*arguments), command(*arguments)
    assert (first.returncode, second.returncode) == (0, 0)
    assert json.loads(first.stdout)["status"] == "prepared"
    assert json.loads(second.stdout)["status"] == "already prepared"
    assert contents(tmp_path / "out") == contents(reference)


def test_command_ends_bad_input_with_2_and_one_line(inputs, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "cut sh')
    result = command(
        *("--out", tmp_path / "out", "--train", tmp_path / "bad.jsonl"),
        *("--validation", inputs / "validation.json.gz", "--tokenizer", inputs / "tokenizer.json"),
    )
    assert result.returncode == 2
    last_line = result.stderr.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert "bad.jsonl, line 1: not JSON" in last_line
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()

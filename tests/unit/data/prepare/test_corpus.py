import errno
import gzip
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gns_pretrain.data.prepare import corpus as corpus_module
from gns_pretrain.data.prepare.corpus import (
    Corpus,
    HubDataset,
    LocalFiles,
    find_files,
    is_held_out,
    parse_texts,
)
from gns_pretrain.data.tokenization import read_tokenizer
from gns_pretrain.errors import InputError
from tests.unit.data_samples import as_line, make_texts, write_gzip

TEXTS = make_texts(60)
GOOD = as_line("good")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Batches of a few documents, so that cursors lie inside files."""
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", 1000)


def gzip_files(folder: Path) -> Corpus:
    names = ["a.json.gz", "b.json.gz"]
    return LocalFiles(
        [write_gzip(folder / name, part) for name, part in zip(names, halves(), strict=True)]
    )


def plain_files(folder: Path) -> Corpus:
    paths = [folder / "a.jsonl", folder / "b.json"]
    for path, part in zip(paths, halves(), strict=True):
        # Blank lines are no documents, and the last line may lack its end.
        path.write_bytes(b"\n".join(as_line(text) for text in part)[:-1])
    return LocalFiles(paths)


def parquet_files(folder: Path) -> Corpus:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths = [folder / "a.parquet", folder / "b.parquet"]
    for path, part in zip(paths, halves(), strict=True):
        table = pyarrow.table({"url": ["https://example.com"] * len(part), "text": part})
        parquet.write_table(table, path, row_group_size=7)
    return LocalFiles(paths)


def zstandard_files(folder: Path) -> Corpus:
    pyarrow = pytest.importorskip("pyarrow")
    paths = [folder / "a.jsonl.zst", folder / "b.json.zst"]
    for path, part in zip(paths, halves(), strict=True):
        # In several frames, as parallel compressors write them.
        frames = [b"".join(map(as_line, part[start : start + 9])) for start in range(0, 40, 9)]
        codec = pyarrow.Codec("zstd")
        path.write_bytes(b"".join(codec.compress(frame, asbytes=True) for frame in frames))
    return LocalFiles(paths)


def text_files(folder: Path) -> Corpus:
    for number, text in enumerate(TEXTS):
        path = folder / f"{number:02d}.txt"
        packed = gzip.compress(text.encode()) if number % 2 else text.encode()
        (path.with_suffix(".txt.gz") if number % 2 else path).write_bytes(packed)
    return LocalFiles(sorted(folder.iterdir()))


def paragraphs(folder: Path) -> Corpus:
    paths = [folder / "a.txt", folder / "b.txt"]
    for path, part in zip(paths, halves(), strict=True):
        path.write_bytes(b"\n\r\n" + " \n\n".join(part).replace(" ", "\n").encode() + b"\n")
    return LocalFiles(paths, by_paragraph=True)


def hub_stream(folder: Path) -> Corpus:
    pytest.importorskip("datasets")
    gzip_files(folder)
    paths = [str(folder / name) for name in ("a.json.gz", "b.json.gz")]
    return HubDataset("json", None, "train", paths)


def halves() -> tuple[list[str], list[str]]:
    return TEXTS[:23], TEXTS[23:]


SOURCES = [
    *(gzip_files, plain_files, zstandard_files, parquet_files, hub_stream),
    *(text_files, paragraphs),
]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_documents_in_order(tmp_path, source):
    batches = list(source(tmp_path).batches(None))
    found = [text for batch in batches for text in parse_texts(batch)[0]]
    assert [text.replace("\n", " ") for text in found] == TEXTS
    assert all(0 <= a.fraction <= b.fraction <= 1 for a, b in pairwise(batches))


@pytest.mark.parametrize("source", SOURCES)
def test_reading_resumes_from_any_cursor(tmp_path, source):
    corpus = source(tmp_path)
    batches = list(corpus.batches(None))
    assert len(batches) > 6
    for k, batch in enumerate(batches):
        assert [same.records for same in corpus.batches(batch.cursor)] == [
            other.records for other in batches[k:]
        ]


def test_files_are_sorted_and_named_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.parquet"):
        (tmp_path / name).write_bytes(GOOD)
    found = find_files(
        [f"{tmp_path}/*.jsonl", f"{tmp_path}/a*", f"{tmp_path}/c.parquet"], "--train"
    )
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl", "c.parquet"]


@pytest.mark.parametrize("pattern", ["missing*.jsonl", "text.csv", "empty.jsonl"])
def test_pattern_without_text_files_is_named(tmp_path, pattern):
    (tmp_path / "text.csv").write_bytes(GOOD)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=f"--train=.*{pattern[:4]}"):
        find_files([str(tmp_path / pattern)], "--train")


def test_held_out_part_is_a_fraction_that_depends_on_the_text_alone():
    texts = make_texts(2000, seed=5)
    chosen = [is_held_out(text, 0.1) for text in texts]
    # Binomial(2000, 0.1): standard deviation 13.4.
    assert abs(sum(chosen) - 200) < 5 * 13.4
    assert [is_held_out(text, 0.1) for text in reversed(texts)] == chosen[::-1]
    assert not any(is_held_out(text, 0.0) for text in texts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "bad \xff"}\n', "line 3: not UTF-8"),
        (b'{"text": "\\ud800"}\n', "line 3: not UTF-8"),
        (b'{"text": "cut sh', "line 3: not JSON"),
        (b'{"n": 1, "body": "x", "url": "y"}\n', "line 3: no `text` .* here one of body, url"),
        (b'{"text": null}\n', "line 3: no `text`"),
        (b"[1]\n", "line 3: no `text`"),
        (b'{"text": 5}\n', "line 3: no `text`"),
        (b'{"text": NaN}\n', "line 3: no `text`"),
        (b'{"text": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "line 3: nested too"),
        (b'{"a": ' * 200_000 + b"1" + b"}" * 200_000 + b"\n", "line 3: nested too"),
        (b"{\n", "line 3: not JSON .* a record not on one line"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_record_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD * 2 + line)
    with pytest.raises(InputError, match=rf"bad\.jsonl, {message}"):
        [parse_texts(batch)[0] for batch in LocalFiles([path]).batches(None)]
    batches = LocalFiles([path]).batches(None)
    assert [parse_texts(batch, skip_bad=True) for batch in batches] == [(["good", "good"], 1)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", b""),
        ("empty.json.gz", b""),
        ("nothing.json.gz", gzip.compress(b"", mtime=0)),
        ("cut.json.gz", gzip.compress(GOOD * 500, mtime=0)[:-20]),
        ("other.json.gz", GOOD),
        ("cut.parquet", b"PAR1"),
        ("blank.txt", b" \n\n"),
        ("other.json.zst", GOOD),
    ],
)
def test_empty_or_damaged_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is (empty|truncated|not a whole)"):
        list(LocalFiles([path]).batches(None))


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "odd", "n": ' + b"9" * 5000 + b"}\n",
        b'{"text": "odd", "n": NaN, "m": -Infinity, "k": 1e999}\n',
        b'{"text": "odd", "\\ud800": "\\udc00"}\n',
    ],
    ids=["5,000 digits", "not finite", "lone surrogates beside the text"],
)
def test_what_json_allows_beside_the_text_is_no_matter(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(GOOD + line)
    (batch,) = LocalFiles([tmp_path / "a.jsonl"]).batches(None)
    assert parse_texts(batch)[0] == ["good", "odd"]


def test_zstandard_file_that_is_cut_short_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    content = pyarrow.Codec("zstd").compress(b"".join(map(as_line, TEXTS)), asbytes=True)
    (tmp_path / "cut.jsonl.zst").write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"cut\.jsonl\.zst is truncated"):
        list(LocalFiles([tmp_path / "cut.jsonl.zst"]).batches(None))


@pytest.mark.parametrize("source", [LocalFiles, "datasets"])
def test_text_may_have_another_key(tmp_path, source):
    if source == "datasets":
        pytest.importorskip("datasets")
        source = partial(HubDataset, "json", None, "train")
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "a", "text": 5}\n{"text": 6, "content": "b"}\n')
    paths = [path] if source is LocalFiles else [str(path)]
    (batch,) = source(paths, text_key="content").batches(None)
    assert parse_texts(batch) == (["a", "b"], 0)


@pytest.mark.parametrize("name", ["bom.jsonl", "bom.json.gz"])
def test_mark_of_utf_8_at_the_beginning_is_no_text(tmp_path, name):
    content = b"\xef\xbb\xbf" + GOOD * 2
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (batch,) = LocalFiles([tmp_path / name]).batches(None)
    assert parse_texts(batch)[0] == ["good", "good"]


@pytest.mark.parametrize("indent", [None, 1])
def test_file_that_is_one_array_is_named(tmp_path, indent):
    path = tmp_path / "array.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=indent))
    with pytest.raises(InputError, match=r"array\.json is one array, where each line .*jq -c"):
        list(LocalFiles([path]).batches(None))


def parquet_column(folder: Path, *values: object, kind: str) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    dictionary = kind == "dictionary"
    column = pyarrow.array(values, "binary" if dictionary else kind)
    column = column.dictionary_encode() if dictionary else column
    parquet.write_table(pyarrow.table({"text": column}), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "dictionary"])
@pytest.mark.parametrize(
    "source", [LocalFiles, lambda paths: HubDataset("parquet", None, "x", paths)]
)
def test_parquet_texts_are_strings_or_their_bytes(tmp_path, kind, source):
    pytest.importorskip("datasets")
    texts = ["é", '{"text": "not this"}']
    values = texts if "string" in kind else [text.encode() for text in texts]
    path = parquet_column(tmp_path, *values, kind=kind)
    paths = [path] if source is LocalFiles else [str(path)]
    (batch,) = source(paths).batches(None)
    assert parse_texts(batch)[0] == texts


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([1, 2], "int64", "its column `text` is of int64"),
        ([2**62 + 1], "timestamp[ns]", r"its column `text` is of timestamp\[ns\]"),
        (["a", None], "string", "record 2: no `text` in it"),
        ([b"a", b"\xff"], "binary", "record 2: not UTF-8"),
    ],
)
def test_parquet_record_without_text_is_named(tmp_path, values, kind, message):
    path = parquet_column(tmp_path, *values, kind=kind)
    with pytest.raises(InputError, match=rf"a\.parquet.* {message}"):
        [parse_texts(batch)[0] for batch in LocalFiles([path]).batches(None)]


def test_hub_record_that_is_not_a_string_is_named(tmp_path):
    pytest.importorskip("datasets")
    stream = HubDataset("parquet", None, "x", [str(parquet_column(tmp_path, 1, 2, kind="int64"))])
    with pytest.raises(InputError, match="record 1: no `text` in it; each record needs one, a str"):
        [parse_texts(batch)[0] for batch in stream.batches(None)]


def test_parquet_without_text_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"txt": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has no column `text`"):
        list(LocalFiles([tmp_path / "a.parquet"]).batches(None))


@pytest.mark.parametrize(
    "content",
    [gzip.compress(GOOD * 500, mtime=0)[:-20], gzip.compress(GOOD + b'{"text": bad}\n')],
    ids=["truncated", "not JSON"],
)
def test_file_that_a_stream_cannot_read_is_named(tmp_path, content):
    pytest.importorskip("datasets")
    good, bad = write_gzip(tmp_path / "a.json.gz", TEXTS), tmp_path / "b.json.gz"
    bad.write_bytes(content)
    stream = HubDataset("json", None, "train", [str(good), str(bad)])
    with pytest.raises(InputError, match=r"b\.json\.gz"):
        list(stream.batches(None))


def test_columns_beside_the_text_may_differ_between_splits(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b'{"text": "bare"}\n{"text": "odd", "timestamp": "noon"}\n')
    texts = [
        parse_texts(batch)[0] for batch in HubDataset("json", None, "x", [str(path)]).batches(None)
    ]
    assert texts == [["good", "bare", "odd"]]


def test_cache_of_hugging_faces_libraries_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "/.cache")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(InputError, match=r"cannot be opened \(Perm.*environment variable HF_HOME$"):
        HubDataset("json", None, "train", [])
    monkeypatch.setattr(Tokenizer, "from_pretrained", refuse)
    with pytest.raises(InputError, match=r"--tokenizer=some/model is .*variable HF_HOME$"):
        read_tokenizer("some/model")


def test_split_that_a_data_set_lacks_is_named(tmp_path):
    pytest.importorskip("datasets")
    write_gzip(tmp_path / "train.json.gz", TEXTS)
    with pytest.raises(InputError, match=r"validation cannot be opened .*Bad split: validation"):
        HubDataset(str(tmp_path), None, "validation")

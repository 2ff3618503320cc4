"""Documents: one record each, its text under a key (C4's is `text`), or plain text.

A corpus yields batches of records in a fixed order, which a worker process turns into texts
(`parse_texts`): decompressing is left to one process, parsing and tokenizing to all. Each batch
carries the cursor from which reading it again starts. Local files are read in the order of their
names; a dataset that the `datasets` library streams, in the dataset's own order.
"""

import codecs
import copy
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, groupby, islice
from pathlib import Path
from typing import IO, Any, cast

from gns_pretrain.data.tokenization import hub_hint
from gns_pretrain.errors import InputError, needs, one_line

BATCH_BYTES = 300_000  # of text: about 0.1 s of tokenizing, long against the cost of sending it
TEXT_KEY = "text"  # C4's
KINDS = (".jsonl", ".json", ".txt")
SUFFIXES = (*(kind + packed for kind in KINDS for packed in ("", ".gz", ".zst")), ".parquet")

MEND = "fix or remove the record, or leave it out with --skip-bad-records"

# JSON: `record`, the number of records before it in its file or stream; the rest is the corpus's.
Cursor = dict[str, Any]


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive records of one file or stream, not parsed yet."""

    cursor: Cursor  # of the first record
    origin: str  # file or dataset, for error messages
    records: list[Any]  # lines of JSON, bytes; or texts, which should be str or its bytes
    fraction: float  # of the corpus that is read when this batch is
    text_key: str  # of the text in a record
    is_json: bool  # a line of it each; otherwise the records are the texts


def parse_texts(batch: RecordBatch, *, skip_bad: bool = False) -> tuple[list[str], int]:
    """Return the texts of a batch, and how many records without one were skipped.

    Raises:
        InputError: naming the file and the line that hold no text, unless bad ones are skipped.
    """
    unit = "line" if batch.is_json else "record"
    texts, skipped = [], 0
    for number, record in enumerate(batch.records, start=batch.cursor["record"] + 1):
        if batch.is_json and record.isspace():
            continue
        try:
            texts.append(_text_of(record, batch, f"{batch.origin}, {unit} {number}"))
        except InputError:
            if not skip_bad:
                raise
            skipped += 1
    return texts, skipped


def _text_of(record: Any, batch: RecordBatch, where: str) -> str:
    key, others = batch.text_key, ""
    try:
        text = record.decode("utf-8") if isinstance(record, bytes) else record
        if batch.is_json:
            # As floats, since an int of 5,000 digits is JSON, but not for Python.
            content = json.loads(text, parse_int=float)
            text = content.get(key) if isinstance(content, dict) else None
            if isinstance(content, dict) and key not in content:
                texts = [name for name, value in content.items() if isinstance(value, str)]
                others = f"; --text-key names another, here one of {', '.join(texts)}"
        if not isinstance(text, str):
            raise InputError(f"{where}: no `{key}` in it; each record needs one, a string{others}")
        text.encode("utf-8")  # JSON may escape a lone surrogate
    except UnicodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error}); {MEND}") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON ({error}); is the file cut short, or a record not on one line?"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply; {MEND}") from error
    return text


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation part: decided by its text alone.

    So copies of a document fall on the same side, and adding files moves none to the other.
    """
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def find_files(patterns: list[str], setting: str) -> list[Path]:
    """Return the files that paths and globs name, sorted; errors name setting and pattern."""
    paths: set[Path] = set()
    for pattern in patterns:
        # Path.glob takes no absolute patterns; a name with brackets may exist as it stands.
        names = glob.glob(pattern, recursive=True)  # noqa: PTH207
        found = [Path(pattern)] if Path(pattern).exists() else [Path(name) for name in names]
        if not found:
            raise InputError(f"{setting}={pattern} matches no file; give a path or a quoted glob")
        paths.update(found)
    for path in paths:
        if path.is_dir():
            raise InputError(f"{setting}={path} is a folder; give a quoted glob, as '{path}/*.txt'")
        if not path.is_file() or not path.name.endswith(SUFFIXES):
            raise InputError(f"{setting}={path} is not a file ending in {', '.join(SUFFIXES)}")
        if path.stat().st_size == 0:
            raise InputError(f"{setting}={path} is empty; remove it or fetch it again")
    return sorted(paths)


def _in_batches(records: Iterable[tuple[Any, float]]) -> Iterator[tuple[list[Any], float]]:
    """Collect records until they hold BATCH_BYTES; yield them with the last one's fraction."""
    batch: list[Any] = []
    num_bytes, fraction = 0, 0.0
    for record, fraction in records:
        batch.append(record)
        num_bytes += len(record) if isinstance(record, str | bytes) else 0
        if num_bytes >= BATCH_BYTES:
            yield batch, fraction
            batch, num_bytes = [], 0
    if batch:
        yield batch, fraction


class LocalFiles:
    """JSON lines and plain text, compressed or not, and Parquet.

    Args:
        paths: in the order in which they are read.
        text_key: of the text in a JSON record, or its column in Parquet.
        by_paragraph: a document of plain text ends at a blank line, not with its file.
    """

    def __init__(self, paths: list[Path], *, text_key: str = TEXT_KEY, by_paragraph: bool = False):
        self.paths = paths
        self._text_key, self._by_paragraph = text_key, by_paragraph
        self._sizes = [path.stat().st_size for path in paths]

    def sizes_read(self, cursor: Cursor) -> list[int]:
        """Return the bytes of the files wholly before cursor: they must not change any more."""
        return self._sizes[: cursor["file"]]

    def batches(self, cursor: Cursor | None) -> Iterator[RecordBatch]:
        """Read the records from cursor on (None: from the start), the same every time.

        Raises:
            InputError: naming a file that is empty, truncated or unreadable.
        """
        first_file, record = (cursor["file"], cursor["record"]) if cursor else (0, 0)
        for number, path in list(enumerate(self.paths))[first_file:]:
            is_json = False
            if path.suffix == ".parquet":
                read = _parquet_texts(path, self._text_key)
            elif path.name.removesuffix(".gz").removesuffix(".zst").endswith(".txt"):
                read = _plain_texts(path, by_paragraph=self._by_paragraph)
            else:
                read, is_json = _lines(path), True
            for records, fraction in _in_batches(islice(read, record, None)):
                bytes_read = sum(self._sizes[:number]) + fraction * self._sizes[number]
                yield RecordBatch(
                    cursor={"file": number, "record": record},
                    origin=str(path),
                    records=records,
                    fraction=bytes_read / max(1, sum(self._sizes)),
                    text_key=self._text_key,
                    is_json=is_json,
                )
                record += len(records)
            if record == 0:
                raise InputError(f"{path} is empty; remove it or fetch it again")
            record = 0


@contextmanager
def _unpacked(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], float]]]:
    """Open a file, gzip or Zstandard or neither; the second says the fraction that is read.

    Raises:
        InputError: naming a file that is truncated or damaged.
    """
    size = path.stat().st_size
    damages: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        with path.open("rb") as raw:
            stream: IO[bytes] = raw
            if path.suffix == ".gz":
                stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
            elif path.suffix == ".zst":
                with needs("data", f"reading {path} needs pyarrow"):
                    import pyarrow
                stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
            yield stream, lambda: raw.tell() / size
    except damages as error:
        raise InputError(
            f"{path} is truncated or damaged ({one_line(error)}); fetch it again"
        ) from error


def _lines(path: Path) -> Iterator[tuple[bytes, float]]:
    """Read the lines of a file, each with the fraction of the file that is read."""
    with _unpacked(path) as (lines, fraction):
        first = next(lines, b"").removeprefix(codecs.BOM_UTF8)
        if first.lstrip().startswith(b"["):
            raise InputError(
                f"{path} is one array, where each line should be a record; jq -c '.[]' writes it so"
            )
        for line in chain([first] if first else [], lines):
            yield line, fraction()


def _plain_texts(path: Path, *, by_paragraph: bool) -> Iterator[tuple[bytes, float]]:
    """Read a file's text, whole or up to each blank line, with the fraction that is read."""
    with _unpacked(path) as (stream, fraction):
        if not by_paragraph:
            text = stream.read().removeprefix(codecs.BOM_UTF8)
            if text.strip():
                yield text, 1.0
            return
        lines = chain([next(stream, b"").removeprefix(codecs.BOM_UTF8)], stream)
        for is_blank, paragraph in groupby(lines, key=lambda line: not line.strip()):
            if not is_blank:
                yield b"".join(paragraph).rstrip(b"\r\n"), fraction()


def _parquet_texts(path: Path, column: str) -> Iterator[tuple[Any, float]]:
    """Read a column of texts, each with the fraction of the file that is read."""
    with needs("data", f"reading {path} needs pyarrow"):
        import pyarrow
        from pyarrow import parquet
    record = 0
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if names.count(column) != 1:
            raise InputError(
                f"{path} has no column `{column}`, or several; --text-key names one of "
                f"{', '.join(names)}"
            )
        kind = file.schema_arrow.field(column).type
        kind = str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind)
        if kind.removeprefix("large_").removesuffix("_view") not in ("string", "binary", "null"):
            raise InputError(
                f"{path}: its column `{column}` is of {kind}; each record needs a string"
            )
        for rows in file.iter_batches(batch_size=64, columns=[column]):
            for text in rows.column(0):
                record += 1
                yield text.as_py(), record / file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a whole Parquet file (after record {record}: {one_line(error)}); "
            "fetch it again"
        ) from error


class HubDataset:
    """One split of a dataset, its column of texts alone, streamed by `datasets`.

    Args:
        path: as load_dataset takes it (allenai/c4); "json" and "parquet" read data_files, without
            the hub.
        name: configuration of the dataset (en), if it has several.
        split: a split of the dataset.
        data_files: local files of this split.
        text_key: name of the column.
    """

    def __init__(
        self,
        path: str,
        name: str | None,
        split: str,
        data_files: list[str] | None = None,
        *,
        text_key: str = TEXT_KEY,
    ):
        with needs("data", "--source=hub needs the package datasets"):
            from datasets import load_dataset_builder
        self._label = " ".join(filter(None, [path, name, split]))
        self._split, self._text_key = split, text_key
        try:
            # Of this split alone: the library takes the columns of the first split for all.
            files = {split: data_files} if data_files else None
            self._builder = load_dataset_builder(path, name, data_files=files)
            self._builder.as_streaming_dataset(split=split)
        except Exception as error:
            raise InputError(
                f"--dataset={self._label} cannot be opened "
                f"({type(error).__name__}: {one_line(error)}); "
                + hub_hint(error, "check its name, its splits and the network")
            ) from error

    def sizes_read(self, cursor: Cursor) -> list[int]:
        """Return none: nothing is known about files that the library fetches."""
        return []

    def batches(self, cursor: Cursor | None) -> Iterator[RecordBatch]:
        """Stream the texts from cursor on; it holds the library's own state of the stream.

        Raises:
            InputError: naming the file, if the library knows it, that could not be read.
        """
        record = cursor["record"] if cursor else 0
        dataset: Any = None
        try:
            # Parsing C4's other columns costs time, and fails where one is left out.
            dataset = self._builder.as_streaming_dataset(split=self._split)
            dataset = dataset.select_columns([self._text_key])
            state = cursor["stream"] if cursor else dataset.state_dict()
            dataset.load_state_dict(copy.deepcopy(state))
            for records, _ in _in_batches((row[self._text_key], 0.0) for row in dataset):
                yield RecordBatch(
                    cursor={"stream": state, "record": record},
                    origin=self._label,
                    records=records,
                    fraction=_file_number(state) / dataset.num_shards,
                    text_key=self._text_key,
                    is_json=False,
                )
                state, record = dataset.state_dict(), record + len(records)
        except Exception as error:
            files = (self._builder.config.data_files or {}).get(self._split, [])
            number = 0 if dataset is None else _file_number(dataset.state_dict())
            origin = files[number] if number < len(files) else self._label
            raise InputError(
                f"{origin}: reading failed after record {record} ({type(error).__name__}: "
                f"{one_line(error)}); "
                + hub_hint(error, "fix the file or the connection and repeat the command")
            ) from error


def _file_number(state: Cursor) -> int:
    """Index of the file that a stream has come to, from its innermost iterable's state."""
    while "examples_iterable" in state:
        state = state["examples_iterable"]
    return int(state.get("shard_idx", 0))


Corpus = LocalFiles | HubDataset

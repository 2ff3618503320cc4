"""Documents in C4's own schema: one record per document, its text under `text`.

A corpus yields batches of records in a fixed order, which a worker process turns into texts
(`parse_texts`): decompressing is left to one process, parsing and tokenizing to all. Each batch
carries the cursor from which reading it again starts. Local files are read in the order of their
names; a dataset that the `datasets` library streams, in the dataset's own order.
"""

import codecs
import copy
import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

from gns_pretrain.data.tokenization import hub_hint
from gns_pretrain.errors import InputError, needs, one_line

BATCH_BYTES = 300_000  # of text: about 0.1 s of tokenizing, long against the cost of sending it
SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl", ".parquet")

# JSON: `record`, the number of records before it in its file or stream; the rest is the corpus's.
Cursor = dict[str, Any]


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive records of one file or stream, not parsed yet."""

    cursor: Cursor  # of the first record
    origin: str  # file or dataset, for error messages
    records: list[Any]  # lines of JSON, bytes; or what a column holds, which should be str
    fraction: float  # of the corpus that is read when this batch is


def parse_texts(batch: RecordBatch) -> list[str]:
    """Return the texts of a batch; InputError names the file and the line that hold none."""
    unit = "line" if batch.records and isinstance(batch.records[0], bytes) else "record"
    return [
        _text_of(record, f"{batch.origin}, {unit} {number}")
        for number, record in enumerate(batch.records, start=batch.cursor["record"] + 1)
        if not isinstance(record, bytes) or not record.isspace()
    ]


def _text_of(record: Any, where: str) -> str:
    text = record
    try:
        if isinstance(record, bytes):
            # As floats, since an int of 5,000 digits is JSON, but not for Python.
            content = json.loads(record.decode("utf-8"), parse_int=float)
            text = content.get("text") if isinstance(content, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{where}: no `text` in it; each record needs one, a string")
        text.encode("utf-8")  # JSON may escape a lone surrogate
    except UnicodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error}); fix or remove the record") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON ({error}); is the file cut short, or a record not on one line?"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply; fix or remove the record") from error
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
    """JSON lines, gzipped or not, and Parquet."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
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
            read = _parquet_texts if path.suffix == ".parquet" else _lines
            for records, fraction in _in_batches(islice(read(path), record, None)):
                bytes_read = sum(self._sizes[:number]) + fraction * self._sizes[number]
                yield RecordBatch(
                    cursor={"file": number, "record": record},
                    origin=str(path),
                    records=records,
                    fraction=bytes_read / max(1, sum(self._sizes)),
                )
                record += len(records)
            if record == 0:
                raise InputError(f"{path} is empty; remove it or fetch it again")
            record = 0


def _lines(path: Path) -> Iterator[tuple[bytes, float]]:
    """Read the lines of a file, gzipped or not, each with the fraction of the file that is read."""
    size = path.stat().st_size
    try:
        with path.open("rb") as raw:
            lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            first = next(lines, b"").removeprefix(codecs.BOM_UTF8)
            if first.lstrip().startswith(b"["):
                raise InputError(
                    f"{path} is one array, where each line should be a record; "
                    "jq -c '.[]' writes it so"
                )
            for line in chain([first] if first else [], lines):
                yield line, raw.tell() / size
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is truncated or damaged ({error}); fetch it again") from error


def _decoded(value: Any) -> Any:
    """Decode a text that a column holds as bytes (Spark and Impala write such); others stay."""
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _parquet_texts(path: Path) -> Iterator[tuple[Any, float]]:
    """Read the column `text`, each text with the fraction of the file that is read."""
    with needs("data", f"reading {path} needs pyarrow"):
        import pyarrow
        from pyarrow import parquet
    record = 0
    try:
        file = parquet.ParquetFile(path)
        if file.schema_arrow.names.count("text") != 1:
            raise InputError(f"{path} has no column `text`, or several; C4's schema has one")
        kind = file.schema_arrow.field("text").type
        kind = str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind)
        if kind.removeprefix("large_").removesuffix("_view") not in ("string", "binary", "null"):
            raise InputError(f"{path}: its column `text` is of {kind}; each record needs a string")
        for rows in file.iter_batches(batch_size=64, columns=["text"]):
            for text in rows.column(0):
                record += 1
                yield _decoded(text.as_py()), record / file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is not a whole Parquet file ({one_line(error)}); fetch it again"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, record {record}: not UTF-8 ({error}); fix or remove the record"
        ) from error


class HubDataset:
    """One split of a dataset, its column `text` alone, streamed by `datasets`.

    Args:
        path: as load_dataset takes it (allenai/c4); "json" and "parquet" read data_files, without
            the hub.
        name: configuration of the dataset (en), if it has several.
        split: a split of the dataset.
        data_files: local files of this split.
    """

    def __init__(
        self, path: str, name: str | None, split: str, data_files: list[str] | None = None
    ):
        with needs("data", "--source=hub needs the package datasets"):
            from datasets import load_dataset_builder
        self._label = " ".join(filter(None, [path, name, split]))
        self._split = split
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
            dataset = self._builder.as_streaming_dataset(split=self._split).select_columns(["text"])
            state = cursor["stream"] if cursor else dataset.state_dict()
            dataset.load_state_dict(copy.deepcopy(state))
            for records, _ in _in_batches((_decoded(row["text"]), 0.0) for row in dataset):
                yield RecordBatch(
                    cursor={"stream": state, "record": record},
                    origin=self._label,
                    records=records,
                    fraction=_file_number(state) / dataset.num_shards,
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

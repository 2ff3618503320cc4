"""Documents streamed by the `datasets` library: C4 from the hub, local files by the same code."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from gns_pretrain.data.corpus import BATCH_BYTES, Cursor, RecordBatch
from gns_pretrain.errors import InputError


class HubDataset:
    """One split of a data set, its column `text` alone, in the data set's own order.

    Args:
        path: as load_dataset takes it (allenai/c4); "json" and "parquet" read data_files, and ask
            no hub.
        name: configuration of the data set (en), if it has several.
        split: a split of the data set.
        data_files: local files of this split.
    """

    def __init__(
        self, path: str, name: str | None, split: str, data_files: list[str] | None = None
    ):
        try:
            from datasets import load_dataset_builder
        except ImportError as error:
            raise InputError(
                "--source=hub needs the package datasets; pip install 'gns-pretrain[data]'"
            ) from error
        self._label = " ".join(filter(None, [path, name, split]))
        self._split = split
        try:
            # Of this split alone: the library takes the columns of the first split for all.
            files = {split: data_files} if data_files else None
            self._builder = load_dataset_builder(path, name, data_files=files)
            self._builder.as_streaming_dataset(split=split)
        except Exception as error:
            raise InputError(
                f"--dataset={self._label} cannot be opened ({_one_line(error)}); "
                "check its name, its splits and the network"
            ) from error

    def batches(self, cursor: Cursor | None) -> Iterator[RecordBatch]:
        """See `corpus.Corpus`; a cursor holds the library's own state of the stream.

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
            records: list[str | None] = []
            batch_bytes = 0
            for example in dataset:
                records.append(example["text"])
                batch_bytes += len(example["text"] or "")
                if batch_bytes >= BATCH_BYTES:
                    yield self._batch(state, record, records, dataset.num_shards)
                    state, record = dataset.state_dict(), record + len(records)
                    records, batch_bytes = [], 0
            if records:
                yield self._batch(state, record, records, dataset.num_shards)
        except Exception as error:
            raise InputError(
                f"{self._origin(dataset)}: reading failed after record {record} "
                f"({_one_line(error)}); mend the file or the connection and give the command again"
            ) from error

    def sizes_read(self, cursor: Cursor) -> list[int]:
        """See `corpus.Corpus`; nothing is known about files that the library fetches."""
        return []

    def _batch(
        self, state: Cursor, record: int, records: list[str | None], num_files: int
    ) -> RecordBatch:
        return RecordBatch(
            cursor={"stream": state, "record": record},
            origin=self._label,
            first_record=record + 1,
            records=records,
            fraction=_file_number(state) / num_files,
        )

    def _origin(self, dataset: Any) -> str:
        """The file being read, as far as the stream's state tells."""
        files = (self._builder.config.data_files or {}).get(self._split, [])
        number = _file_number(dataset.state_dict()) if dataset is not None else 0
        return files[number] if number < len(files) else self._label


def _file_number(state: Cursor) -> int:
    """Index of the file that a stream has come to: the innermost iterable's entry of its state."""
    while "examples_iterable" in state:
        state = state["examples_iterable"]
    return int(state.get("shard_idx", 0))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]

"""Steps that turn raw text into shuffled, deduplicated, tokenized shards, for datatrove. Used by prep_stages.py.

Every document has a key, a hash of the seed and its text, and every shard is a range of keys. ScatterDocuments sorts
documents by shard, ReadShard yields a shard in the order of its keys, WriteShard writes it. So the order is random but does
not depend on the number of tasks, and equal texts meet in one place, where all but the first are dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.word_tokenizers import WordTokenizer

from nanochat.common import NanochatError
from nanochat.document_files import TOKEN_COLUMN, TOKENIZER_KEY
from nanochat.files import atomic_write, written_whole
from nanochat.listings import filesystem_of
from nanochat.prep_input import read_texts
from nanochat.prep_output import OutputLayout, PrepSettings
from nanochat.tokenizer import Tokenizer

ROW_GROUP_DOCUMENTS = 1024
RUN_BYTES = 256 * 2**20  # documents that a task holds in memory before it writes them as a run
ROW_BYTES = 200  # memory that a document takes besides its text
VAL_SHARE, MAX_VAL_DOCUMENTS = 0.02, 10_000  # defaults without --val-documents


# ----------------------------------------------------------------------------- keys


def document_key(text: str, seed: int) -> bytes:
    """16 bytes that order documents at random, the same for texts that differ only in case, white space and the way
    in which Unicode composes their characters (NFC)."""
    folded = text.casefold() if text.isascii() else unicodedata.normalize("NFC", text.casefold())
    return hashlib.blake2b(" ".join(folded.split()).encode(), digest_size=16, key=str(seed).encode()[:64]).digest()


def shard_of(key: bytes, num_shards: int) -> int:
    """Shards are equal ranges of keys, in ascending order."""
    return int.from_bytes(key[:8], "big") * num_shards >> 64


# ----------------------------------------------------------------------------- scattering


class ReadDocuments(PipelineStep):
    """Reads the input files rank, rank + world_size, ... row by row; empty rows are counted and left out."""

    type, name = "READER", "nanochat documents"

    def __init__(self, settings: PrepSettings) -> None:
        super().__init__()
        self.address, self.paths, self.column = settings.input, list(settings.inputs), settings.text_column

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        fs = filesystem_of(self.address)
        for number in range(rank, len(self.paths), world_size):
            with fs.open(self.paths[number], "rb") as file:
                for row, text in enumerate(read_texts(file, self.paths[number], self.column)):
                    if text and not text.isspace():
                        yield Document(text, f"{number}/{row}", metadata={"file": number, "row": row})
                    else:
                        self.stat_update("empty")


RUN_SCHEMA = pa.schema([("key", pa.binary(16)), ("file", pa.uint32()), ("row", pa.uint64()), ("text", pa.large_string())])


class ScatterDocuments(PipelineStep):
    """Writes documents to runs (files in which the documents of each shard are together), and the task's lowest keys.

    A run starts with num_shards + 1 little-endian uint64: where in the file each shard's part starts, and the file's end.
    A part is an Arrow stream of RUN_SCHEMA, or nothing. A trillion tokens are some 16,000 runs, not tasks times shards files.
    """

    type, name = "SHUFFLE", "nanochat scatter"

    def __init__(self, settings: PrepSettings, layout: OutputLayout, run_bytes: int = RUN_BYTES) -> None:
        super().__init__()
        self.seed, self.num_shards, self.layout, self.run_bytes = settings.seed, settings.num_shards, layout, run_bytes
        self.num_lowest = (settings.val_documents or MAX_VAL_DOCUMENTS) + 1  # one more, to know that some are left over

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        for path in self.layout.runs.glob(f"{rank:05d}_*.run"):  # of a task that was stopped
            path.unlink()
        rows: dict[int, list[tuple[bytes, int, int, str]]] = defaultdict(list)
        held, num_runs, lowest = 0, 0, _LowestKeys(self.num_lowest)
        for document in data:
            key = document_key(document.text, self.seed)
            lowest.add(key)
            rows[shard_of(key, self.num_shards)].append((key, *document.metadata.values(), document.text))
            self.stat_update("documents")
            self.stat_update("text_bytes", value=len(document.text.encode()))
            held += sys.getsizeof(document.text) + ROW_BYTES
            if held >= self.run_bytes:
                self._write_run(rank, num_runs, rows)
                rows.clear()
                held, num_runs = 0, num_runs + 1
        if rows:
            self._write_run(rank, num_runs, rows)
        atomic_write(self.layout.lowest / f"{rank:05d}", b"".join(lowest.keys()))

    def _write_run(self, rank: int, number: int, rows: dict[int, list[tuple[bytes, int, int, str]]]) -> None:
        starts = np.zeros(self.num_shards + 1, dtype="<u8")
        with written_whole(self.layout.runs / f"{rank:05d}_{number:04d}.run") as temporary, open(temporary, "wb") as file:
            file.write(starts.tobytes())
            for shard in range(self.num_shards):
                starts[shard] = file.tell()
                if shard in rows:
                    columns = [
                        pa.array(column, kind)
                        for column, kind in zip(zip(*rows[shard], strict=True), RUN_SCHEMA.types, strict=True)
                    ]
                    sink = pa.BufferOutputStream()
                    with pa.ipc.new_stream(sink, RUN_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
                        stream.write_batch(pa.record_batch(columns, schema=RUN_SCHEMA))
                    file.write(sink.getvalue())
            starts[-1] = file.tell()
            file.seek(0)
            file.write(starts.tobytes())


class _LowestKeys:
    """Keeps a given number of the lowest distinct keys that were added."""

    def __init__(self, number: int) -> None:
        self._keys: set[bytes] = set()
        self.number, self._limit = number, b"\xff" * 16

    def add(self, key: bytes) -> None:
        if key <= self._limit:
            self._keys.add(key)
            if len(self._keys) > 4 * self.number:
                self._keys = set(self.keys())
                self._limit = max(self._keys)

    def keys(self) -> list[bytes]:
        return sorted(self._keys)[: self.number]


class ChooseValidation(PipelineStep):
    """Finds the key up to which documents are for validation, from all tasks' lowest ones. One task."""

    type, name = "SHUFFLE", "nanochat validation"

    def __init__(self, settings: PrepSettings, layout: OutputLayout) -> None:
        super().__init__()
        self.settings, self.layout = settings, layout

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        documents = sum(counts.get("documents", 0) for counts in self.layout.counts("scatter"))
        wanted = self.settings.val_documents or max(1, min(MAX_VAL_DOCUMENTS, int(VAL_SHARE * documents)))
        lowest = _LowestKeys(wanted + 1)
        for path in sorted(self.layout.lowest.glob("[0-9]*")):  # nothing that a killed task left half written
            data = path.read_bytes()
            for start in range(0, len(data), 16):
                lowest.add(data[start : start + 16])
        keys = lowest.keys()
        if len(keys) <= wanted:
            fewer = "choose fewer --val-documents" if self.settings.val_documents else "give more text"
            raise NanochatError(
                f"{self.settings.input} holds {len(keys)} different documents, and {wanted} for validation leaves none to "
                f"train on: {fewer} and another --output"
            )
        atomic_write(self.layout.val_limit, keys[wanted - 1].hex())


# ----------------------------------------------------------------------------- gathering


class ReadShard(PipelineStep):
    """The documents of the shard with the task's number, in the order of their keys; of equal ones, the first in the input.

    Without dedup, equal documents stay in one shard, so that none is in both splits, but not next to each other.
    """

    type, name = "SHUFFLE", "nanochat gather"

    def __init__(self, settings: PrepSettings, layout: OutputLayout) -> None:
        super().__init__()
        self.dedup, self.layout = settings.dedup, layout

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        parts = [part for path in sorted(self.layout.runs.glob("*.run")) if (part := _read_part(path, rank)) is not None]
        if not parts:
            return
        table = pa.concat_tables(parts).combine_chunks()
        del parts
        keys = np.frombuffer(table["key"].chunk(0).buffers()[1], dtype=">u8").reshape(-1, 2)
        order = np.lexsort((table["row"].to_numpy(), table["file"].to_numpy(), keys[:, 1], keys[:, 0]))
        if self.dedup:
            repeats = (keys[order][1:] == keys[order][:-1]).all(axis=1)
            order = order[np.insert(~repeats, 0, True)]
            self.stat_update("duplicates", value=int(repeats.sum()))
        else:
            rows = table.select(["key", "file", "row"]).to_pylist()
            digests = [hashlib.blake2b(repr(tuple(row.values())).encode(), digest_size=16).digest() for row in rows]
            order = np.array(sorted(order, key=digests.__getitem__))
        for start in range(0, len(order), ROW_GROUP_DOCUMENTS):
            rows = table.select(["key", "text"]).take(order[start : start + ROW_GROUP_DOCUMENTS])
            for key, text in zip(rows["key"].to_pylist(), rows["text"].to_pylist(), strict=True):
                yield Document(text, key.hex())


def _read_part(path: Path, shard: int) -> pa.Table | None:
    with open(path, "rb") as file:
        file.seek(8 * shard)
        start, end = np.frombuffer(file.read(16), dtype="<u8").tolist()
        if start == end:
            return None
        file.seek(start)
        return pa.ipc.open_stream(file.read(end - start)).read_all()


class WriteShard(PipelineStep):
    """Writes the documents of a shard: shard_00007.parquet, and those for validation shard_val.parquet.

    Validation is the lowest keys, so mostly the first shard's; what others have is in shard_val_00001.parquet and so on.
    """

    type, name = "WRITER", "nanochat shard"

    def __init__(self, settings: PrepSettings, layout: OutputLayout) -> None:
        super().__init__()
        self.fingerprint, self.layout = settings.tokenizer, layout

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        tokenizer = Tokenizer.load(self.layout.output) if self.fingerprint else None
        num_threads = max(1, int(os.environ.get("DATATROVE_CPUS_PER_TASK", "1")))
        limit = self.layout.val_limit.read_text(encoding="utf-8")
        with contextlib.ExitStack() as stack:
            paths = [self.layout.output / shard_name(split, rank) for split in ("train", "val")]
            train, val = [stack.enter_context(_ShardWriter(path, tokenizer, num_threads)) for path in paths]
            for document in data:
                (val if document.id <= limit else train).add(document.text)
        for split, writer in (("train", train), ("val", val)):
            for what in ("documents", "tokens", "bytes"):
                self.stat_update(f"{split}_{what}", value=getattr(writer, what))


def shard_name(split: str, shard: int) -> str:
    """The name of a shard; nanochat recognizes validation by "val" in it."""
    if split == "train":
        return f"shard_{shard:05d}.parquet"
    return f"shard_val_{shard:05d}.parquet" if shard else "shard_val.parquet"


class _ShardWriter:
    """Writes a parquet file with row groups of ROW_GROUP_DOCUMENTS; makes no file unless a document is added."""

    def __init__(self, path: Path, tokenizer: Tokenizer | None, num_threads: int) -> None:
        self.path, self.tokenizer, self.num_threads = path, tokenizer, num_threads
        self.documents = self.tokens = self.bytes = 0
        self._texts: list[str] = []
        self._stack = contextlib.ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self.schema, self.encoding = pa.schema([("text", pa.string())]), {}
        if tokenizer is not None:
            kind = pa.uint16() if tokenizer.get_vocab_size() <= 65536 else pa.int32()
            metadata = {TOKENIZER_KEY: tokenizer.fingerprint()}
            self.schema = pa.schema([(TOKEN_COLUMN, pa.list_(kind))], metadata=metadata)
            # Parquet stores 4 bytes per id. With the bytes split into streams, zstd leaves 1.45, less than a dictionary.
            self.encoding = {"use_dictionary": False, "column_encoding": {f"{TOKEN_COLUMN}.list.element": "BYTE_STREAM_SPLIT"}}

    def __enter__(self) -> _ShardWriter:
        return self

    def add(self, text: str) -> None:
        self._texts.append(text)
        if len(self._texts) == ROW_GROUP_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        if self._writer is None:
            temporary = self._stack.enter_context(written_whole(self.path))
            writer = pq.ParquetWriter(temporary, self.schema, compression="zstd", **self.encoding)
            self._writer = self._stack.enter_context(writer)
        self._writer.write_table(pa.table([self._column()], schema=self.schema), row_group_size=ROW_GROUP_DOCUMENTS)
        self.documents += len(self._texts)
        self._texts = []

    def _column(self) -> pa.Array:
        if self.tokenizer is None:
            return pa.array(self._texts, pa.string())
        rows = self.tokenizer.encode_arrays(self._texts, self.num_threads)
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
        self.tokens += int(offsets[-1])
        kind = self.schema.field(0).type
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(rows)).cast(kind.value_type), type=kind)

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None:
            self._flush()
        self._stack.__exit__(*exception)
        if self._writer is not None and exception[0] is None:
            self.bytes = self.path.stat().st_size


class WriteManifest(PipelineStep):
    """Adds up what the tasks counted, checks that no document is lost, cleans up, writes manifest.json. One task."""

    type, name = "WRITER", "nanochat manifest"

    def __init__(self, settings: PrepSettings, layout: OutputLayout) -> None:
        super().__init__()
        self.settings, self.layout = settings, layout

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        scattered, gathered = self.layout.counts("scatter"), self.layout.counts("gather")
        names = ("duplicates", "dropped", "train_documents", "val_documents", "train_tokens", "val_tokens")
        counts = {name: sum(task.get(name, 0) for task in scattered) for name in ("empty", "text_bytes")}
        counts |= {name: sum(task.get(name, 0) for task in gathered) for name in names}
        counts["near_duplicates"] = counts.pop("dropped")  # datatrove's name
        documents = sum(task.get("documents", 0) for task in scattered)
        gone = counts["duplicates"] + counts["near_duplicates"]
        if documents != counts["train_documents"] + counts["val_documents"] + gone:
            raise NanochatError(
                f"documents were lost: {self.layout.output}/work was changed, prepare them in another --output"
            )
        counts = {"documents": documents + counts["empty"], **counts}
        shards = {
            shard_name(split, shard): {what: task[f"{split}_{what}"] for what in ("documents", "tokens", "bytes")}
            for split in ("train", "val")
            for shard, task in enumerate(gathered)
            if task.get(f"{split}_documents")
        }
        versions = {name: version(name) for name in ("nanochat", "datatrove", "pyarrow", "tiktoken")}
        versions["python"] = platform.python_version()
        manifest = {"settings": asdict(self.settings), "counts": counts, "shards": shards, "versions": versions}
        shutil.rmtree(self.layout.scratch, ignore_errors=True)
        for path in self.layout.output.glob(".shard_*.tmp"):
            path.unlink()
        atomic_write(self.layout.manifest, json.dumps(manifest, indent=1))  # last: it says that all is done


class SplitAtSpaces(WordTokenizer):
    """Words for near-duplicates, without the models that datatrove's own need."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]

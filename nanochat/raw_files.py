"""Reads raw text for data preparation: open files of any supported kind, compressed or not. Used by data_prep.py.

Training reads with document_files.py, which can begin at any row; here every row is read once, from the first on.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import NanochatError, first_line
from nanochat.document_files import BATCH_ROWS, READERS, cut_into_documents, is_text, parse_line, text_column

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
WAY_OUT = "name one with --text-column"


def kind_of(path: str) -> str | None:
    """The suffix that says how to read a file, less its compression; None for a file that is not read."""
    name = Path(path).name.lower()
    if name.startswith("."):
        return None
    plain = Path(name)
    if plain.suffix in COMPRESSIONS:
        plain = plain.with_suffix("")
        if plain.suffix == ".parquet":  # parquet is compressed inside
            return None
        if plain.suffix == ".json":
            return ".jsonl"
    return plain.suffix if plain.suffix in READERS else None


def read_texts(file: Any, path: str, column: str | None) -> Iterator[str]:
    """The text of every row of an open file, "" if there is none. Raises NanochatError, naming the file."""
    try:
        if kind_of(path) == ".parquet":
            texts = _read_parquet(file, path, column)
        else:
            compression = COMPRESSIONS.get(Path(path).suffix.lower())
            stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), compression) if compression else file
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n" if kind_of(path) == ".jsonl" else None)
            texts = _read_jsonl(lines, path, column) if kind_of(path) == ".jsonl" else cut_into_documents(lines)
        yield from texts
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = first_line(error)
        raise NanochatError(f"{path} cannot be read ({reason}): remove or replace it") from error


def _read_parquet(file: Any, path: str, column: str | None) -> Iterator[str]:
    with pq.ParquetFile(file) as parquet:
        column = text_column(path, parquet.schema_arrow.names, column, WAY_OUT)
        kind = parquet.schema_arrow.field(column).type
        if not is_text(kind):
            raise NanochatError(f"{path}: column {column} holds {kind}, not text: name another with --text-column")
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def _read_jsonl(lines: Iterable[str], path: str, column: str | None) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield parse_line(line, path, number, column, WAY_OUT)

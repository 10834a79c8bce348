"""Files of documents (parquet, JSON lines, plain text) that can be read from any row on. Used by listings.py,
dataset.py, prep_steps.py and prep_input.py.

A document is a text or, in a parquet file written by scripts/data_prep, its token ids.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import NanochatError, as_unicode, first_line
from nanochat.files import not_utf8
from nanochat.shard_cache import Shard, get_shard_cache, remote_error, retry

Document = str | np.ndarray  # a text, or token ids: (length,) int32, read-only, no BOS
# Pairs (row number of the first document, documents). The last may be empty: its number is then the file's number of rows.
Batches = Iterator[tuple[int, list[Document]]]

TEXT_FILE_CHARS = 4000  # a plain text file is cut into documents at the first blank line after this many characters,
LONGEST_TEXT_CHARS = 4 * TEXT_FILE_CHARS  # or, if there is none before this many, at the end of a line or word
TEXT_COLUMNS = ("text", "content", "body")
CHAT_COLUMNS, FOR_CHAT_SFT = {"messages", "conversations"}, "conversations go to chat_sft --tasks FILE"
TOKEN_COLUMN = "tokens"
TOKENIZER_KEY = b"nanochat.tokenizer"  # in a parquet schema's metadata: the fingerprint of the tokenizer that made it
BATCH_ROWS = 1024


@dataclass(frozen=True)
class Footer:
    """What is known about a file without reading its documents. `num_rows` is None if only reading can tell."""

    num_rows: int | None
    tokenizer: str | None  # the fingerprint, None for a file of texts


class DocumentFile:
    """A local file with a suffix of READERS, as it was when it was listed. Rows are numbered from 0, including empty ones.

    `name` and `size` (bytes) go into the record of a run, `address` into errors. All methods that read raise NanochatError,
    naming the file, if it is damaged, missing, or has another size than when it was listed.
    """

    way_out = "remove or replace it"

    def __init__(self, path: Path, name: str = "") -> None:
        self.path, self.name, self.address, self.size = path, name or path.name, str(path), path.stat().st_size
        self.counted_rows: int | None = None  # once it was read through
        self._footer: Footer | None = None

    @functools.cached_property
    def suffix(self) -> str:
        return Path(self.name).suffix.lower()

    def fetch(self, following: Sequence[DocumentFile] = ()) -> None:
        """Fetch the file if it is remote, and begin to fetch those that will be read after it."""

    def open_bytes(self) -> BinaryIO:
        """The whole file, opened on this machine."""
        return open(self.path, "rb")

    def footer(self) -> Footer:
        if self._footer is None:
            with self.errors_named():
                self._footer = self.read_footer()
        return self._footer

    def read_footer(self) -> Footer:
        if self.suffix != ".parquet":
            return Footer(None, None)
        with self.open_bytes() as file:
            self._check_size(file)
            return _parquet_footer(file, self.address)

    def num_rows(self) -> int:
        """The number of rows: from a parquet file's metadata; other files are read through once."""
        if self.counted_rows is None:
            self.counted_rows = self.footer().num_rows
        if self.counted_rows is None:
            for _ in self.batches(sys.maxsize):
                pass
        return self.counted_rows or 0

    def batches(self, start: int = 0) -> Batches:
        """The documents from row `start` on; see Batches."""
        read = READERS[self.suffix]
        with self.errors_named(), self.open_bytes() as file:
            self._check_size(file)
            for row, documents in read(file, self.address, start):
                yield row, documents
            self._check_size(file)  # a file truncated between two lines would look complete
            self.counted_rows = row + len(documents)

    def _check_size(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        if size != self.size:
            raise NanochatError(
                f"{self.address} has {size} bytes, and had {self.size} when this run listed it: restore it, or start again"
            )

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NanochatError(f"{self.address} is gone, and was there when this run listed it: restore it") from error
        except UnicodeDecodeError as error:
            raise not_utf8(self.address, error) from error
        except (pa.ArrowException, OSError) as error:
            what = first_line(error)
            raise NanochatError(f"{self.address} cannot be read ({what}): {self.way_out}") from error


class RemoteFile(DocumentFile):
    """A file that is fetched completely into the cache when it is read; for the footer alone, only that part is."""

    way_out = "replace it; if it is sound there, remove the folder data/cache below NANOCHAT_BASE_DIR"

    def __init__(self, shard: Shard) -> None:
        self.shard, self.name, self.address, self.size = shard, str(shard.name), shard.url, shard.size
        self.counted_rows, self._footer = None, None

    def fetch(self, following: Sequence[DocumentFile] = ()) -> None:
        cache = get_shard_cache()
        cache.fetch(self.shard)
        cache.prefetch([file.shard for file in following if isinstance(file, RemoteFile)])

    def open_bytes(self) -> BinaryIO:
        return get_shard_cache().open_shard(self.shard)

    def read_footer(self) -> Footer:
        if self.suffix != ".parquet" or self.shard in get_shard_cache():
            return super().read_footer()
        try:
            return retry(self._read_far_footer)
        except (ValueError, NotImplementedError):  # the server does not serve parts of files
            return super().read_footer()
        except Exception as error:
            raise remote_error(self.address, error) from error

    def _read_far_footer(self) -> Footer:
        with self.shard.filesystem.open(self.shard.path, "rb") as file:
            return _parquet_footer(file, self.address)


# ----------------------------------------------------------------------------- parquet


def _parquet_footer(file: BinaryIO, address: str) -> Footer:
    metadata = pq.read_metadata(file)
    return Footer(metadata.num_rows, _column(metadata.schema.to_arrow_schema(), address)[1])


def _column(schema: pa.Schema, address: str) -> tuple[str, str | None]:
    """(name of the column to read, fingerprint of its tokenizer, or None for text)."""
    fingerprint = (schema.metadata or {}).get(TOKENIZER_KEY)
    kind = schema.field(TOKEN_COLUMN).type if schema.names.count(TOKEN_COLUMN) == 1 else None
    holds_ids = isinstance(kind, (pa.ListType, pa.LargeListType)) and pa.types.is_integer(kind.value_type)
    if holds_ids and fingerprint is not None:
        return TOKEN_COLUMN, fingerprint.decode()
    if holds_ids and not set(TEXT_COLUMNS) & set(schema.names):
        raise NanochatError(
            f"{address} has a column {TOKEN_COLUMN} but does not say which tokenizer made it ({TOKENIZER_KEY.decode()} "
            "in the schema's metadata): write it with python -m scripts.data_prep"
        )
    name = text_column(address, schema.names)
    if not is_text(schema.field(name).type):
        raise NanochatError(f"{address}: column {name} holds {schema.field(name).type}, not text: write it as strings")
    return name, None


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts: plain, dictionary-encoded, or null in every row."""
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(value_type) for test in tests)


def text_column(address: str, names: list[str], wanted: str | None = None, way_out: str = "rename one") -> str:
    """The name of the wanted column, or of the first that usually holds text. Raises NanochatError."""
    columns = (wanted,) if wanted else TEXT_COLUMNS
    for column in columns:
        if names.count(column) > 1:
            raise NanochatError(f"{address} has {names.count(column)} columns {column}: rename all but one")
        if column in names:
            return column
    if CHAT_COLUMNS & set(names):
        way_out = FOR_CHAT_SFT
    raise NanochatError(f"{address} has no column {' or '.join(columns)}, only {', '.join(names)}: {way_out}")


def _read_parquet(file: BinaryIO, address: str, start: int) -> Batches:
    parquet = pq.ParquetFile(file)
    column, tokenizer = _column(parquet.schema_arrow, address)
    convert = _texts if tokenizer is None else _token_ids
    ends = list(itertools.accumulate(parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)))
    skipped = sum(end <= start for end in ends)  # row groups
    row = ends[skipped - 1] if skipped else 0
    groups = list(range(skipped, len(ends)))
    for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=[column]) if groups else ():
        begin = max(0, start - row)
        if begin < batch.num_rows:
            yield row + begin, convert(batch.column(0)[begin:])
        row += batch.num_rows
    yield row, []


def _texts(column: pa.Array) -> list[Document]:
    return [text or "" for text in column.to_pylist()]


def _token_ids(column: pa.Array) -> list[Document]:
    ids = column.values.cast(pa.int32()).to_numpy()  # one array; documents are views of it
    offsets = column.offsets.to_pylist()
    return [ids[begin:end] for begin, end in itertools.pairwise(offsets)]


# ----------------------------------------------------------------------------- lines and plain text


def _in_batches(documents: Iterator[Document], row: int) -> Batches:
    while batch := list(itertools.islice(documents, BATCH_ROWS)):
        yield row, batch
        row += len(batch)
    yield row, []


def _read_jsonl(file: BinaryIO, address: str, start: int) -> Batches:
    """One document per line; an empty line is a document without content."""
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
    passed = sum(1 for _ in itertools.islice(lines, start))
    yield from _in_batches((parse_line(line, address, n) for n, line in enumerate(lines, passed + 1)), passed)
    lines.detach()


def parse_line(line: str, address: str, number: int, wanted: str | None = None, way_out: str = "rename one") -> str:
    """The text in a line of JSON, "" if there is none. Raises NanochatError, naming file and line."""
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise NanochatError(f"{address}, line {number}, is not JSON ({error.msg}): fix or remove it") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; deep nesting
        reason = str(error).partition(":")[0]
        raise NanochatError(f"{address}, line {number}, cannot be read ({reason}): fix or remove it") from error
    if not isinstance(row, dict):
        found, way_out = type(row).__name__, FOR_CHAT_SFT if isinstance(row, list) else "fix or remove it"
        raise NanochatError(f"{address}, line {number}, is a {found}, not an object with a text: {way_out}")
    column = text_column(f"{address}, line {number},", list(row), wanted, way_out)
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise NanochatError(f"{address}, line {number}, holds no text in {column} ({type(text).__name__}): fix or remove it")
    return as_unicode(text or "")


def _read_text(file: BinaryIO, address: str, start: int) -> Batches:
    lines = io.TextIOWrapper(file, encoding="utf-8-sig")  # skips the byte order mark
    documents = cut_into_documents(lines)
    passed = sum(1 for _ in itertools.islice(documents, start))
    yield from _in_batches(documents, passed)
    lines.detach()


def cut_into_documents(file: TextIO) -> Iterator[str]:
    """Plain text as documents of about TEXT_FILE_CHARS to LONGEST_TEXT_CHARS characters; the last may be shorter."""
    document: list[str] = []
    chars, rest = 0, ""
    while line := rest + file.readline(LONGEST_TEXT_CHARS):
        rest = ""
        if len(line) >= LONGEST_TEXT_CHARS and not line.endswith("\n"):  # all in one line
            end = line.rfind(" ") + 1 or len(line)
            line, rest = line[:end], line[end:]
        is_blank = not line.strip()
        if not (is_blank and chars >= TEXT_FILE_CHARS):
            document.append(line)
            chars += len(line)
        if rest or chars >= (TEXT_FILE_CHARS if is_blank else LONGEST_TEXT_CHARS):
            yield "".join(document)
            document, chars = [], 0
    yield "".join(document)


# By suffix: (file, its address for errors, first row) -> its documents from that row on
READERS: dict[str, Callable[[BinaryIO, str, int], Batches]] = {
    ".txt": _read_text, ".md": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet,
}  # fmt: skip

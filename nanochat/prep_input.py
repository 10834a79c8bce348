"""Finds and reads raw text for data preparation: files of any supported kind, compressed or not. Used by prep_steps.py and
scripts/data_prep.

Training reads with document_files.py, which can begin at any row; here every row is read once, from the first on.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import NanochatError, first_line, print0, some_of
from nanochat.document_files import (
    BATCH_ROWS,
    READERS,
    Batches,
    RemoteFile,
    cut_into_documents,
    is_text,
    parse_line,
    text_column,
)
from nanochat.files import not_utf8
from nanochat.listings import (
    COMPRESSIONS,
    VAL,
    filesystem_of,
    hint_at_hub,
    is_of_split,
    is_remote,
    list_local,
    list_remote,
    report_unread,
    without_strangers,
)
from nanochat.shard_cache import plain_path
from nanochat.tokenizer import Tokenizer

PLAIN = (".txt", ".md")
WAY_OUT = "name one with --text-column"


def reader_suffix(path: str) -> str | None:
    """The suffix that says how to read a file, less its compression; None for a file that is not read."""
    plain = PurePath(plain_path(path).name.lower())
    if plain.name.startswith("."):
        return None
    if plain.suffix in COMPRESSIONS:
        plain = plain.with_suffix("")
        if plain.suffix == ".parquet":  # parquet is compressed inside
            return None
        if plain.suffix == ".json":
            return ".jsonl"
    return plain.suffix if plain.suffix in READERS else None


def read_texts(file: Any, path: str, column: str | None) -> Iterator[str]:
    """The text of every row of an open file, "" if there is none. Raises NanochatError, naming the file."""
    kind = reader_suffix(path) or ".txt"
    try:
        if kind == ".parquet":
            texts = _read_parquet(file, path, column)
        else:
            compression = COMPRESSIONS.get(plain_path(path).suffix.lower())
            stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), compression) if compression else file
            if kind == ".jsonl":
                texts = _read_jsonl(io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n"), path, column)
            elif kind in PLAIN:
                texts = cut_into_documents(io.TextIOWrapper(stream, encoding="utf-8-sig"))
            elif column is not None:
                raise NanochatError(f"{path}: --text-column is for .jsonl and .parquet files: leave it out")
            else:
                texts = _read_other(stream, path, READERS[kind])
        yield from texts
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except (pa.ArrowException, OSError) as error:
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


def _read_other(file: Any, path: str, read: Callable[[Any, str, int], Batches]) -> Iterator[str]:
    for _, documents in read(file, path, 0):
        for document in documents:
            if not isinstance(document, str):
                raise NanochatError(f"{path} holds tokens, not text: give the text that they were made of")
            yield document


def _read_jsonl(lines: Iterable[str], path: str, column: str | None) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield parse_line(line, path, number, column, WAY_OUT)


# ----------------------------------------------------------------------------- what there is to read


def list_inputs(address: str) -> dict[str, int]:
    """{path: bytes} of the readable files at a local or remote address, sorted. Raises NanochatError if there are none.

    Beside others, files named for validation are left out: shuffled with the rest, they would be trained on.
    """
    found = list_remote(address) if is_remote(address) else list_local(address)
    if not found:
        raise NanochatError(
            f"--input {address} is no file, nor a folder or glob of files{hint_at_hub(address)}: check the path"
        )
    report_unread(found)
    paths = without_strangers([path for path in sorted(found) if reader_suffix(path.name)])
    val = {path for path in paths if is_of_split(VAL, path)}
    if 0 < len(val) < len(paths):
        print0(
            f"left out, as named for validation: {some_of([path.as_posix() for path in sorted(val)], 3)}; the shards hold out "
            "text of the other files (rename a file to prepare it with them)"
        )
        paths = [path for path in paths if path not in val]
    files = [found[path]() for path in paths]
    if not files:
        raise NanochatError(f"--input {address} holds no {', '.join(READERS)} file (all but .parquet also .gz, .zst)")
    if empty := [file for file in files if file.size == 0]:
        raise NanochatError(f"{empty[0].address} is empty: remove it or fill it")
    return {file.shard.path if isinstance(file, RemoteFile) else file.path.absolute().as_posix(): file.size for file in files}


def estimate_tokens(
    address: str, inputs: dict[str, int], column: str | None, tokenizer: Tokenizer | None, sample_bytes: int = 4_000_000
) -> int:
    """An estimate of the tokens in the files, from the first texts of about eight; without a tokenizer, 4 bytes per token."""
    fs = filesystem_of(address)
    text_bytes, tokens, token_bytes = 0.0, 0, 0
    sampled = list(inputs)[:: -(-len(inputs) // 8)]
    for path in sampled:
        texts, text_bytes_of_file = _sample(fs, path, inputs[path], column, sample_bytes)
        text_bytes += text_bytes_of_file
        part = "".join(texts)[:200_000]
        token_bytes += len(part.encode())
        tokens += len(tokenizer.encode(part)) if tokenizer else len(part.encode()) // 4
    expansion = text_bytes / max(1, sum(inputs[path] for path in sampled))
    return round(sum(inputs.values()) * expansion * tokens / max(1, token_bytes))


def _sample(fs: Any, path: str, size: int, column: str | None, sample_bytes: int) -> tuple[list[str], float]:
    """(first texts of a file, estimated bytes of text in the whole file)."""
    texts, text_bytes, share = [], 0, 1.0
    with fs.open(path, "rb") as file:
        reader = read_texts(file, path, column)
        for text in reader:
            texts.append(text)
            text_bytes += len(text.encode())
            if text_bytes >= sample_bytes:
                kind = reader_suffix(path)
                if kind == ".parquet":  # columns are not read from front to back
                    with fs.open(path, "rb") as again:
                        share = len(texts) / pq.read_metadata(again).num_rows
                elif kind == ".jsonl" or kind in PLAIN:
                    share = min(1.0, file.tell() / size)
                else:  # nobody knows how far its reader has read
                    share = text_bytes / size
                break
    return texts, text_bytes / share

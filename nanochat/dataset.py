"""Where documents come from. Every command that reads text takes `--data NAME|PATH` and asks `get_source` for it.

To add a source by name, write a class with a `prepare` that returns its files, and list it in SOURCES.
As a command it downloads: python -m nanochat.dataset --data climbmix -n 8
"""

from __future__ import annotations

import argparse
import concurrent.futures
import glob
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import NanochatError, get_base_dir, print0, run_command

VAL_SHARE = 0.02  # of the documents, by hash, where no file is named for validation
TEXT_FILE_CHARS = 4000  # a plain text file becomes documents of about this size, cut at blank lines
TEXT_COLUMNS = ("text", "content", "body")


class Source:
    """Documents in a fixed order, in two splits. Files named for validation are that split; else a hash decides."""

    name: str

    def __init__(self, train_files: list[Path], val_files: list[Path]) -> None:
        self.train_files, self.val_files = train_files, val_files

    def documents(self, split: str, start: int = 0, step: int = 1) -> Iterator[str]:
        """Documents number start, start + step, ... of a split ("train" or "val"): each rank's own part."""
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, not {split!r}")
        if self.val_files:
            files = self.train_files if split == "train" else self.val_files
            yield from itertools.islice(_read_files(files), start, None, step)
            return
        limit = self._hash_limit()
        in_split = (text for text in _read_files(self.train_files) if (_hash(text) < limit) == (split == "val"))
        yield from itertools.islice(in_split, start, None, step)

    def _hash_limit(self) -> int:
        """Documents with a lower hash are for validation; a small source gives at least its lowest one."""
        hashes = [_hash(text) for text in itertools.islice(_read_files(self.train_files), 1000)]
        if len(hashes) < 2:
            raise NanochatError(f"{self.name} holds a single document: add a file whose name says val for validation")
        return max(int(VAL_SHARE * 2**32), sorted(hashes)[0] + 1)

    def describe(self) -> dict[str, Any]:
        """What was read, for the record of a run: names and sizes of the files."""
        files = [*self.train_files, *self.val_files]
        return {"source": self.name, "files": {path.name: path.stat().st_size for path in files}}


class FileSource(Source):
    """A file, a folder or a glob of .txt, .md, .jsonl and .parquet files. Raises NanochatError if there are none."""

    READABLE = (".txt", ".md", ".jsonl", ".parquet")

    def __init__(self, path: str) -> None:
        self.name = path
        expanded = Path(path).expanduser()
        if expanded.is_dir():
            found = sorted(p for p in expanded.rglob("*") if p.is_file())
        else:
            found = sorted(map(Path, glob.glob(str(expanded), recursive=True)))
        if not found:
            raise NanochatError(f"--data {path} is neither {', '.join(SOURCES)} nor an existing file, folder or glob")
        files = [p for p in found if p.suffix.lower() in self.READABLE]
        if not files:
            raise NanochatError(f"--data {path} holds no {', '.join(self.READABLE)} file")
        empty = [p for p in files if p.stat().st_size == 0]
        if empty:
            raise NanochatError(f"{empty[0]} is empty: remove it or fill it")
        val = [p for p in files if re.search(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", p.stem.lower())]
        super().__init__([p for p in files if p not in val] or val, val if len(val) < len(files) else [])


class BuiltinSource(Source):
    """English prose from the Python installation itself; see builtin_corpus.py."""

    def __init__(self, name: str) -> None:
        from nanochat.builtin_corpus import harvest

        self.name = name
        self.directory = harvest(get_base_dir() / "data" / name)
        super().__init__([self.directory / "train.parquet"], [self.directory / "val.parquet"])

    def describe(self) -> dict[str, Any]:
        manifest = json.loads((self.directory / "manifest.json").read_text(encoding="utf-8"))
        return {"source": self.name, "files": manifest["files"]}


@dataclass(frozen=True)
class HubRepository:
    """A data set of numbered parquet shards on the Hugging Face hub; the last shard is for validation."""

    repo_id: str
    num_shards: int
    file_format: str = "shard_{:05d}.parquet"

    @property
    def val_file(self) -> str:
        return self.file_format.format(self.num_shards - 1)


HUB_REPOSITORIES = {
    "climbmix": HubRepository("karpathy/climbmix-400b-shuffle", 6543),
    "fineweb-edu": HubRepository("karpathy/fineweb-edu-100b-shuffle", 1823),
}


class HubSource(Source):
    """The shards of a hub data set that are on disk. Raises NanochatError if the pinned validation shard is missing."""

    def __init__(self, name: str) -> None:
        self.name = name
        repository = HUB_REPOSITORIES[name]
        directory = get_base_dir() / "data" / name
        files = sorted(directory.glob("*.parquet"))
        val = [path for path in files if path.name == repository.val_file]
        train = [path for path in files if path.name != repository.val_file]
        if not val or not train:
            what = "the validation shard " + repository.val_file if train else "no training shard"
            raise NanochatError(
                f"{what} {'is missing' if train else 'is'} in {directory}: run python -m nanochat.dataset --data {name} -n 8"
            )
        super().__init__(train, val)


SOURCES = {"builtin": BuiltinSource, "climbmix": HubSource, "fineweb-edu": HubSource}


def default_source_name() -> str:
    """What commands read when no --data is given: "climbmix" where it was downloaded, else "builtin", and says so."""
    if any((get_base_dir() / "data" / "climbmix").glob("*.parquet")):
        return "climbmix"
    print0(
        "reading the builtin text, since climbmix is not downloaded (python -m nanochat.dataset -n 8 fetches some of it, "
        "--data=PATH reads your own)"
    )
    return "builtin"


def get_source(name_or_path: str) -> Source:
    """The source of that name, made ready to read, or the files at that path. Raises NanochatError."""
    return SOURCES.get(name_or_path, FileSource)(name_or_path)


# ----------------------------------------------------------------------------- reading files


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "little")


def _read_files(files: list[Path]) -> Iterator[str]:
    """The documents of files, empty ones left out. Raises NanochatError, naming the file, for one that is damaged."""
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl}
    for path in files:
        try:
            yield from (text for text in readers.get(path.suffix.lower(), _read_text)(path) if text.strip())
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise NanochatError(f"{path} cannot be read ({str(error).splitlines()[0]}): remove or replace it") from error


def _text_column(path: Path, names: list[str]) -> str:
    for column in TEXT_COLUMNS:
        if column in names:
            return column
    raise NanochatError(f"{path} has no column {' or '.join(TEXT_COLUMNS)}, only {', '.join(names)}: rename one")


def _read_parquet(path: Path) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        column = _text_column(path, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def _read_jsonl(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise NanochatError(f"{path}, line {number}, is not JSON ({error.msg}): mend or remove it") from error
            if not isinstance(row, dict):
                raise NanochatError(f"{path}, line {number}, is not an object with a text")
            yield str(row[_text_column(path, list(row))])


def _read_text(path: Path) -> Iterator[str]:
    """A text file in documents of about TEXT_FILE_CHARS, cut at blank lines."""
    paragraphs: list[str] = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.strip() and sum(map(len, paragraphs)) >= TEXT_FILE_CHARS:
                yield "".join(paragraphs)
                paragraphs = []
            else:
                paragraphs.append(line)
    yield "".join(paragraphs)


# ----------------------------------------------------------------------------- downloading


def download(name: str, num_shards: int, workers: int = 4) -> None:
    """Fetch the first num_shards shards and the validation shard of a hub data set; whole files are not fetched again.

    huggingface_hub resumes and verifies the transfer. Raises NanochatError naming what could not be fetched.
    """
    repository = HUB_REPOSITORIES[name]
    directory = get_base_dir() / "data" / name
    num_shards = repository.num_shards - 1 if num_shards < 0 else min(num_shards, repository.num_shards - 1)
    names = [*(repository.file_format.format(i) for i in range(num_shards)), repository.val_file]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        failures = [failure for failure in pool.map(lambda n: _download_one(repository, n, directory), names) if failure]
    if failures:
        raise NanochatError(
            f"{len(failures)} of {len(names)} shards of {name} could not be fetched (first: {failures[0]}): "
            "run the same command again, it goes on where it stopped"
        )
    print(f"{len(names)} shards of {name} are in {directory}")


def _download_one(repository: HubRepository, file_name: str, directory: Path) -> str | None:
    """Fetch one shard; returns what went wrong, or None."""
    from huggingface_hub import hf_hub_download

    path = directory / file_name
    try:
        for force in (False, True):  # a file that came whole but does not open is fetched once more
            if force or not path.exists():
                hf_hub_download(repository.repo_id, file_name, repo_type="dataset", local_dir=directory, force_download=force)
            if _opens(path):
                print(f"{file_name}: {path.stat().st_size / 1e6:.1f} MB")
                return None
        path.unlink()
        return f"{file_name}: not a parquet file"
    except Exception as error:  # the hub library raises a dozen kinds, all with the same way out
        return f"{file_name}: {str(error).splitlines()[0]}"


def _opens(path: Path) -> bool:
    try:
        with pq.ParquetFile(path):
            return True
    except (pa.ArrowException, OSError):
        return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Download pretraining data.")
    parser.add_argument("--data", default="climbmix", choices=sorted(HUB_REPOSITORIES))
    parser.add_argument("-n", "--num-files", type=int, default=-1, help="training shards to fetch (-1: all)")
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="downloads at a time")
    args = parser.parse_args(argv)
    download(args.data, args.num_files, args.num_workers)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

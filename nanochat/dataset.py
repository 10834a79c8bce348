"""Where documents come from. Training and measuring take `--data NAME|PATH|ADDRESS` and ask `get_source`.

To add a source by name, write a subclass of Source that hands it its files, and list it in SOURCES; a data set on the hub is
a line in HUB_REPOSITORIES of hub_shards.py.
As a command it downloads: python -m nanochat.dataset --data climbmix -n 8
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

from nanochat.common import NanochatError, get_base_dir, print0, run_command, some_of
from nanochat.document_files import READERS, Batches, Document, DocumentFile, RemoteFile
from nanochat.files import hash_of_sample, read_json_object
from nanochat.hub_shards import HUB_REPOSITORIES, download, hub_files
from nanochat.listings import (
    COMPRESSIONS,
    VAL,
    Listing,
    hint_at_hub,
    is_of_split,
    is_remote,
    list_local,
    list_remote,
    report_unread,
    without_scheme,
    without_strangers,
)
from nanochat.prep_output import PREPARED
from nanochat.settings import SettingsParser
from nanochat.tokenizer import Tokenizer

VAL_SHARE = 0.02  # share of the documents, by hash, if no file is named for validation
FILES_AHEAD = 2  # remote files that are fetched while one is read
FOOTERS_AT_A_TIME = 16


class Source:
    """Documents in a fixed order, in two splits. Files named for validation form that split; otherwise a hash decides."""

    def __init__(self, name: str, train_files: Iterable[DocumentFile], val_files: Iterable[DocumentFile]) -> None:
        self.name, self.train_files, self.val_files = name, list(train_files), list(val_files)
        self.num_files_read = 0  # of the train files, so far
        self.counted_rows: dict[str, int] = {}  # by name, of the files that were passed
        self.samples: dict[str, str] = {}  # by name, for the record of a run: see `sample`
        self.changed: set[str] = set()  # names of the files that are not what they were when a resumed run counted

    def numbered(self, split: str, start: int = 0) -> Iterator[tuple[int, Document]]:
        """(number, document) of a split ("train" or "val") in ascending order, from number `start` on.

        Every row of the split's files has a number. Rows without content, and those that a hash puts into the other split,
        are skipped, so numbers have gaps and never depend on where reading began. Rows before `start` are skipped by
        metadata in parquet files; other files are read through, unless `know_rows` said how many they hold. Raises
        NanochatError for a damaged file.
        """
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, not {split!r}")
        files = self._files(split)
        limit = self.hash_limit
        for first, documents in self._batches(files, start):
            for number, document in enumerate(documents, first):
                if _has_content(document) and (limit is None or (_hash(document) < limit) == (split == "val")):
                    yield number, document

    def _files(self, split: str) -> list[DocumentFile]:
        return self.val_files if split == "val" and self.val_files else self.train_files

    def address(self, split: str, number: int) -> str:
        """The address of the file that holds the document with this number."""
        files = self._files(split)
        return files[self._file_with(files, number)[0]].address

    def know_rows(self, counted: dict[str, int]) -> None:
        """Take over `counted_rows`, so that reading can begin behind those files without reading them again."""
        counted = {name: rows for name, rows in counted.items() if name not in self.changed}
        self.counted_rows.update(counted)
        for file in (*self.train_files, *self.val_files):
            file.counted_rows = counted.get(file.name, file.counted_rows)

    def documents(self, split: str) -> Iterator[str]:
        """The texts of a split. Raises NanochatError if the source holds tokens."""
        if self.tokenizer_fingerprint is not None:
            raise NanochatError(f"the shards of {self.name} hold tokens, and this command needs text: give it the text")
        for _, text in self.numbered(split):
            yield str(text)

    def holds(self, num_tokens: float, tokenizer: Tokenizer) -> bool:
        """Whether the training documents have about that many tokens. Reads only as far as necessary."""
        first = [document for _, document in itertools.islice(self.numbered("train"), 100)]
        sample = "".join(text for text in first if isinstance(text, str))[:1_000_000]
        bytes_per_token = len(sample.encode()) / len(tokenizer.encode(sample)) if sample else 4.0
        # A parquet file is compressed; a line of JSON may hold much besides the text, but hardly ten times as much.
        least = (file.size // 10 if file.suffix == ".jsonl" else file.size for file in self.train_files)
        if sum(least) >= num_tokens * bytes_per_token:
            return True
        tokens = 0.0
        for _, document in self.numbered("train"):
            tokens += len(document.encode()) / bytes_per_token if isinstance(document, str) else len(document)
            if tokens >= num_tokens:
                return True
        return False

    def check_validation(self) -> None:
        """Raise NanochatError if there is nothing to validate on, which would show only when a run first validates."""
        if next(self.numbered("val"), None) is None:
            raise NanochatError(f"{self.name} has no val document: give more text")

    def check_tokens(self, tokenizer: Tokenizer) -> None:
        """Raise NanochatError if the files hold tokens of another tokenizer."""
        found = self.tokenizer_fingerprint
        if found is not None and found != tokenizer.fingerprint():
            raise NanochatError(
                f"{self.name} holds tokens of another tokenizer ({found[:12]}, not {tokenizer.fingerprint()[:12]}): give "
                "the tokenizer that made them, or the text itself"
            )

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str | None:
        """The fingerprint of the tokenizer that made this source's tokens; None if it holds text. Raises NanochatError."""
        fingerprint = self.train_files[0].footer().tokenizer
        for file in self.val_files[:1]:
            _check_kind(file, fingerprint)
        return fingerprint

    def _batches(self, files: list[DocumentFile], start: int) -> Batches:
        fingerprint = self.tokenizer_fingerprint
        begin, first = self._file_with(files, start) if start else (0, 0)
        for index, file in enumerate(files[begin:], begin):
            file.fetch(following=files[index + 1 : index + 1 + FILES_AHEAD])
            _check_kind(file, fingerprint)
            if files is self.train_files:
                self.num_files_read = max(self.num_files_read, index + 1)
            for row, documents in file.batches(max(0, start - first)):
                yield first + row, documents
            first += self._num_rows(file)

    def _file_with(self, files: list[DocumentFile], start: int) -> tuple[int, int]:
        """(index of the file that has row `start`, number of its first row)."""
        first = 0
        with concurrent.futures.ThreadPoolExecutor(FOOTERS_AT_A_TIME) as pool:
            for index, file in enumerate(files):
                if index % FOOTERS_AT_A_TIME == 0:
                    list(pool.map(DocumentFile.footer, files[index : index + FOOTERS_AT_A_TIME]))
                if first + self._num_rows(file) > start:
                    return index, first
                first += self._num_rows(file)
        return len(files), first

    def _num_rows(self, file: DocumentFile) -> int:
        rows = self.counted_rows[file.name] = file.num_rows()
        return rows

    @functools.cached_property
    def hash_limit(self) -> int | None:
        """Documents with a lower hash are for validation, at least one; None if there are files for validation."""
        if self.val_files:
            return None
        documents = itertools.chain.from_iterable(batch for _, batch in self._batches(self.train_files, 0))
        hashes = {_hash(document) for document in itertools.islice(filter(_has_content, documents), 1000)}
        if not hashes:
            raise NanochatError(f"{self.name} holds no text: give other files")
        if len(hashes) == 1:  # even if it occurs a thousand times
            raise NanochatError(f"{self.name} holds a single document: add a file whose name says val for validation")
        return max(int(VAL_SHARE * 2**32), min(hashes) + 1)

    def keep_split(self, recorded: dict[str, Any]) -> None:
        """Hold out what a run held out, whatever files came or went since; recorded: what `describe` returned then.

        Raises NanochatError if files for validation are gone, or came though a hash had decided.
        """
        limit = recorded["hash_limit"]
        if limit is None and not self.val_files:
            raise NanochatError(f"the validation files that the run holds out are gone from {self.name}: restore them")
        if limit is not None and self.val_files:
            raise NanochatError(
                f"{self.val_files[0].name} of {self.name} is for validation and came after the run began, which holds out "
                "other text: move it away"
            )
        self.hash_limit = limit

    def describe(self) -> dict[str, Any]:
        """A description for the record of a run: names and sizes of the files, as listed, and how they are split."""
        files = {file.name: file.size for file in (*self.train_files, *self.val_files)}
        return {"source": self.name, "files": files, "samples": self.samples, "hash_limit": self.hash_limit}

    def sample(self) -> dict[str, str]:
        """A hash of parts of each local file, by name: text may be edited and keep its size. Raises OSError."""
        files = [file for file in (*self.train_files, *self.val_files) if not isinstance(file, RemoteFile)]
        with concurrent.futures.ThreadPoolExecutor(FOOTERS_AT_A_TIME) as pool:
            hashes = pool.map(lambda file: hash_of_sample(file.path), files)
            return {file.name: found for file, found in zip(files, hashes, strict=True)}

    def sizes(self) -> dict[str, Any]:
        """What `ranks.compare_ranks` compares, so that all machines read the same files."""
        return {f"the size in bytes or SHA-256 of {name}": value for name, value in self.describe()["files"].items()}


def _has_content(document: Document) -> bool:
    return len(document) > 0 and not (isinstance(document, str) and document.isspace())


def _hash(document: Document) -> int:
    data = document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document.tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def _check_kind(file: DocumentFile, fingerprint: str | None) -> None:
    """Raises NanochatError unless the file holds the same as the first one: texts, or this tokenizer's tokens."""
    found = file.footer().tokenizer
    if found != fingerprint:
        holds = ["texts" if f is None else f"tokens of the tokenizer {f}" for f in (found, fingerprint)]
        raise NanochatError(f"{file.address} holds {holds[0]}, but the first file holds {holds[1]}: keep them in two folders")


class FileSource(Source):
    """Files that exist: a file, a folder or a glob, on this machine or at an fsspec address (hf://, s3://, https://, ...).

    Raises NanochatError if there are none that can be read.
    """

    def __init__(self, path: str) -> None:
        address = path if is_remote(path) else _absolute(path)
        found = list_remote(path) if is_remote(path) else list_local(path)
        if not found and not is_remote(path) and os.path.isdir(address):
            raise NanochatError(f"--data {path} is a folder without files (hidden ones do not count): put text into it")
        if not found:
            raise NanochatError(
                f"--data {path} is neither {', '.join(SOURCES)} nor an existing file, folder or glob{hint_at_hub(path)}"
            )
        names = [name for name in sorted(found) if name.suffix.lower() in READERS]
        files = {name: found[name]() for name in without_strangers(names)}
        if not files and os.path.isfile(address):
            raise NanochatError(f"--data {path} is no {', '.join(READERS)} file: convert it to one of these")
        compressed = [name.as_posix() for name in sorted(found) if name.suffix.lower() in COMPRESSIONS]
        way_out = f"{some_of(compressed)}; scripts.data_prep makes what training reads of it"
        ours = _check_prepared(path, found, files)
        report_unread(name for name in found if not ours.intersection((name, *name.parents)))
        if not files:
            raise NanochatError(
                f"--data {path} holds no {', '.join(READERS)} file" + (f", but {way_out}" if compressed else "")
            )
        if compressed:
            print0(f"not read: {way_out}")
        for file in files.values():
            if file.size == 0:
                raise NanochatError(f"{file.address} is empty: remove it or fill it")
        val = [file for name, file in files.items() if is_of_split(VAL, name)]
        train = [file for name, file in files.items() if not is_of_split(VAL, name)]
        super().__init__(address, train or val, val if train else [])


def _check_prepared(path: str, found: Listing, files: dict[PurePath, DocumentFile]) -> set[PurePath]:
    """What scripts.data_prep wrote besides shards. Raises NanochatError if an output is not finished, or lacks shards.

    files: those of `found` that are read.
    """
    ours: set[PurePath] = set()
    for name in [name for name in found if name.name == "settings.json"]:
        folder = name.parent
        if not _json_object(found[name]()).keys() >= PREPARED:
            continue  # somebody else's
        ours |= {folder / part for part in ("work", "settings.json", "manifest.json", "tokenizer.json")}
        if folder / "manifest.json" not in found:
            raise NanochatError(
                f"--data {path} holds an unfinished output of scripts.data_prep ({name} without manifest.json): "
                "give its command again and wait until it ends"
            )
        shards = _json_object(found[folder / "manifest.json"]()).get("shards", {})
        if missing := [shard for shard in shards if folder / shard not in found]:
            raise NanochatError(
                f"--data {path} lacks {len(missing)} of {len(shards)} shards that its manifest.json names (first: "
                f"{missing[0]}): restore them, or prepare the text in another folder"
            )
        for shard, written in shards.items():
            file = files.get(folder / shard)
            if file is not None and file.size != written["bytes"]:  # else noticed only when training comes to it
                raise NanochatError(
                    f"{file.address} has {file.size} bytes, and had {written['bytes']} when scripts.data_prep wrote it: "
                    "restore it, or prepare the text in another folder"
                )
    return ours


def _json_object(file: DocumentFile) -> dict[str, Any]:
    """The object in a JSON file, near or far; an empty one where there is none."""
    file.fetch()
    with file.errors_named(), file.open_bytes() as stream:
        data = stream.read()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _absolute(path: str) -> str:
    """An absolute path for the record, so that a later command in another folder finds the files. Raises NanochatError."""
    path = os.path.join(os.getcwd(), os.path.expanduser(without_scheme(path)))
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise NanochatError(f"--data {path!r} has a name that is not valid text: rename it") from error
    return path


class BuiltinSource(Source):
    """English prose from the Python installation itself; see builtin_corpus.py."""

    def __init__(self, name: str) -> None:
        from nanochat.builtin_corpus import harvest

        self.directory = harvest(get_base_dir() / "data" / name)
        super().__init__(name, *([DocumentFile(self.directory / f"{split}.parquet")] for split in ("train", "val")))

    def describe(self) -> dict[str, Any]:
        from nanochat.builtin_corpus import MANIFEST_FILE

        manifest = read_json_object(self.directory / MANIFEST_FILE)
        return {"source": self.name, "files": manifest["files"], "hash_limit": None}


class HubSource(Source):
    """The shards of a hub data set that are on disk. Raises NanochatError if the pinned validation shard is missing."""

    def __init__(self, name: str) -> None:
        repository = HUB_REPOSITORIES[name]
        directory, files = hub_files(name)
        val = [path for path in files if path.name == repository.val_file]
        train = [path for path in files if path.name != repository.val_file]
        if not val or not train:
            what = f"the validation shard {repository.val_file}" if train else "every training shard"
            raise NanochatError(f"{what} is missing in {directory}: run python -m nanochat.dataset --data {name} -n 8")
        super().__init__(name, map(DocumentFile, train), map(DocumentFile, val))


SOURCES: dict[str, Callable[[str], Source]] = {"builtin": BuiltinSource, **dict.fromkeys(HUB_REPOSITORIES, HubSource)}
DATA_HELP = f"{', '.join(SOURCES)}, or a path, glob or address of files (default: climbmix if downloaded, else builtin)"


def default_source_name() -> str:
    """The data without --data: "climbmix" if it was downloaded, else "builtin", which is reported."""
    if hub_files("climbmix")[1]:
        return "climbmix"
    print0(
        "reading the builtin text, since climbmix is not downloaded (python -m nanochat.dataset -n 8 fetches some of it, "
        "--data=PATH reads your own)"
    )
    return "builtin"


def get_source(name_or_path: str) -> Source:
    """The source of that name, made ready to read, or the files at that path or address. Raises NanochatError."""
    if not name_or_path.strip():  # not read as the current folder
        raise NanochatError("--data is empty, as from a variable that is not set: name a text, or leave --data out")
    return SOURCES.get(name_or_path, FileSource)(name_or_path)


def main(argv: list[str] | None = None) -> int:
    parser = SettingsParser("Download pretraining data.", examples=["%(prog)s -n 8", "%(prog)s --data fineweb-edu -n 4"])
    parser.add_argument("--data", default="climbmix", choices=sorted(HUB_REPOSITORIES), help="what to download")
    parser.add_argument("-n", "--num-files", type=int, default=-1, help="training shards to fetch (default: all)")
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="downloads at a time")
    args = parser.parse_args(argv)
    download(args.data, args.num_files, args.num_workers)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

"""The `builtin` corpus: English prose from the Python installation itself, so that a first model needs no download.

Docstrings of the standard library and of the installed packages, and the language reference of `pydoc`, found by parsing
the source files (nothing is imported), cleaned, deduplicated and split by hash. Used by dataset.py.
"""

from __future__ import annotations

import ast
import concurrent.futures
import gc
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from nanochat.common import NanochatError
from nanochat.cpu import usable_cores
from nanochat.files import atomic_write, read_json_object, sha256_of, written_whole
from nanochat.progress import Progress

HARVEST_VERSION = 1  # part of the manifest; increase it when the rules below change, to rebuild the corpus
MANIFEST_FILE, FILES = "manifest.json", ("train.parquet", "val.parquet", "summaries.jsonl")
VAL_SHARE = 0.02
MIN_CHARS = 120  # shorter documents teach little
MAX_CHARS = 20_000_000  # a demo needs no more
SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "__pycache__", "_vendor", "site-packages"}
COMMON_WORDS = frozenset(
    "the a an of to is are in and or for if be that this it by on with as not from can will when which used at has have "
    "you was all but may should must any one each than then so".split()
)


def harvest(directory: Path) -> Path:
    """Write train.parquet, val.parquet, summaries.jsonl and manifest.json into a directory, unless they are there.

    The manifest records the versions harvested from. Runs read a corpus, so it stays the same whatever is installed later;
    delete its folder to rebuild it. Returns the directory. 265 MB of installed packages take half a minute on two cores.
    """
    if not _is_intact(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_suffix(".lock")):  # each rank asks for it, and one that parses needs all cores
            if not _is_intact(directory):
                _harvest(directory)
    return directory


def _harvest(directory: Path) -> None:
    documents, summaries = _collect()
    if not documents:
        raise NanochatError("no prose was found in this Python installation: give your own text with --data PATH")
    directory.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for text in documents:
        splits["val" if _is_val(text) else "train"].append(text)
    for split, texts in splits.items():
        with written_whole(directory / f"{split}.parquet") as temporary:  # several machines may share the folder
            pq.write_table(pa.table({"text": texts}), temporary, row_group_size=1024)
    atomic_write(directory / "summaries.jsonl", "".join(json.dumps(pair) + "\n" for pair in summaries))
    manifest = {
        "harvest_version": HARVEST_VERSION,
        "versions": installed_versions(),
        "documents": {split: len(texts) for split, texts in splits.items()},
        "characters": {split: sum(map(len, texts)) for split, texts in splits.items()},
        "files": {name: sha256_of(directory / name) for name in FILES},
    }
    atomic_write(directory / MANIFEST_FILE, json.dumps(manifest, indent=2))


def installed_versions() -> dict[str, str]:
    """The versions of Python and of every installed package."""
    found = {dist.metadata["Name"] or "?": dist.version for dist in importlib.metadata.distributions()}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def _is_intact(directory: Path) -> bool:
    """Whether a harvest by the current rules is there and undamaged, including its manifest."""
    try:
        manifest = read_json_object(directory / MANIFEST_FILE)
        found = {name: sha256_of(directory / name) for name in FILES}
    except (NanochatError, OSError):
        return False
    return manifest.get("files") == found and manifest.get("harvest_version") == HARVEST_VERSION


def _is_val(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:4], "little") < VAL_SHARE * 2**32


# ----------------------------------------------------------------------------- collecting


def _collect() -> tuple[list[str], list[tuple[str, str]]]:
    """(documents in a fixed order without repetitions, (name, first sentence) of the standard library's functions)."""
    files = list(find_source_files())
    documents: list[str] = [text for text in map(clean, _reference_topics()) if text]
    summaries: list[tuple[str, str]] = []
    chunks = [files[i : i + 64] for i in range(0, len(files), 64)]
    # Workers only parse text, so forking is safe, and saves each of them the import of torch; but macOS ends forked processes
    # that touch its frameworks.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = usable_cores() if sys.platform == "linux" else min(4, usable_cores())  # a spawned one imports torch: gigabytes
    # Syntax trees have no cycles; looking for them takes longer than parsing.
    with (
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=gc.disable) as pool,
        Progress("collecting the builtin text", len(chunks), unit="part") as progress,
    ):
        for found, pairs in progress.watch(pool.map(_parse_files, chunks)):
            documents += found
            summaries += pairs
    unique, seen, size = [], set(), 0
    for text in documents:
        key = hashlib.sha256(re.sub(r"\W+", " ", text.lower()).encode("utf-8")).digest()
        if key not in seen and size < MAX_CHARS:
            seen.add(key)
            unique.append(text)
            size += len(text)
    # Sort by hash, so that neighbours in a package are not neighbours in a batch.
    unique.sort(key=lambda text: hashlib.sha256(text.encode("utf-8")).digest())
    return unique, sorted(dict(summaries).items())


def find_source_files() -> Iterator[tuple[str, str]]:
    """(path, module name, or "" outside the standard library) of the Python files to read, in a fixed order."""
    paths = sysconfig.get_paths()
    packages = sorted({paths["purelib"], paths["platlib"]})
    for root in (paths["stdlib"], *packages):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
            for name in sorted(names):
                if name.endswith(".py") and not name.startswith("test_"):
                    path = Path(folder, name)
                    module = ""
                    if root == paths["stdlib"]:
                        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
                    yield str(path), module


def _reference_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return [topics[name] for name in sorted(topics)]


def _parse_files(files: list[tuple[str, str]]) -> tuple[list[str], list[tuple[str, str]]]:
    """Cleaned docstrings of files, and (qualified name, first sentence) where the module's name is given."""
    documents, summaries = [], []
    for path, module in files:
        try:
            source = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # the corpus does without this file
        if '"""' not in source and "'''" not in source:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            continue  # templates and files for other versions of Python
        for name, docstring in _docstrings(tree):
            if text := clean(docstring):
                documents.append(text)
                if module and name and (sentence := first_sentence(docstring)):
                    summaries.append((f"{module}.{name}", sentence))
    return documents, summaries


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, or "" if nested or private; docstring) of the module, its classes and functions."""
    if docstring := ast.get_docstring(tree, clean=False):
        yield "", docstring
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    pending: list[ast.AST] = list(tree.body)
    top_level = set(pending)
    while pending:
        node = pending.pop()
        if isinstance(node, definitions) and (docstring := ast.get_docstring(node, clean=False)):
            public = node in top_level and not node.name.startswith("_")
            yield (node.name if public else ""), docstring
        for block in ("body", "orelse", "handlers", "finalbody"):  # only statements: expressions define nothing
            pending += getattr(node, block, ())


# ----------------------------------------------------------------------------- cleaning


def clean(docstring: str) -> str:
    """The prose of a docstring: paragraphs that read as English, markup removed; "" if too little is left."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        text = _plain(paragraph)
        if _is_prose(text):
            paragraphs.append(text)
    text = "\n\n".join(paragraphs)
    return text if len(text) >= MIN_CHARS else ""


def _plain(paragraph: str) -> str:
    """A paragraph on one line, without reStructuredText marks."""
    paragraph = re.sub(r":[a-zA-Z:]+:`~?\.?([^`<]*?)\s*(<[^`>]*>)?`", r"\1", paragraph)
    paragraph = re.sub(r"`+([^`]*?)\s*(<[^`>]*>)?`+_{0,2}", r"\1", paragraph)
    paragraph = re.sub(r"(?<!\w)\*{1,2}([^*\s][^*]*)\*{1,2}(?!\w)", r"\1", paragraph)
    return re.sub(r"\s+", " ", paragraph).strip().removesuffix("::")


def _is_prose(text: str) -> bool:
    """Whether a paragraph reads as English sentences rather than code, tables or lists of parameters."""
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < 8 or ">>>" in text or text.startswith((".. ", ":", "|", "+-", "#", "@")):
        return False
    if sum(c.isalpha() or c.isspace() for c in text) < 0.86 * len(text) or not text[0].isupper():
        return False
    if sum(word.lower() in COMMON_WORDS for word in words) < 0.2 * len(words):
        return False
    return text[-1] in ".!?:)" and not re.search(r"[=_{}\[\]<>|\\]{2}|--|\w+\(\w*=|\.\. ", text)


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring if it is a whole and simple one, else ""."""
    paragraph = _plain(re.split(r"\n\s*\n", inspect.cleandoc(docstring))[0])
    match = re.match(r"[A-Z][a-z]+ [^.!?]{15,160}\.(?=\s|$)", paragraph)
    if not match or re.search(r"[=\[\]{}<>\\|>]|->|e\.g|i\.e", match[0]):
        return ""
    return match[0]

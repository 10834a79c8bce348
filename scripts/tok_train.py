"""Train a tokenizer: python -m scripts.tok_train --vocab-size=32768."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.common import NanochatError, run_command
from nanochat.dataset import DATA_HELP, Source, default_source_name, get_source
from nanochat.files import atomic_write, read_json_object
from nanochat.progress import Progress
from nanochat.settings import Arguments, SettingsParser
from nanochat.tokenizer import FILE_NAME, Tokenizer, get_tokenizer_dir


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser("Train a tokenizer.", examples=["%(prog)s --data builtin --vocab-size 4096 --tokenizer small"])
    parser.add_argument("--data", default=None, metavar="NAME|PATH", help=DATA_HELP)
    parser.add_argument("--tokenizer", default="default", metavar="NAME|PATH", help="where to keep it")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="stop reading after this many")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters to use of one document")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens, including the special ones")
    parser.add_argument("--force", action="store_true", help="train even if the same tokenizer exists already")
    args = parser.parse_args(argv)
    args.require_positive("max_chars", "doc_cap")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.data = default_source_name() if args.data is None else args.data
    source = get_source(args.data)
    directory = get_tokenizer_dir(args.tokenizer)
    if not args.force and _is_done(directory, args, source):
        print(f"{directory / FILE_NAME} is there already, trained on files of the same names and sizes (--force: once more)")
        return 0
    try:
        directory.mkdir(parents=True, exist_ok=True)  # before the text is read, which may take long
    except (FileExistsError, NotADirectoryError):
        raise NanochatError(f"--tokenizer {args.tokenizer}: {directory} is no folder: give another name") from None
    started = time.perf_counter()
    counts = {"documents": 0, "characters": 0}
    with Progress("reading text", total=None, unit="document") as progress:
        tokenizer = Tokenizer.train(_texts(source, args.max_chars, args.doc_cap, counts, progress), args.vocab_size)
    if counts["characters"] == 0:  # keep an existing tokenizer
        raise NanochatError(f"{source.name} has no train document with text: give more text")
    seconds = time.perf_counter() - started
    path = tokenizer.save(directory)
    recipe = _recipe(args, source, source.num_files_read)
    meta = {"recipe": recipe, **counts, "seconds": round(seconds, 2), "fingerprint": tokenizer.fingerprint()}
    atomic_write(directory / "meta.json", json.dumps(meta, indent=2))
    if tokenizer.get_vocab_size() < args.vocab_size:
        print(f"the text is too short for --vocab-size {args.vocab_size}: it has pairs for fewer tokens")
    print(
        f"{tokenizer.get_vocab_size():,} tokens from {counts['characters']:,} characters of {counts['documents']:,} "
        f"documents in {seconds:.1f} s: {path}"
    )
    return 0


def _recipe(args: Arguments, source: Source, num_files: int) -> dict[str, Any]:
    """Everything that decides the tokenizer; of the text, only the first files, which were read."""
    return {
        "source": source.name,
        "files": [[file.name, file.size] for file in source.train_files[:num_files]],
        "split_by_hash": not source.val_files,
        "max_chars": args.max_chars,
        "doc_cap": args.doc_cap,
        "vocab_size": args.vocab_size,
    }


def _is_done(directory: Path, args: Arguments, source: Source) -> bool:
    """Whether the same text would be read again. If --max-chars ended the reading, later files do not matter."""
    path = directory / "meta.json"
    if not path.exists() or not (directory / FILE_NAME).exists():
        return False
    try:
        tokenizer = Tokenizer.load(directory)
        meta = read_json_object(path)
        recipe = meta["recipe"]
        num_files = len(recipe["files"]) if meta["characters"] >= args.max_chars else len(source.train_files)
        return recipe == _recipe(args, source, num_files) and meta["fingerprint"] == tokenizer.fingerprint()
    except (NanochatError, LookupError, TypeError):
        print(f"what is in {directory} is damaged or from an older version: training again")
        return False


def _texts(source: Source, max_chars: int, doc_cap: int, counts: dict[str, int], progress: Progress) -> Iterator[str]:
    """The source's training documents, each cut to doc_cap, until max_chars are read; counts what it yields."""
    for text in source.documents("train"):
        text = text[:doc_cap]
        counts["documents"] += 1
        counts["characters"] += len(text)
        progress.update(counts["documents"], f"characters {counts['characters']:,}")
        yield text
        if counts["characters"] >= max_chars:
            break
    progress.print(f"{counts['characters']:,} characters read: learning tokens")


if __name__ == "__main__":
    sys.exit(run_command(main))

"""The folder that scripts/data_prep fills: what determines its shards, where its files are, and who is at work on it.

Used by that script, prep_steps.py, prep_stages.py and dataset.py. It does without datatrove, so that the script can say what
is missing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import NanochatError
from nanochat.files import atomic_write, locked

MAX_JOBS = 1000  # in a Slurm array; most clusters allow 1001
PREPARED = {"num_shards", "shard_tokens"}  # only a settings.json of ours has these


@dataclass(frozen=True)
class PrepSettings:
    """Everything that determines the shards; saved as settings.json in the output."""

    input: str
    inputs: dict[str, int]  # the files, in the order in which they are read, and their bytes
    text_column: str | None  # None: the first of TEXT_COLUMNS
    tokenizer: str | None  # its fingerprint; None: shards of text
    seed: int
    val_documents: int | None  # None: VAL_SHARE of them, at most MAX_VAL_DOCUMENTS
    shard_tokens: int
    num_shards: int
    dedup: bool
    min_hash: bool
    tasks: int


class OutputLayout:
    """The layout of an output directory; everything except the shards and three JSON files is below work/."""

    def __init__(self, output: Path) -> None:
        self.output, self.settings, self.manifest = output, output / "settings.json", output / "manifest.json"
        self.val_limit = output / "work" / "val_limit"
        self.scratch = output / "work" / "scratch"  # removed at the end
        self.runs, self.lowest = self.scratch / "runs", self.scratch / "lowest"

    def log(self, stage: str) -> Path:
        return self.output / "work" / "log" / stage

    def counts(self, stage: str) -> list[dict[str, int]]:
        """The counts of each task of a stage, from datatrove's statistics; {} for tasks that counted nothing."""
        counts = []
        for path in sorted((self.log(stage) / "stats").glob("*.json")):
            steps = [step["stats"] for step in json.loads(path.read_text(encoding="utf-8"))]
            items = itertools.chain.from_iterable(step.items() for step in steps)
            counts.append({name: int(value["total"] if isinstance(value, dict) else value) for name, value in items})
        return counts


@contextlib.contextmanager
def lock_output(layout: OutputLayout) -> Iterator[None]:
    """While this lasts no other command may prepare this output here; the system ends it with the process.

    Two would write, and clean up, each other's files. Raises NanochatError if another process is at it.
    """
    folder = layout.output / "work"
    owner = folder / "owner"
    who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
    busy = f"{layout.output} is being prepared by {who}: wait for it, stop it, or choose another --output"
    with locked(folder / ".lock", busy):
        atomic_write(owner, f"process {os.getpid()} on {platform.node()}")
        yield


def describe_output(layout: OutputLayout) -> str:
    """What a complete output holds. Raises NanochatError if a shard is missing."""
    manifest = json.loads(layout.manifest.read_text(encoding="utf-8"))
    missing = [name for name in manifest["shards"] if not (layout.output / name).exists()]
    if missing:
        raise NanochatError(f"{missing[0]} is missing in {layout.output}, which was complete: prepare it in another --output")
    counts = manifest["counts"]
    tokens = counts["train_tokens"] + counts["val_tokens"]
    return (
        f"{counts['train_documents']:,} documents to train on and {counts['val_documents']:,} for validation"
        f"{f', {tokens:,} tokens,' if tokens else ''} in {len(manifest['shards'])} shards; left out: {counts['empty']:,} "
        f"empty, {counts['duplicates']:,} duplicates, {counts['near_duplicates']:,} near-duplicates"
    )

"""How fast raw text becomes shards: python -m benchmarks.data_prep [--megabytes 60]

Runs scripts.data_prep on the text below NANOCHAT_TEST_DATA, repeated until there is enough, with one task and with two,
without and with --min-hash. The comparison is tiktoken encoding the same text with as many threads, the least possible work.
Each copy of the text has its own letter after every fourth word, so that no copy is dropped as a (near-)duplicate.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import print_result, real_data
from nanochat.common import run_command
from nanochat.dataset import get_source
from nanochat.tokenizer import Tokenizer
from scripts import data_prep

FILES = 4
FOUR_WORDS = re.compile(r"(?:\S+\s+){4}")


def repeat_texts(texts: list[str], megabytes: float) -> list[str]:
    """The texts, and copies of them that share no sequence of five words, `megabytes` in all."""
    result: list[str] = []
    size = 0
    for copy, text in ((copy, text) for copy in itertools.count() for text in texts):
        result.append(FOUR_WORDS.sub(rf"\g<0>{chr(97 + copy)} ", text) if copy else text)
        size += len(result[-1].encode())
        if size >= 1e6 * megabytes:
            break
    return result


def measure(folder: Path, tasks: int, *flags: str) -> tuple[float, dict[str, int]]:
    """(seconds, what the manifest counts) of one preparation."""
    output = folder / "-".join([f"output{tasks}", *flags])
    arguments = [f"--input={folder / 'input'}", f"--output={output}", f"--tokenizer={folder}", "--shard-tokens=2000000"]
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        data_prep.main([*arguments, f"--tasks={tasks}", f"--workers={tasks}", *flags])
    seconds = time.perf_counter() - started
    return seconds, json.loads((output / "manifest.json").read_text(encoding="utf-8"))["counts"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure data preparation.")
    parser.add_argument("--megabytes", type=float, default=60.0)
    parser.add_argument("--vocab-size", type=int, default=32768)
    args = parser.parse_args(argv)
    originals = list(get_source(str(real_data("pretrain"))).documents("train"))
    texts = repeat_texts(originals, args.megabytes)
    text_mb = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer.train(iter(originals), args.vocab_size)
    result: dict[str, float | int] = {"cores": os.cpu_count() or 1, "documents": len(texts), "text_mb": round(text_mb, 1)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer.save(folder)
        (folder / "input").mkdir()
        for number in range(FILES):
            pq.write_table(pa.table({"text": texts[number::FILES]}), folder / "input" / f"{number}.parquet")
        for tasks in (1, 2):
            started = time.perf_counter()
            tokens = sum(len(ids) for ids in tokenizer.encode(texts, num_threads=tasks))
            bare = time.perf_counter() - started
            result |= {
                f"tiktoken_{tasks}_tokens_per_s": round(tokens / bare),
                f"tiktoken_{tasks}_mb_per_s": round(text_mb / bare, 2),
            }
            for name, flags in (("prep", []), ("min_hash", ["--min-hash"])):
                seconds, counts = measure(folder, tasks, *flags)
                written = counts["train_tokens"] + counts["val_tokens"]
                result |= {
                    f"{name}_{tasks}_seconds": round(seconds, 1),
                    f"{name}_{tasks}_mb_per_s": round(text_mb / seconds, 2),
                    f"{name}_{tasks}_tokens_per_s": round(written / seconds),
                    f"{name}_{tasks}_share_of_tiktoken": round(bare / seconds, 3),
                    f"{name}_{tasks}_dropped": counts["duplicates"] + counts["near_duplicates"],
                }
    print_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

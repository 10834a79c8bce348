"""Compare a tokenizer's compression with GPT-2's and GPT-4's: python -m scripts.tok_eval.

Those two are shown if tiktoken has them cached. Nothing is downloaded; a line says how to fetch what is missing.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import tiktoken

from nanochat.common import run_command
from nanochat.dataset import Source, get_source
from nanochat.settings import SettingsParser
from nanochat.tables import print_table
from nanochat.tokenizer import encode_ordinary, get_tokenizer

OPENAI = "https://openaipublic.blob.core.windows.net/"
PEERS = {  # encoding: (its name here, the files that tiktoken fetches for it)
    "gpt2": ("GPT-2", ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json")),
    "cl100k_base": ("GPT-4", ("encodings/cl100k_base.tiktoken",)),
}
TEXTS = {
    "news": (
        "The city council voted on Tuesday to reopen the old ferry line across the harbour, eleven years after the last "
        "boat was sold. Supporters said that the crossing, which takes nine minutes, would spare commuters a forty-minute "
        "drive; opponents warned that the pier alone would cost $18.5 million. “We have waited long enough,” said the "
        "mayor, who lives on the northern shore. A first timetable is expected in spring, once the tide gauges have been "
        "replaced and three captains have passed their examinations."
    ),
    "code": (
        "def merge_intervals(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:\n"
        '    """Join the intervals that touch."""\n'
        "    merged: list[tuple[int, int]] = []\n"
        "    for begin, end in sorted(intervals):\n"
        "        if merged and begin <= merged[-1][1]:\n"
        "            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))\n"
        "        else:\n"
        "            merged.append((begin, end))\n"
        "    return merged\n\n\n"
        "for (int i = 0; i < count; ++i) { total += values[i] * 0x1F; }\n"
    ),
    "maths": (
        "Let $f(x) = \\frac{x^3 - 6x + 4}{x - 2}$ for $x \\neq 2$. Since $x^3 - 6x + 4 = (x - 2)(x^2 + 2x - 2)$, the limit is "
        "$\\lim_{x \\to 2} f(x) = 4 + 4 - 2 = 6$. For $n = 1024$ the sum $\\sum_{k=1}^{n} k$ is $n(n+1)/2 = 524{,}800$, and "
        "$e^{i\\pi} + 1 = 0$. Hence $a_{n+1} \\leq 0.875\\,a_n + 3.14159$ for every $n \\geq 12$."
    ),
    "other scripts": (
        "Сегодня утром в городе пошёл первый снег. 今天早上城里下了第一场雪。 今朝、町に初雪が降りました。 "
        "오늘 아침 도시에 첫눈이 내렸습니다. आज सुबह शहर में पहली बर्फ़ गिरी। "
        "هذا الصباح سقط أول ثلج في المدينة. Σήμερα το πρωί έπεσε το πρώτο χιόνι."
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = SettingsParser(
        "Compare a tokenizer's compression with GPT-2's and GPT-4's.\n"
        "Of these two, those that tiktoken has cached; it says how to fetch the others.",
        examples=["%(prog)s --tokenizer demo --data builtin"],
    )
    parser.add_argument("--tokenizer", default="default", metavar="NAME|PATH", help="made by scripts.tok_train")
    parser.add_argument("--data", default=None, metavar="NAME|PATH", help="measure on this text as well")
    parser.add_argument("--max-chars", type=int, default=2_000_000, help="characters of that text")
    args = parser.parse_args(argv)
    args.require_positive("max_chars")

    tokenizer = get_tokenizer(args.tokenizer)
    texts = {name: [text] for name, text in TEXTS.items()}
    if args.data is not None:
        source = get_source(args.data)
        texts.update({f"{args.data} ({split})": read_some(source, split, args.max_chars) for split in ("train", "val")})
    peers = {}
    for key, (name, files) in PEERS.items():
        if is_cached(files):
            peers[name] = tiktoken.get_encoding(key)
        else:
            fetch = f"python -c \"import tiktoken; tiktoken.get_encoding('{key}')\""
            print(f"{name} is not compared, since its vocabulary is not in tiktoken's cache: {fetch} fetches it")

    rows = []
    for name, documents in texts.items():
        if not documents:
            print(f"{name} is empty: left out")
            continue
        size = sum(len(text.encode("utf-8")) for text in documents)
        ours = [tokenizer.encode(text) for text in documents]
        if any(tokenizer.decode(ids) != text for ids, text in zip(ours, documents, strict=True)):
            raise AssertionError(f"{name}: decoding does not give the text back")
        counts = [sum(map(len, ours))]
        counts += [sum(len(encode_ordinary(peer, text)) for text in documents) for peer in peers.values()]
        rows.append([name, f"{size:,}", *(f"{size / count:.3f}" for count in counts)])
    theirs = (f"{name} ({peer.n_vocab:,})" for name, peer in peers.items())
    print_table(["text", "bytes", "ours", *theirs], rows, f"bytes per token (vocabulary {tokenizer.get_vocab_size():,})")
    return 0


def read_some(source: Source, split: str, max_chars: int) -> list[str]:
    """The first documents of a split, until max_chars are read."""
    total, documents = 0, []
    for text in source.documents(split):
        documents.append(text)
        total += len(text)
        if total >= max_chars:
            break
    return documents


def is_cached(files: tuple[str, ...]) -> bool:
    """Whether tiktoken would read these files from its cache instead of fetching them."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(folder) if folder else Path(tempfile.gettempdir()) / "data-gym-cache"
    return all((cache / hashlib.sha1((OPENAI + file).encode()).hexdigest()).exists() for file in files)


if __name__ == "__main__":
    sys.exit(run_command(main))

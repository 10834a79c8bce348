"""Runs lessons of this course, and other pages: python docs/course/run.py 3, or a page's path; --write renews its outputs.

A page's ```python blocks are one program, run from top to bottom; the ```text block right behind one is what it prints.
Pictures that the program saves come into images/, beside the page. tests/test_docs.py runs all pages by `run_page`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

COURSE = Path(__file__).resolve().parent
FENCE = re.compile(r"^```(\w*)(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OUTPUT = '```text title="Output"\n'


class Block(NamedTuple):
    """A fenced block of a page. info: what stands behind the language; start, end: its place in the page's characters."""

    language: str
    info: str
    text: str
    start: int
    end: int


def read_blocks(page: str) -> list[Block]:
    return [Block(m[1], m[2].strip(), m[3], m.start(), m.end()) for m in FENCE.finditer(page)]


def output_block(page: str, blocks: list[Block], index: int) -> Block | None:
    """The block that shows what block `index` prints, or None: the next one, if there is only white space between."""
    following = blocks[index + 1] if index + 1 < len(blocks) else None
    if following is None or following.language != "text" or page[blocks[index].end : following.start].strip():
        return None
    return following


def run_page(path: Path, show: bool = False, namespace: dict[str, Any] | None = None) -> list[str]:
    """Run a page's program in the current directory; returns what each of its Python blocks prints."""
    page = path.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    outputs = []
    for block in read_blocks(page):
        if block.language != "python":
            continue
        lines_above = page.count("\n", 0, block.start) + 1  # so that a trace names the page's own lines
        code = compile("\n" * lines_above + block.text, str(path), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        outputs.append(printed.getvalue())
        if show:
            print(f"--- line {lines_above}\n{outputs[-1]}", end="", flush=True)
    return outputs


def with_outputs(page: str, outputs: list[str]) -> str:
    """The page with these outputs instead of those that it shows."""
    blocks = read_blocks(page)
    waiting = iter(outputs)
    pieces, at = [], 0
    for i, block in enumerate(blocks):
        if block.language != "python":
            continue
        shown = output_block(page, blocks, i)
        pieces.append(page[at : block.end])
        at = shown.end if shown else block.end
        if printed := next(waiting).rstrip():
            head = f"```text {shown.info}\n" if shown else OUTPUT
            pieces.append(f"\n\n{head}{printed}\n```")
    return "".join([*pieces, page[at:]])


def find_page(name: str) -> Path:
    """A page by its path, or a lesson by its number."""
    if Path(name).is_file():
        return Path(name).resolve()
    found = sorted(COURSE.glob(f"{int(name):02d}-*.md")) if name.isdigit() else []
    if not found:
        sys.exit(f"error: {name} is neither a page nor the number of a lesson: choose 1 to 10")
    return found[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run lessons of the course.")
    parser.add_argument("pages", nargs="+", metavar="NUMBER|PAGE")
    parser.add_argument("--write", action="store_true", help="put what they print and draw into the pages")
    args = parser.parse_args(argv)
    before = Path.cwd()
    for path in map(find_page, args.pages):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["NANOCHAT_BASE_DIR"] = folder
            os.chdir(folder)
            outputs = run_page(path, show=True)
            os.chdir(before)
            if args.write:
                page = path.read_text(encoding="utf-8")
                path.write_text(with_outputs(page, outputs), encoding="utf-8", newline="\n")
                for picture in Path(folder).glob("*.png"):
                    (path.parent / "images").mkdir(exist_ok=True)
                    shutil.copy(picture, path.parent / "images" / picture.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A table on the terminal. Used by commands that show results."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print rows of texts below a line with the title, without columns that are empty; all but the first end at the right.

    A terminal folds what is too wide for it; a file or a pipe gets each row as one line.
    """
    table, rows = Table(box=box.SIMPLE_HEAD, pad_edge=False), list(rows)
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    for i in used:
        table.add_column(Text(columns[i]), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in used))  # a Text is shown as it is, brackets and all
    if title:
        print(title)  # as a title of the table it would be folded at the table's width
    Console(width=None if sys.stdout.isatty() else 1000).print(table)

"""Tables on the terminal show texts as they are."""

from __future__ import annotations

import pytest

from nanochat.tables import print_table


def test_a_table_shows_brackets_and_no_empty_column(capsys: pytest.CaptureFixture) -> None:
    print_table(["run", "pass@8", "loss"], [["[red]a[/red]", "", "1.5"], ["b" * 300, "", "22.25"]], "numbers")
    title, _, head, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert (title, head.split(), first.split()) == ("numbers", ["run", "loss"], ["[red]a[/red]", "1.5"])
    assert second.split() == ["b" * 300, "22.25"]  # one line of a file, however long
    assert first.rstrip().endswith("  1.5") and len(first) == len(second)

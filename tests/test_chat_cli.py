"""The terminal chat stays where Ctrl-C was not meant for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts import chat_cli


@pytest.mark.parametrize(
    ("typed", "answers", "hints"),
    [
        ([KeyboardInterrupt, "hello", KeyboardInterrupt, "again", EOFError], 2, 2),  # each time something came between
        (["hello", KeyboardInterrupt, KeyboardInterrupt, "never read"], 1, 1),
        (["interrupted", "hello", "quit"], 1, 1),  # while a message is being read, before there is an answer to stop
        ([EOFError, "never read"], 0, 0),
    ],
)
def test_only_a_second_ctrl_c_leaves(
    tiny_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, typed: list[Any], answers: int, hints: int
) -> None:
    waiting, answered = iter(typed), []

    def answer(self: chat_cli.Chat, text: str) -> None:
        if text == "interrupted":
            raise KeyboardInterrupt
        answered.append(text)

    def read(prompt: str) -> str:
        if isinstance(line := next(waiting), str):
            return line
        raise line

    monkeypatch.setattr(chat_cli.Chat, "answer", answer)
    monkeypatch.setattr("builtins.input", read)
    assert chat_cli.main(["--model-tag=tiny", "--device-type=cpu"]) == 0
    assert len(answered) == answers and "never read" not in answered
    assert capsys.readouterr().out.count("Ctrl-C once more") == hints

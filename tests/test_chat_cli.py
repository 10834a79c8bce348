"""The terminal chat stays where Ctrl-C was not meant for it, and takes what is pasted whole."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.engine import Engine
from scripts import chat_cli
from tests.nursery import ROOT


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


@pytest.mark.skipif(sys.platform != "linux", reason="macOS and Windows may have another line editor, or none")
def test_lines_that_are_pasted_are_one_message(tiny_run: Path) -> None:
    """As a terminal marks them that was asked to."""
    import pty

    if "libedit" in (pytest.importorskip("readline").__doc__ or ""):
        pytest.skip("this Python's line editor is not GNU's")
    code = "from scripts import chat_cli\nchat_cli.Chat.answer = lambda self, text: print('GOT', ascii(text))\n"
    code += "chat_cli.main(['--model-tag=tiny', '--device-type=cpu'])"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "INPUTRC": os.devnull}
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen([sys.executable, "-c", code], **terminal, cwd=ROOT, env=environment) as chat:
        os.close(theirs)

        def read_until(pattern: bytes) -> bytes:
            seen = b""
            while not re.search(pattern, seen):
                seen += os.read(ours, 4096)
            return seen

        try:
            assert b"\x1b[?2004h" in read_until(b"You: ")
            os.write(ours, b"\x1b[200~one\ntwo\nthree\x1b[201~\r")
            assert b"GOT 'one\\ntwo\\nthree'" in read_until(b"GOT .*\n")
        finally:
            chat.kill()
            os.close(ours)


def test_an_answer_that_is_stopped_is_told_to_the_shell(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over questions ends, too."""

    def stopped(*_: Any, **__: Any) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(chat_cli.Engine, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        chat_cli.main(["--model-tag=tiny", "--device-type=cpu", "-p", "hello"])


def test_what_a_model_writes_is_shown_and_not_obeyed(
    tiny_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(engine: Any, *_: Any, **__: Any) -> Iterator[Any]:
        for token in engine.tokenizer.encode("a\x1b]52;c;eA==\x07b\x9bc\n\td"):
            yield [token], [1]

    monkeypatch.setattr(chat_cli.Engine, "generate", generate)
    assert chat_cli.main(["--model-tag=tiny", "--device-type=cpu", "-p", "hello"]) == 0
    assert capsys.readouterr().out == "a]52;c;eA==bc\n\td\n"


def test_a_line_that_is_not_utf8_is_read(tiny_run: Path) -> None:
    command = [sys.executable, "-m", "scripts.chat_cli", "--model-tag=tiny", "--device-type=cpu", "-m", "2"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, input=b"caf\xe9?\n", cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_prompt_of_several_lines_may_be_piped_in(
    tiny_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(chat_cli.Chat, "answer", lambda self, text: asked.append(text))
    monkeypatch.setattr("sys.stdin", io.StringIO("first line\nsecond line\n"))
    assert chat_cli.main(["--model-tag=tiny", "--device-type=cpu", "-p", "-"]) == 0
    assert asked == ["first line\nsecond line"] and capsys.readouterr().out == ""


def test_half_a_character_before_a_call_is_shown_before_it(
    tiny_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(self: Engine, *args: object, **settings: object) -> Iterator[tuple[list[int], list[int]]]:
        special = self.tokenizer.encode_special
        (one,) = self.tokenizer.encode("1")
        for token in (0xC3, special("<|python_start|>"), one, special("<|python_end|>"), special("<|assistant_end|>")):
            yield [token], [1]

    monkeypatch.setattr(Engine, "generate", generate)
    assert chat_cli.main(["--model-tag=tiny", "--device-type=cpu", "--prompt=hello"]) == 0
    assert "\ufffd[1]" in capsys.readouterr().out


def test_commands_may_have_a_slash(tiny_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in other programs; none of them reaches the model."""
    asked: list[str] = []
    monkeypatch.setattr(chat_cli.Chat, "answer", lambda self, text: asked.append(text))
    for leave in ("quit", "/exit", "/bye"):
        typed = iter(["/help", "help", "clear", "/Clear", leave])
        monkeypatch.setattr("builtins.input", lambda _, typed=typed: next(typed))
        assert chat_cli.main(["--model-tag=tiny", "--device-type=cpu"]) == 0
    out = capsys.readouterr().out
    assert not asked and out.count(chat_cli.HELP) == 9 and out.count("A new conversation.") == 6

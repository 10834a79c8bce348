"""The terminal chat shows an answer as it comes, stays where Ctrl-C was not meant for it, and takes what is pasted whole."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import NanochatError
from nanochat.tokenizer import Tokenizer
from scripts import chat_cli
from tests.helpers import make_engine, make_it_say
from tests.nursery import ROOT

DIM, PLAIN = chat_cli.DIM, chat_cli.PLAIN
CALL, END, OUTPUT, OUTPUT_END = "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"


def _tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Each byte of a text is a token, and so is what spells a special one."""
    pieces = re.split(r"(<\|\w+\|>)", text)
    ids = [[tokenizer.encode_special(p)] if p.startswith("<|") else list(p.encode("utf-8", "surrogateescape")) for p in pieces]
    return [token for part in ids for token in part]


def _chat(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, script: str, *flags: str, term: str = "xterm"
) -> chat_cli.Chat:
    """A chat with a model that says this, in a terminal that shows colours."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", term)
    engine = make_engine(tokenizer, 512)
    make_it_say(engine, monkeypatch, _tokens(tokenizer, script))
    return chat_cli.Chat(engine, chat_cli.parse_arguments(["--seed=1000", *flags]))


def _interrupt(chat: chat_cli.Chat, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """Raise an error when the model has said so many tokens."""
    step, seen = chat.engine.scheduler.step, []

    def fail() -> None:
        if len(seen) == after:
            seen.clear()
            raise error
        before = chat.engine.scheduler.generated_tokens
        step()
        seen.extend([0] * (chat.engine.scheduler.generated_tokens - before))

    monkeypatch.setattr(chat.engine.scheduler, "step", fail)


@pytest.mark.parametrize(
    ("script", "shown", "parts"),
    [
        ("It is é.<|assistant_end|>", "It is é.", [("text", "It is é.")]),
        ("<|assistant_end|>", "", []),
        (f"It: {CALL}23+58{END}so 81<|bos|>", f"It: {DIM}[23+58]{PLAIN}{DIM}[= 81]{PLAIN} so 81",
         [("text", "It: "), ("python", "23+58"), ("python_output", "81"), ("text", "so 81")]),
        (f"{CALL}2*3{END}<|assistant_end|>", f"{DIM}[2*3]{PLAIN}{DIM}[= 6]{PLAIN} ",
         [("python", "2*3"), ("python_output", "6")]),
        (f"{CALL}1/0{END}{CALL}2{END}.<|bos|>", f"{DIM}[1/0]{PLAIN}{DIM}[2]{PLAIN}{DIM}[= 2]{PLAIN} .",
         [("python", "1/0"), ("python", "2"), ("python_output", "2"), ("text", ".")]),
        (f"{CALL}{END}a<|bos|>", f"{DIM}[]{PLAIN}a", [("text", "a")]),
        (f"a{CALL}<|bos|>", f"a{DIM}[{PLAIN}", [("text", "a")]),
        (f"a{CALL}1+\udcc3<|bos|>", f"a{DIM}[1+\ufffd{PLAIN}", [("text", "a"), ("python", "1+\ufffd")]),
        (f"a\udcc3{CALL}1{END}<|bos|>", f"a\ufffd{DIM}[1]{PLAIN}{DIM}[= 1]{PLAIN} ",
         [("text", "a\ufffd"), ("python", "1"), ("python_output", "1")]),
        ("a\udce2\udc82<|bos|>", "a\ufffd", [("text", "a\ufffd")]),
        # What a model does not learn to say
        (f"a{END}b{OUTPUT_END}c<|bos|>", f"a]{PLAIN}b]{PLAIN} c", [("text", "abc")]),
        (f"{CALL}1{CALL}2<|bos|>", f"{DIM}[1{DIM}[2{PLAIN}", [("python", "12")]),
        (f"{CALL}1<|user_end|>b<|bos|>", f"{DIM}[1b", [("python", "1"), ("text", "b")]),
        (f"{CALL}1{OUTPUT}2{OUTPUT_END}b<|bos|>", f"{DIM}[1{DIM}[= 2]{PLAIN} b",
         [("python", "1"), ("python_output", "2"), ("text", "b")]),
        ("a\x1b]52;c;eA==\x07b\x9bc\n\td<|bos|>", "a]52;c;eA==bc\n\td", [("text", "a\x1b]52;c;eA==\x07b\x9bc\n\td")]),
    ],
)  # fmt: skip
def test_an_answer_is_shown_and_kept(
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    shown: str,
    parts: list[tuple[str, str]],
) -> None:
    """With its calls, whole characters, and nothing that the terminal would obey; whatever ended it, colours end with it."""
    chat = _chat(tokenizer, monkeypatch, script)
    chat.answer("hello")
    assert capsys.readouterr().out == f"nanochat: {shown}\n"
    assert [(part["type"], part["text"]) for part in chat.messages[-1]["content"]] == parts
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    make_it_say(chat.engine, monkeypatch, _tokens(tokenizer, "yes<|bos|>"))
    chat.answer("again")
    assert capsys.readouterr().out == "nanochat: yes\n" and len(chat.messages) == 4
    for flags in (["-p", "hello"], ["-p", "hello", "-i", "base"]):
        _chat(tokenizer, monkeypatch, script, *flags).answer("hello")
        assert capsys.readouterr().out == f"{shown}\n"
    _chat(tokenizer, monkeypatch, script, "-i", "base", term="dumb").answer("hello")
    assert capsys.readouterr().out == f"nanochat: {shown}\n".replace(DIM, "").replace(PLAIN, "")


def test_an_answer_that_reaches_its_limit_ends_there(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within a call and its result."""
    script = f"a{CALL}2*9{END}b"
    whole = ["a", f"{DIM}[", "2", "*", "9", f"]{PLAIN}", f"{DIM}[= ", "18", f"]{PLAIN} ", "b"]
    if len(tokenizer.encode("18")) == 2:
        whole[7:8] = "18"
    for most in range(1, len(whole) + 1):
        _chat(tokenizer, monkeypatch, script, f"--max-tokens={most}").answer("hello")
        shown = "".join(whole[:most])
        assert capsys.readouterr().out == f"nanochat: {shown}{PLAIN * (shown.rfind(DIM) > shown.rfind(PLAIN))}\n"


@pytest.mark.parametrize(
    ("after", "shown", "parts"),
    [
        (0, "", []),
        (2, "nanochat: aé"[:-1], [("text", "a\ufffd")]),
        (3, "nanochat: aé", [("text", "aé")]),
        (4, f"nanochat: aé{DIM}[", [("text", "aé")]),
        (6, f"nanochat: aé{DIM}[1+", [("text", "aé"), ("python", "1+")]),
    ],
)
def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    shown: str,
    parts: list[tuple[str, str]],
) -> None:
    script = f"aé{CALL}1+1{END}<|bos|>"
    chat = _chat(tokenizer, monkeypatch, script)
    _interrupt(chat, monkeypatch, KeyboardInterrupt(), after)
    chat.answer("hello")
    assert capsys.readouterr().out == f"{shown} (stopped){PLAIN}\n"
    assert "".join(part["text"] for part in chat.messages[-1]["content"]) == "".join(text for _, text in parts)
    assert chat.engine.scheduler.num_running == 0
    chat.tokenizer.render_for_completion({"messages": [*chat.messages, {"role": "user", "content": "again"}]})
    once = _chat(tokenizer, monkeypatch, script, "-p", "hello")  # a loop of the shell's over questions ends, too
    _interrupt(once, monkeypatch, KeyboardInterrupt(), after)
    with pytest.raises(KeyboardInterrupt):
        once.answer("hello")
    assert capsys.readouterr().out == f"{shown.removeprefix('nanochat: ')} (stopped){PLAIN}\n"


def test_an_answer_that_fails_is_not_kept(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure before its first token does not follow the model's name."""
    for after, shown in ((0, ""), (2, "nanochat: ab")):
        chat = _chat(tokenizer, monkeypatch, "abc<|bos|>")
        _interrupt(chat, monkeypatch, NanochatError("no memory"), after)
        chat.take("hello")
        assert capsys.readouterr().out == f"{shown}no memory\n" and not chat.messages


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

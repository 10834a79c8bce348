"""Properties of the comparison with other tokenizers: nothing is fetched, and what is missing can be had by what is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiktoken

from nanochat.tokenizer import Tokenizer, get_tokenizer_dir
from scripts import tok_eval


def test_what_is_missing_is_named_with_the_command_that_fetches_it(
    tokenizer: Tokenizer, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    tokenizer.save(get_tokenizer_dir())
    assert tok_eval.main([]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "tiktoken's cache" in line]
    assert [line.split()[0] for line in lines] == ["GPT-2", "GPT-4"]
    for line in lines:
        code = re.search(r'python -c "(import tiktoken; tiktoken\.get_encoding\(\'(\w+)\'\))"', line)
        assert code and code[2] in tiktoken.list_encoding_names()
        asked: list[str] = []
        monkeypatch.setattr(tiktoken, "get_encoding", asked.append)
        exec(code[1])
        assert asked == [code[2]]
    assert not (tmp_path / "empty").exists()


def test_white_space_that_no_pattern_takes_at_once_is_compared_too(
    tokenizer: Tokenizer, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By GPT-2's pattern, on which tiktoken's fastest call panics, as Rust does, with a trace."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    byte_ranks = {bytes([byte]): byte for byte in range(256)}
    peer = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=byte_ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: peer)
    monkeypatch.setattr(tok_eval, "is_cached", lambda files: True)
    tokenizer.save(get_tokenizer_dir())
    (tmp_path / "text.jsonl").write_text(f'{{"text": "a{" " * 1_200_000}b"}}\n{{"text": "c"}}\n', encoding="utf-8")
    assert tok_eval.main(["--data", str(tmp_path)]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "1,200,002" in line)
    assert row.split()[-2:] == ["1.000", "1.000"]  # a byte is a token of the peer's

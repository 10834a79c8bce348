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

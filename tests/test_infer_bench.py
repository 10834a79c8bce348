"""What scripts/infer_bench counts: steps that compute every text, and no others."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.common import NanochatError
from nanochat.runner import ModelRunner
from nanochat.tokenizer import Tokenizer
from scripts import infer_bench
from tests.helpers import make_model


def _measure(tokenizer: Tokenizer, capsys: pytest.CaptureFixture, *flags: str) -> list[dict[str, Any]]:
    parser = ArgumentParser()
    infer_bench.add_measurement_arguments(parser)
    model = make_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=128)
    assert infer_bench.run(model, tokenizer, parser.parse_args([*flags, "--no-compile"]), {"model": "tiny"}) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["results"]


def test_every_counted_step_computes_every_text(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the prompts come one after the other: those read first are ahead, and must not end before the last."""
    monkeypatch.setattr("nanochat.scheduler.CHUNK", {"cpu": 20})
    rows_of_steps: list[int] = []
    decode = ModelRunner.decode

    def counted(runner: ModelRunner, tokens: list[int], *rest: Any) -> torch.Tensor:
        rows_of_steps.append(len(tokens))
        return decode(runner, tokens, *rest)

    monkeypatch.setattr(ModelRunner, "decode", counted)
    (row,) = _measure(tokenizer, capsys, "--batch-sizes=8", "--prompt-tokens=20", "--new-tokens=6")
    assert row["batch_size"] == 8 and row["tokens_per_s"] == pytest.approx(8e3 / row["ms_per_token"], rel=0.9)
    growing = [1, 2, 3, 4, 5, 6, 7, 8]  # a prompt is read in each step, the last one's step computes all
    assert rows_of_steps == 2 * (growing + [8] * 5)


@pytest.mark.parametrize("size", [1, 2])
def test_steps_of_others_are_not_counted(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A model that calls the calculator again and again leaves the batch as often; and two tokens are enough."""
    calls = [tokenizer.encode_special(name) for name in ("<|python_start|>", "<|python_end|>")]
    turn = iter(range(10_000))

    def call(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.tensor([calls[next(turn) // size % 2]] * len(logits))

    monkeypatch.setattr("nanochat.scheduler.sample", call)
    clock, decode = [0.0], ModelRunner.decode

    def slow(runner: ModelRunner, tokens: list[int], *rest: Any) -> torch.Tensor:
        clock[0] += len(tokens)  # a second for each text
        return decode(runner, tokens, *rest)

    monkeypatch.setattr(ModelRunner, "decode", slow)
    monkeypatch.setattr(infer_bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    timed: list[list[float]] = []
    monkeypatch.setattr(infer_bench.statistics, "mean", lambda steps: timed.append(steps) or 1.0)
    for new_tokens in (2, 9):
        _measure(tokenizer, capsys, f"--batch-sizes={size}", "--prompt-tokens=8", f"--new-tokens={new_tokens}")
    assert timed == [[size], [size], [size] * 8, [size] * 8]


def test_why_nothing_is_compiled_is_said(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless that was asked for."""
    monkeypatch.setattr("nanochat.runner.can_compile", lambda device: "no C++ compiler")
    parser = ArgumentParser()
    infer_bench.add_measurement_arguments(parser)
    flags = ["--batch-sizes=1", "--prompt-tokens=8", "--new-tokens=2"]
    for more in ([], ["--no-compile"]):
        model = make_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=128)
        assert infer_bench.run(model, tokenizer, parser.parse_args([*flags, *more]), {"model": "tiny"}) == 0
        assert ("decoding without torch.compile: no C++ compiler" in capsys.readouterr().out) == (not more)


def test_a_context_without_room_is_refused(tokenizer: Tokenizer, capsys: pytest.CaptureFixture) -> None:
    for flags in (["--prompt-tokens=60", "--new-tokens=60", "--batch-sizes=64"], ["--new-tokens=1"]):
        with pytest.raises(NanochatError, match="choose smaller --prompt-tokens|at least 2"):
            _measure(tokenizer, capsys, *flags)

"""Decoding as it is compiled and recorded, with stand-ins for GPUs; what these compute is in test_cuda.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat import runner
from nanochat.engine import Engine
from nanochat.sampling import SamplingParams
from nanochat.tokenizer import Tokenizer
from tests.helpers import make_model

STREAMS = SimpleNamespace(current="usual")  # the stream of this thread


@contextlib.contextmanager
def failing_capture(*_: Any, **__: Any) -> Iterator[None]:
    """Like torch.cuda.graph when a kernel may not be captured: the stream stays that of the capture."""
    STREAMS.current = "of the capture"
    yield
    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_a_step_that_cannot_be_captured_is_launched(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Texts go on as they would have, later steps do not try again, and one line says so."""
    engine = Engine(make_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=512), tokenizer)
    prompts = [tokenizer.encode(text, prepend="<|bos|>") for text in ("the cat", "one quick fox", "a")]
    params = SamplingParams(0, max_tokens=150, ignore_eos=True)  # long enough for another length of graphs
    expected = [row.tokens for row in engine.complete(prompts, params)]

    monkeypatch.setattr(STREAMS, "current", "usual")
    monkeypatch.setattr(runner, "side_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", failing_capture)
    for name, value in {
        "CUDAGraph": object, "Stream": lambda device: None, "current_stream": lambda device: STREAMS.current,
        "set_stream": lambda stream: setattr(STREAMS, "current", stream),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    mine = engine.scheduler.runner
    mine._compiled = mine._decode_step

    def decode(*inputs: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(mine, "device", SimpleNamespace(type="cuda"))
            return runner.ModelRunner.decode(mine, *inputs)

    monkeypatch.setattr(mine, "decode", decode)
    engine.forget()
    assert [row.tokens for row in engine.complete(prompts, params)] == expected
    assert STREAMS.current == "usual"
    assert len(caplog.records) == 1 and "kernel by kernel: CUDA error: operation failed" in caplog.text


def test_decoding_is_compiled_for_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for more than the compiler wants to have versions of one function; other widths stand in for other GPUs."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend="eager", **how))
    monkeypatch.setattr(runner, "can_compile", lambda device: None)
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 1)
    for width in (32, 48):
        model = make_model(n_layer=1, n_embd=width, sequence_len=128)
        assert runner.ModelRunner(model, num_blocks=16, max_rows=4).compile(frozen=False) is None

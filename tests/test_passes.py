"""Passes over the micro-batches of an update; what a GPU records of them is in test_cuda.py."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from nanochat import passes
from nanochat.gpt import GPT
from nanochat.metrics import read_metrics
from nanochat.passes import Batch, Passes, recordable, summed_loss
from tests.helpers import RandomBatches, make_model, make_trainer

BATCH = (torch.arange(7 * 64).view(7, 64) % 300, torch.arange(1, 1 + 7 * 64).view(7, 64) % 300)


def test_uncompiled_passes_by_pieces_are_the_whole_pass(monkeypatch) -> None:
    """Seven rows, two of which fit into a piece: four pieces, the last of one row."""
    rows: list[int] = []

    def loss_fn(model: GPT, batch: Batch) -> torch.Tensor:
        rows.append(batch[0].size(0))
        return summed_loss(model, batch)

    losses, gradients = [], []
    for piece_tokens in (50, 150):  # a row is longer than the first
        monkeypatch.setattr(passes, "PIECE_TOKENS", piece_tokens)
        model = make_model(sequence_len=64)
        losses.append(Passes(model, loss_fn).run([BATCH], torch.tensor(BATCH[0].numel())))
        gradients.append([p.grad for p in model.parameters()])
    assert rows == [7, 2, 2, 2, 1]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for pieces, whole in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-7)


def test_no_piece_is_longer_than_a_piece_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if an update begins with short texts, as in reinforcement learning."""
    monkeypatch.setattr(passes, "PIECE_TOKENS", 128)
    sizes: list[tuple[int, ...]] = []

    def loss_fn(model: GPT, batch: Batch) -> torch.Tensor:
        sizes.append(tuple(batch[0].shape))
        return summed_loss(model, batch)

    batches = [tuple(tensor[:4, :T] for tensor in BATCH) for T in (16, 64)]
    Passes(make_model(sequence_len=64), loss_fn).run(batches, torch.tensor(320))
    assert sizes == [(4, 16), (2, 64), (2, 64)]


def test_sparse_gradients_are_no_larger_than_their_tables() -> None:
    """However many tokens an update has; and they are what dense ones would be."""
    batches = [tuple(torch.randint(300, (4, 64)) for _ in range(2)) for _ in range(8)]
    gradients = []
    for sparse in (True, False):
        model = make_model(sequence_len=64)
        for table in model.tables().values():
            table.sparse = sparse
        Passes(model).run(batches, torch.tensor(8 * 4 * 64))
        gradients.append([table.weight.grad for table in model.tables().values()])
    assert gradients[0]
    for found, dense in zip(*gradients, strict=True):
        assert found is not None and found._nnz() <= found.size(0)
        torch.testing.assert_close(found.to_dense(), dense, rtol=1e-4, atol=1e-7)


def test_a_loss_says_whether_its_passes_may_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(GPT, "is_compiled", True)
    monkeypatch.setattr(model, "get_device", lambda: torch.device("cuda"))
    monkeypatch.delenv("NANOCHAT_CUDA_GRAPHS", raising=False)
    plain = functools.partial(summed_loss)
    assert Passes(model)._may_record() and not Passes(model, plain)._may_record()
    assert Passes(model, recordable(plain))._may_record()


class Parts(RandomBatches):
    """One batch, again and again, in so many parts."""

    def __init__(self, batch: Batch, parts: int) -> None:
        super().__init__()
        self.parts = list(zip(*(tensor.chunk(parts) for tensor in batch), strict=True))

    def __next__(self) -> Batch:
        self.step += 1
        return self.parts[(self.step - 1) % len(self.parts)]


def test_an_update_is_the_same_in_any_number_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token counts as much as any other, however many of a part's tokens have a target."""
    inputs, targets = (tensor[:4] for tensor in BATCH)
    targets = targets.clone()
    for row, supervised in enumerate((64, 1, 0, 23)):
        targets[row, supervised:] = -1
    whole = make_model()
    loss = whole(inputs, targets)
    loss.backward()
    for parts in (1, 2, 4):
        trainer = make_trainer(tmp_path / str(parts), num_iterations=1, total_batch_size=256, grad_accum_steps=parts)
        trainer.loader = Parts((inputs, targets), parts)
        found: list[torch.Tensor] = []
        parameters = list(trainer.model.parameters())
        monkeypatch.setattr(trainer.optimizer, "step", lambda of=parameters, to=found: to.extend(p.grad for p in of))
        trainer.train()
        (row,) = [row for row in read_metrics(tmp_path / str(parts) / "metrics.jsonl") if "train/loss" in row]
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        for gradient, parameter in zip(found, whole.parameters(), strict=True):
            torch.testing.assert_close(gradient.to_dense(), parameter.grad.to_dense(), rtol=1e-4, atol=1e-6)

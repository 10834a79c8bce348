"""Training in float16: gradients that its range would lose are kept, those that leave it cost one update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanochat import loss_scale
from nanochat.checkpoint_manager import load_checkpoint
from nanochat.common import NanochatError, get_base_dir
from nanochat.loss_scale import FIRST_FACTOR, LossScale
from nanochat.updates import orthogonalize
from scripts import base_train
from tests.conftest import TINY_TRAINING
from tests.helpers import logged


def make_parameter(gradient: torch.Tensor | None) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    parameter.grad = gradient
    return parameter


def test_gradients_are_divided_and_the_factor_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 2)
    scale = LossScale(torch.float16)
    twice, numbers = torch.tensor([[1, 1]]), torch.full((2, 2), 3.0)
    rows = torch.sparse_coo_tensor(twice, numbers, (4, 2), check_invariants=True)  # as tables have: not added up yet
    parameters = [make_parameter(torch.full((4, 2), 2.0)), make_parameter(rows), make_parameter(None)]
    assert scale.unscale(parameters)
    assert parameters[0].grad.eq(2 / FIRST_FACTOR).all()
    assert parameters[1].grad.to_dense()[1].eq(6 / FIRST_FACTOR).all()
    assert scale.factor == FIRST_FACTOR
    assert scale.unscale(parameters) and scale.factor == 2 * FIRST_FACTOR


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_number_out_of_range_costs_the_update(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 2)
    gradient = torch.zeros(4, 2)
    gradient[3, 1] = bad
    scale = LossScale(torch.float16)
    assert scale.unscale([make_parameter(torch.ones(4, 2))])
    assert not scale.unscale([make_parameter(torch.ones(4, 2)), make_parameter(gradient)])
    assert scale.factor == FIRST_FACTOR / 2
    assert scale.unscale([make_parameter(torch.ones(4, 2))])
    assert scale.factor == FIRST_FACTOR / 2  # good updates are counted from the bad one on
    again = LossScale(torch.float16)
    again.load_state_dict(scale.state_dict())
    assert again.state_dict() == scale.state_dict()


def test_other_dtypes_are_left_alone() -> None:
    """Also where a run goes on in another one."""
    scale, gradient = LossScale(torch.bfloat16), torch.full((4, 2), float("inf"))
    half = LossScale(torch.float16)
    for one, other in ((scale, half), (half, scale)):
        one.load_state_dict(other.state_dict())
    assert (scale.factor, half.factor) == (1, FIRST_FACTOR)
    assert scale.unscale([make_parameter(gradient)]) and gradient.isinf().all()


def test_gradients_that_are_never_finite_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    scale, bad = LossScale(torch.float16), make_parameter(torch.full((4, 2), float("nan")))
    for _ in range(16):
        assert not scale.unscale([bad])
    with pytest.raises(NanochatError, match="NANOCHAT_DTYPE=float32"):
        scale.unscale([bad])


def test_small_matrices_have_a_direction_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Momenta are small once the gradients are divided again; what they say must outlive the rounding."""
    matrices = 1e-8 * torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in ("float32", "float16"):
        monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
        found.append(orthogonalize(matrices).float().flatten())
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.999


def train(corpus: Path, tag: str, *flags: str) -> list[float]:
    size = ("--max-seq-len=32", "--total-batch-size=128", "--eval-tokens=128")  # processors do float16 slowly
    flags = (*TINY_TRAINING, *size, f"--data={corpus}", f"--model-tag={tag}", "--save-every=3", *flags)
    assert base_train.main([*flags]) == 0
    return logged(get_base_dir() / "runs" / tag / "base")


def test_training_in_float16_follows_float32(
    corpus: Path, tokenizer_in_place: None, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first factor is too large, at the cost of an update or two; and resumed as if never stopped."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    exact = train(corpus, "exact")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert train(corpus, "half") == pytest.approx(exact, abs=0.02)
    monkeypatch.setattr(loss_scale, "FIRST_FACTOR", 2.0**24)
    whole = train(corpus, "large")
    assert whole[-1] < whole[0] - 0.1
    stage_dir = base_dir / "runs" / "large" / "base"
    weights, meta = load_checkpoint(stage_dir, 6)
    assert meta["trainer"]["loss_scale"]["factor"] < 2.0**24
    monkeypatch.setattr(loss_scale, "FIRST_FACTOR", FIRST_FACTOR)
    assert train(corpus, "large", "--resume=3") == whole
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_checkpoint(stage_dir, 6)[0].items())

"""Products in 8 bits are near those in 32, train, and are there for training alone; the kernels exist on a CPU as well."""

from __future__ import annotations

import pytest
import torch

from nanochat.common import NanochatError
from nanochat.fp8 import enable_fp8, fp8_linear, is_eligible, quantize
from nanochat.gpt import GPT, GPTConfig
from nanochat.layers import Linear
from tests.helpers import relative_error


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_values_keep_three_bits_at_any_scale(size: float) -> None:
    x = torch.randn(64, 48) * size
    x8, scale = quantize(x, torch.float8_e4m3fn)
    assert x8.dtype == torch.float8_e4m3fn
    assert float((x8.float() * scale).abs().max()) == pytest.approx(float(x.abs().max()), rel=1e-3)
    large = x.abs() > 0.02 * x.abs().max()  # smaller ones are subnormal
    assert ((x8.float() * scale / x - 1).abs()[large] <= 2**-4 + 1e-3).all()


def test_nothing_divides_by_an_empty_tensor() -> None:
    x8, scale = quantize(torch.zeros(16, 16), torch.float8_e5m2)
    assert x8.float().abs().sum() == 0
    assert torch.isfinite(scale)


def test_product_and_gradients_are_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    grad = torch.randn(2, 32, 48)
    y = fp8_linear(x, weight)
    y.backward(grad)
    found = y.detach(), x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    exact = x @ weight.T
    exact.backward(grad)
    for mine, theirs, bound in zip(found, (exact.detach(), x.grad, weight.grad), (0.05, 0.08, 0.08), strict=True):
        assert mine.shape == theirs.shape
        assert 1e-4 < relative_error(mine, theirs) < bound


def test_a_model_learns_with_it_and_is_measured_without() -> None:
    config = GPTConfig(sequence_len=64, vocab_size=256, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    torch.manual_seed(0)
    idx = torch.randint(0, 256, (2, 64))
    model = GPT(config)
    model.init_weights(0)
    exact = model(idx)
    linears = [module for module in model.blocks.modules() if isinstance(module, Linear)]
    for linear in linears:
        linear.fp8 = is_eligible(linear.weight)
    assert {linear.fp8 for linear in linears} == {True, False}  # the gates of value embeddings have 2 rows
    optimizer = model.setup_optimizer()
    losses = []
    for _ in range(20):
        loss = model(idx[:, :-1].contiguous()[:, :48], idx[:, 1:49])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    trained = model(idx)
    model.eval()
    measured = model(idx)
    assert not torch.equal(trained, measured)
    for linear in linears:
        linear.fp8 = False
    assert torch.equal(measured, model.train()(idx))
    assert not torch.equal(measured, exact)


def test_rows_that_the_kernels_do_not_take_are_multiplied_exactly() -> None:
    x, weight = torch.randn(3, 7, 64), torch.randn(48, 64)
    assert torch.equal(fp8_linear(x, weight), torch.nn.functional.linear(x, weight))


def test_a_machine_without_the_kernels_says_so() -> None:
    model = GPT(GPTConfig(sequence_len=64, vocab_size=256, n_layer=1, n_head=2, n_kv_head=2, n_embd=64))
    with pytest.raises(NanochatError, match="compute capability"):
        enable_fp8(model, torch.device("cpu"))

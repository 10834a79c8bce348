"""Our GPU kernels compute what PyTorch does: compiled on a GPU, elsewhere in Triton's interpreter (conftest.py asks for it).

Skipped without Triton, which comes with PyTorch for GPUs; on a CPU: `bash runs/setup.sh kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanochat.cross_entropy import chunk_loss
from nanochat.gpt import LOGIT_CAP
from nanochat.kernels import AMPERE, HOPPER
from nanochat.layers import Embedding, in_heads
from tests.helpers import relative_error

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter takes the bits of bfloat16 for integers
DTYPES = [torch.float32, HALF]


@pytest.fixture(scope="module")
def kernels() -> Iterator[SimpleNamespace]:
    pytest.importorskip("triton", reason="Triton is not installed here: bash runs/setup.sh kernels")
    if ON_GPU and torch.cuda.get_device_capability(DEVICE) < AMPERE:
        pytest.skip("Triton supports GPUs from Ampere on")
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))
        from nanochat import heads_kernel, lookup_kernel, loss_kernel, mlp_kernel

        yield SimpleNamespace(heads=heads_kernel, lookup=lookup_kernel, loss=loss_kernel, mlp=mlp_kernel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [20, 150])
@pytest.mark.parametrize("ours", [False, True] if ON_GPU else [True])
def test_gradients_of_tables_are_sums_in_one_order(
    kernels: SimpleNamespace, ours: bool, count: int, dtype: torch.dtype
) -> None:
    """Few ids and many, often the same one: the gradients are what a CPU adds up, and the same each time."""
    idx = torch.randint(64, (4, count), device=DEVICE)
    idx[:2] = 7
    grad = torch.randn(4, count, 100, device=DEVICE, dtype=dtype)
    table = Embedding(64, 100).to(DEVICE)
    torch.nn.init.normal_(table.weight)
    rows = table(idx, dtype, kernels.lookup.sort_ids(idx, 64) if ours else None)
    assert torch.equal(rows, F.embedding(idx, table.weight).to(dtype))
    exact = torch.zeros(64, 100, dtype=torch.float64).index_add_(0, idx.flatten().cpu(), grad.flatten(0, 1).double().cpu())
    found = []
    for _ in range(2):
        table.weight.grad = None
        rows.backward(grad, retain_graph=True)
        found.append(table.weight.grad.clone())
    assert torch.equal(*found)
    rows.backward(grad)  # a second pass adds to the first
    for total, times in ((found[0], 1), (table.weight.grad, 2)):
        tolerance = {"atol": 1e-3, "rtol": 1e-4} if ours or dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
        torch.testing.assert_close(total.double().cpu(), times * exact, **tolerance)


@pytest.mark.parametrize("dtype", [HALF] if ON_GPU else DTYPES)
@pytest.mark.parametrize("size", [(20_000 if ON_GPU else 300, 72, 520), (700, 136, 520), (1, 64, 64)])
def test_the_fused_mlp(kernels: SimpleNamespace, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """More tiles than programs, whole tiles and parts of some: forward and backward as in float64."""
    if ON_GPU and torch.cuda.get_device_capability(DEVICE) != HOPPER:
        pytest.skip("this GPU is no Hopper")
    N, C, H = size
    generator = torch.Generator().manual_seed(N)
    inputs = [0.1 * torch.randn(shape, generator=generator).to(dtype) for shape in ((N, C), (H, C), (C, H))]
    grad = torch.randn(N, C, generator=generator)
    mine = [x.to(DEVICE).requires_grad_() for x in inputs]
    x, up, down = exact = [x.double().requires_grad_() for x in inputs]
    found, expected = kernels.mlp.mlp(*mine), F.linear(F.relu(F.linear(x, up)).square(), down)
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    assert relative_error(found, expected) < tolerance
    grads = torch.autograd.grad(found, mine, grad.to(DEVICE, dtype)), torch.autograd.grad(expected, exact, grad.double())
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("dtype", [HALF] if ON_GPU else DTYPES)
@pytest.mark.parametrize("compiled", [False, True] if ON_GPU else [False])
@pytest.mark.parametrize(("heads", "kv_heads", "D", "T"), [(3, 3, 64, 100), (4, 2, 48, 50), (6, 1, 128, 33)])
def test_heads_by_one_kernel(
    kernels: SimpleNamespace, heads: int, kv_heads: int, D: int, T: int, compiled: bool, dtype: torch.dtype
) -> None:
    """Queries, keys, values and the gradient of what they are made of, as in float32; also where they are next to 0."""
    sizes = [heads * D, kv_heads * D, kv_heads * D]
    qkv, angles = 0.5 * torch.randn(2, T, sum(sizes)), torch.rand(T, D // 2)
    qkv[0, :9] *= 1e-3
    rotary = [x[None, :, None] for x in (angles.cos().repeat(1, 2), torch.cat([angles.sin(), -angles.sin()], dim=1))]
    exact, mine = qkv.to(dtype).float().requires_grad_(), qkv.to(DEVICE, dtype).requires_grad_()
    expected = in_heads(exact.split(sizes, dim=-1), 1.2, rotary)
    fused = torch.compile(kernels.heads.fused_heads) if compiled else kernels.heads.fused_heads
    found = fused(mine, sizes, 1.2, [x.to(DEVICE) for x in rotary])
    grads = [torch.randn(x.shape) for x in expected]
    grad = torch.autograd.grad(found, mine, [g.to(DEVICE, dtype) for g in grads])[0]
    exact_grad = torch.autograd.grad(expected, exact, grads)[0]
    for a, b in [*zip(found, expected, strict=True), (grad[:, 9:], exact_grad[:, 9:]), (grad[0, :9], exact_grad[0, :9])]:
        assert relative_error(a, b) < (1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "vocab_size", "C"), [(50, 300, 100), (1024 if ON_GPU else 20, 9000, 256)])
def test_the_loss_in_one_kernel(kernels: SimpleNamespace, n: int, vocab_size: int, C: int, dtype: torch.dtype) -> None:
    logits, x = (torch.randn(n, width, device=DEVICE).to(dtype) for width in (vocab_size, C))
    logits *= 4
    targets = torch.randint(vocab_size, (n,), device=DEVICE)
    targets[::7] = -1
    expected = chunk_loss(logits.float(), targets, x.float(), LOGIT_CAP)
    found = kernels.loss.chunk_loss(logits, targets, x, LOGIT_CAP)
    for (a, b), rows in zip(zip(found, expected, strict=True), (1, found[2], 1, 1), strict=True):
        assert relative_error(a * rows, b * rows) < (1e-5 if dtype == torch.float32 else 5e-3)

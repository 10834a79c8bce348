"""The optimizer's arithmetic: how each kind of parameter is updated. Used by optim.py and sharded_optim.py.

Muon is three functions, in this order: `nesterov` for any rows, `muon_update` for whole matrices, `apply_update` for any rows.

Methods: Muon (kellerjordan.github.io/posts/muon), in blocks (arXiv 2510.16981), Polar Express (arXiv 2505.16932), NorMuon
(arXiv 2510.05491), cautious weight decay (arXiv 2510.12402), AdamW (arXiv 1711.05101), row-wise Adagrad (arXiv 1906.00091).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from nanochat.devices import get_compute_dtype

if TYPE_CHECKING:
    from nanochat.optim import Group

# Coefficients (a, b, c) of the odd quintics a x + b x^3 + c x^5. Applied in turn, they drive singular values to 1: five
# steps of Polar Express, for singular values of at least 1e-3, with its safety factor of 1.02.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def adamw_update(values: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, group: Group, step: int) -> None:
    """One step of AdamW in place, in one pass over memory. All four tensors have one shape; all but `values` are float32.

    Weight decay is decoupled; eps is added after the bias correction.
    """
    master = values if values.dtype == torch.float32 else values.float()
    torch._fused_adamw_(
        [master], [grad], [exp_avg], [exp_avg_sq], [], [grad.new_full((), step)],
        lr=group.lr, beta1=group.betas[0], beta2=group.betas[1], weight_decay=group.weight_decay, eps=group.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    if master is not values:
        values.copy_(master)


def rows_update(values: Tensor, grad: Tensor, mean_square: Tensor, group: Group) -> None:
    """Update the rows of an embedding (rows, channels) that were looked up, each gradient divided by its row's usual size.

    grad: dense, or sparse with whole rows; mean_square: (rows,) float32, of each row's gradients so far, 0 before the first.
    Rows that were not looked up have no gradient and do not change. State and work are a fraction of AdamW's, and the model
    learns as much (dev/LOG.md). Method: row-wise Adagrad, with a running mean in place of the sum.
    """
    seen: slice | Tensor = slice(None)
    if grad.is_sparse:
        grad = grad.coalesce()
        seen, grad = grad.indices()[0], grad.values()
    now, before = torch.linalg.vector_norm(grad, dim=1).square() / grad.size(1), mean_square[seen]
    after = torch.where(before > 0, before.lerp(now, 1 - group.betas[1]), now)
    after = torch.where(now > 0, after, before)
    mean_square[seen] = after
    update = (grad * (group.lr * after.clamp(min=1e-30).rsqrt())[:, None]).to(values.dtype)
    values[seen] -= update


def nesterov(grad: Tensor, momentum: Tensor, group: Group) -> Tensor:
    """Add a gradient to Muon's momentum, (n, rows, columns) each; returns what is orthogonalized, in the memory of `grad`."""
    momentum.lerp_(grad, 1 - group.momentum)
    return grad.lerp_(momentum, group.momentum)


def muon_update(matrices: Tensor, second_moment: Tensor, group: Group) -> Tensor:
    """Muon's update, before rate and decay, from what `nesterov` gives for whole matrices: (n, rows, columns) float32."""
    update = orthogonalize_blocks(matrices, group.block).float()
    return normalize_neurons(update, second_moment, group.betas[1])


def apply_update(matrices: list[Tensor], update: Tensor, group: Group, shape: torch.Size) -> None:
    """Subtract the Muon update (n, rows, columns) float32, which is overwritten, from matrices or some of their rows.

    shape: of a whole matrix. Weight decay is cautious: it applies only where it pulls the same way as the update.
    """
    lr = group.lr * max(1.0, shape[0] / shape[1]) ** 0.5
    if update.is_cuda:  # as few kernel launches as possible
        if group.weight_decay:
            _decay(update, torch.stack(matrices), group)
        torch._foreach_sub_(matrices, list(update.unbind()), alpha=lr)
        return
    for values, change in zip(matrices, update, strict=True):  # one matrix at a time, while it is in the cache
        if group.weight_decay:
            _decay(change, values, group)
        values.sub_(change, alpha=lr)


def _decay(change: Tensor, values: Tensor, group: Group) -> None:
    change.addcmul_(values, (change * values).gt_(0), value=group.weight_decay)


def second_moment_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape for matrices (..., rows, columns): one number for each row or each column, whichever there are more of."""
    *n, rows, columns = shape
    return (*n, rows, 1) if rows >= columns else (*n, 1, columns)


def orthogonalize_blocks(matrices: Tensor, block: tuple[int, ...] | None) -> Tensor:
    """`orthogonalize` each block of matrices (n, rows, columns), and scale to the norm that the whole matrix would have."""
    if block is None:
        return orthogonalize(matrices)
    n, rows, columns = matrices.shape
    down, across = rows // block[0], columns // block[1]
    blocks = matrices.view(n, down, block[0], across, block[1]).transpose(2, 3)
    result = orthogonalize(blocks.reshape(-1, *block)).view(n, down, across, *block)
    result = result.transpose(2, 3).reshape(n, rows, columns)
    return result * (min(rows, columns) / (down * across * min(block))) ** 0.5


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, U V^T for U S V^T, to the precision that Muon needs.

    matrices: (n, rows, columns) float32; returns the same shape in the compute dtype. The iteration is made for bfloat16.
    Method: Polar Express, arXiv 2505.16932.
    """
    dtype = get_compute_dtype(matrices.device)
    x = matrices if dtype == torch.float16 else matrices.to(dtype)  # small values would underflow in float16: divide first
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32) * 1.02 + 1e-6).to(x.dtype)
    x = x.to(dtype)
    if dtype == torch.float32 and x.size(-1) >= 2 * x.size(-2):
        x = _product_of_polynomials(x @ x.mT) @ x
        return x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _product_of_polynomials(gram: Tensor) -> Tensor:
    """The factor by which all iterations together multiply matrices X, from their Gram matrices X X^T, (n, rows, rows).

    An iteration multiplies X by P = a + b G + c G^2, so G = X X^T becomes P G P: nothing as wide as X is multiplied on the
    way. Only for float32: the rounding errors that G brings along from 16 bits grow with each iteration.
    """
    product = polynomial = None
    for a, b, c in POLAR_EXPRESS:
        if polynomial is not None:
            gram = polynomial @ gram @ polynomial
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
    return cast("Tensor", product)


def normalize_neurons(update: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """Divide each neuron's update by its running root mean square, then restore each matrix's norm.

    update: (n, rows, columns), changed in place; second_moment: (n, rows, 1) or (n, 1, columns). Method: NorMuon.
    """
    reduced = -1 if second_moment.size(-1) == 1 else -2
    mean_square = torch.linalg.vector_norm(update, dim=reduced, keepdim=True).square() / update.size(reduced)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp(min=1e-10).rsqrt()
    norm_before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    norm_after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return update.mul_(scale * (norm_before / norm_after.clamp(min=1e-10)))

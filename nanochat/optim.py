"""MuonAdamW: Muon for matrices, AdamW for head and scalars, row-wise Adagrad for embeddings; on one rank or many.

Built by GPT.setup_optimizer, driven by trainer.py. With several ranks, each unit's rows are divided over the ranks as
evenly as they go; some ranks may own none. Gradients arrive by reduce-scatter (summed: the trainer scales the loss), each
rank updates its rows, and the new values leave by all-gather. Collectives overlap with the updates of other units. A rank
keeps optimizer state only for the rows it owns.

The arithmetic is in updates.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.common import NanochatError
from nanochat.devices import in_process_group
from nanochat.updates import adamw_update, apply_update, muon_update, nesterov, rows_update, second_moment_shape

if TYPE_CHECKING:
    from nanochat.gpt import GPT

# Older versions of PyTorch have only the second names; newer versions warn about them.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class OptimizerSettings:
    """Peak learning rates by kind of parameter, and the optimizer's other settings."""

    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    scalar_lr: float = 0.5
    weight_decay: float = 0.2  # of matrices
    adam_betas: tuple[float, float] = (0.8, 0.95)
    adam_eps: float = 1e-10
    # The scalars' first gradient should be 0, because a norm cancels it. What is left is rounding error, which Adam would
    # scale up to a full step.
    scalar_eps: float = 1e-6
    muon_momentum: float = 0.95
    muon_beta2: float = 0.9
    muon_blocks: bool = True  # orthogonalize each head, and groups of as many neurons, separately; False: whole matrices

    def __post_init__(self) -> None:
        """Raises NanochatError for meaningless values, and names them as --set does."""
        pair = tuple(self.adam_betas)
        shares = {"adam_betas": pair, "muon_momentum": (self.muon_momentum,), "muon_beta2": (self.muon_beta2,)}
        for name, values in shares.items():
            if not all(isinstance(value, int | float) and 0 <= value < 1 for value in values):
                raise NanochatError(f"{name} cannot be {getattr(self, name)}: choose 0 or more, and less than 1")
        if len(pair) != 2:
            raise NanochatError(f"adam_betas cannot be {pair}: give two numbers, as (0.8,0.95)")
        for name in ("adam_eps", "scalar_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise NanochatError(f"{name} cannot be {getattr(self, name)}: choose 0 or more")


@dataclass
class Group:
    """Parameters that are updated alike. The trainer's schedules change `lr`, `momentum` and `weight_decay`."""

    kind: str  # "muon": matrices of one shape, stacked; "rows": embeddings; "adamw": any shapes
    names: list[str]
    params: list[nn.Parameter]
    initial_lr: float
    initial_weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10
    initial_momentum: float = 0.95
    block: tuple[int, ...] | None = None  # rows and columns that Muon orthogonalizes at a time; None: whole matrices
    lr: float = field(init=False)
    momentum: float = field(init=False)
    weight_decay: float = field(init=False)

    def __post_init__(self) -> None:
        self.lr, self.momentum, self.weight_decay = self.initial_lr, self.initial_momentum, self.initial_weight_decay


def build_optimizer(model: GPT, settings: OptimizerSettings) -> MuonAdamW:
    """Sort a GPT's parameters into groups. The rates of embeddings and head are scaled by (n_embd / 768)^-1/2.

    It also decides which embeddings get sparse gradients from now on.
    """
    _choose_sparse_gradients(model)
    width_scale = (model.config.n_embd / 768) ** -0.5
    adam: dict[str, Any] = {"betas": settings.adam_betas, "eps": settings.adam_eps}
    by_name = dict(model.named_parameters())

    def take(*prefixes: str) -> tuple[list[str], list[nn.Parameter]]:
        names = [name for name in by_name if name.startswith(prefixes)]
        return names, [by_name.pop(name) for name in names]

    tables = (f"{name}." for name in model.tables())
    others = [
        Group("adamw", *take("lm_head."), settings.unembedding_lr * width_scale, **adam),
        Group("rows", *take(*tables), settings.embedding_lr * width_scale, betas=settings.adam_betas),
        # Each of these scales the whole residual stream, so their rate is a hundredth of that of x0_lambdas.
        Group("adamw", *take("resid_lambdas"), settings.scalar_lr * 0.01, betas=settings.adam_betas, eps=settings.scalar_eps),
        Group("adamw", *take("x0_lambdas"), settings.scalar_lr, betas=(0.96, 0.95), eps=settings.scalar_eps),
    ]
    alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}  # names of matrices by shape and block
    for name, p in by_name.items():
        if not name.startswith("blocks.") or p.dim() != 2:
            raise ValueError(f"{name} is in no group of the optimizer: add one in build_optimizer")
        block = _block(name, p.shape, model.config.head_dim) if settings.muon_blocks else tuple(p.shape)
        alike.setdefault((tuple(p.shape), block), []).append(name)
    muon = [
        Group(
            "muon", names, [by_name[name] for name in names], settings.matrix_lr,
            initial_weight_decay=settings.weight_decay, betas=(0.0, settings.muon_beta2),
            initial_momentum=settings.muon_momentum, block=None if block == shape else block,
        )
        for (shape, block), names in sorted(alike.items())
    ]  # fmt: skip
    # Order matters with several ranks: the other groups are large but cheap, so their reduce overlaps the first half
    # of Muon and their gather the second.
    half = len(muon) // 2
    return MuonAdamW([group for group in (*muon[:half], *others, *muon[half:]) if group.params], model.is_sharded)


def _choose_sparse_gradients(model: GPT) -> None:
    """Use them for tables on a CPU in a single process: several ranks send whole tables, and on a GPU those cost little."""
    for table in model.tables().values():
        table.sparse = table.weight.device.type == "cpu" and not in_process_group()


def _block(name: str, shape: torch.Size, head_dim: int) -> tuple[int, int]:
    """What Muon orthogonalizes at a time: one head, that is head_dim rows of c_q, c_k or c_v, or head_dim columns of c_proj.

    MLP neurons are grouped the same way: as good, and smaller blocks are less work (dev/LOG.md, "Muon in blocks").
    """
    rows, columns = shape
    if name.endswith("c_proj.weight"):
        return (rows, head_dim)
    return (head_dim, columns) if rows % head_dim == 0 else (rows, columns)


class MuonAdamW:
    """The optimizer. `step()` sums gradients over the ranks, except those of a sharded model, which are summed already."""

    def __init__(self, groups: list[Group], sharded: bool = False) -> None:
        self.groups, self.sharded = groups, sharded
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if in_process_group() else (0, 1)
        self.steps = 0  # updates done so far, for Adam's bias correction
        self._units = [unit for group in groups for unit in self._make_units(group)]

    def _make_units(self, group: Group) -> Iterable[Any]:
        """One unit for a group of matrices, which are stacked; one for each parameter of other groups."""
        kinds: dict[str, Any] = UNITS
        if self.sharded:
            from nanochat.sharded_optim import SHARDED_UNITS as kinds
        if group.kind == "muon":
            yield kinds[group.kind](group, group.names, group.params, self.rank, self.world_size)
        else:
            for name, param in zip(group.names, group.params, strict=True):
                yield kinds[group.kind](group, [name], [param], self.rank, self.world_size)

    def zero_grad(self) -> None:
        for group in self.groups:
            for param in group.params:
                param.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter; on several ranks communication overlaps with the updates."""
        self.steps += 1
        for unit in self._units:
            unit.start_reduce()
        for unit in self._units:
            unit.update(self.steps)
        for unit in self._units:
            unit.finish_gather()

    # ------------------------------------------------------------------------- state

    def state_bytes(self) -> int:
        """Bytes of this rank's state."""
        return sum(tensor.nbytes for unit in self._units for tensor in unit.state.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors in a flat dict: "lm_head.weight/exp_avg", ... (a collective call).

        Unsharded: whole tensors, on rank 0 only (CPU if world_size > 1). Sharded: each rank its rows.
        """
        state = {"steps": torch.tensor(self.steps)}
        for unit in self._units:
            state.update(unit.gather_state())
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`, on any number of ranks. Raises KeyError if a tensor is missing."""
        self.steps = int(state["steps"])
        for unit in self._units:
            unit.scatter_state(state)


class _Unit:
    """Parameters that are reduced, updated and gathered together, as a table (rows, ...) whose rows are divided over ranks.

    A row is the smallest part that a rank can update by itself: one number for AdamW, one row of an embedding, one matrix
    for Muon. A new kind defines how parameters become rows, what state each row has and how rows are updated. Register it
    in UNITS and in SHARDED_UNITS (sharded_optim.py).
    """

    def __init__(self, group: Group, names: list[str], params: list[nn.Parameter], rank: int, world_size: int) -> None:
        self.group, self.names, self.params = group, names, params
        self.rank, self.world_size = rank, world_size
        self.rows = self._count_rows()
        self.rows_per_rank = -(-self.rows // world_size)
        self.begin = min(rank * self.rows_per_rank, self.rows)
        self.end = min(self.begin + self.rows_per_rank, self.rows)
        self.state = {name: torch.zeros(self.end - self.begin, *shape, device=params[0].device)
                      for name, shape in self._state_shapes().items()}  # fmt: skip
        self._work: dist.Work | None = None
        self._buffers: tuple[Tensor, ...] = ()  # kept until the collective that uses them is done

    def _count_rows(self) -> int:
        """Rows of all parameters together."""
        return self._as_rows([p.data for p in self.params]).size(0)

    def _as_rows(self, tensors: list[Tensor]) -> Tensor:
        """Arrange tensors shaped like the parameters as a table (rows, ...)."""
        raise NotImplementedError

    def _from_rows(self, rows: Tensor) -> list[Tensor]:
        """The inverse of `_as_rows`, one tensor for each parameter; also of state, whose rows may have another shape."""
        raise NotImplementedError

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of state for one row, by name."""
        raise NotImplementedError

    def start_reduce(self) -> None:
        """Begin to sum the gradients over ranks; once that is done, the first buffer holds this rank's rows."""
        if self.world_size == 1:
            if grads := [p.grad for p in self.params if p.grad is not None]:
                self._buffers = (self._as_rows(grads).float(),)
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params]
        rows = self._padded(self._as_rows(grads).float())
        share = rows.new_empty((self.rows_per_rank, *rows.shape[1:]))
        self._work = reduce_scatter(share, rows, op=dist.ReduceOp.SUM, async_op=True)
        self._buffers = (share, rows)

    def update(self, step: int) -> None:
        """Update this rank's rows and begin to send them to the others; step: from 1, for Adam's bias correction."""
        if self._work is not None:
            self._work.wait()
        if self.world_size == 1:
            if self._buffers:  # otherwise no parameter has a gradient: idle blocks stay as they are
                self._update_rows(self._buffers[0], step)
        elif self.begin < self.end:
            self._update_rows(self._buffers[0][: self.end - self.begin], step)
        self._buffers, self._work = (), None
        self._start_gather()

    def _update_rows(self, grad: Tensor, step: int) -> None:
        """Update this rank's rows from their gradient (own rows, ...) float32, which may be overwritten."""
        raise NotImplementedError

    def _own_rows(self, tensors: list[Tensor]) -> Tensor:
        """This rank's rows of tensors shaped like the parameters."""
        return self._as_rows(tensors)[self.begin : self.end]

    def _start_gather(self) -> None:
        if self.world_size == 1:
            return
        share = self._padded(self._own_rows([p.data for p in self.params]), self.rows_per_rank)
        whole = share.new_empty((self.rows_per_rank * self.world_size, *share.shape[1:]))
        self._work = all_gather(whole, share.contiguous(), async_op=True)
        self._buffers = (whole, share)

    def finish_gather(self) -> None:
        """Wait for the other ranks' rows and write them into the parameters."""
        if self._work is None:
            return
        self._work.wait()
        torch._foreach_copy_([p.data for p in self.params], self._from_rows(self._buffers[0][: self.rows]))
        self._buffers, self._work = (), None

    def _padded(self, rows: Tensor, length: int | None = None) -> Tensor:
        """Append rows of zeros, so that all ranks have the same number."""
        length = length or self.rows_per_rank * self.world_size
        if rows.size(0) == length:
            return rows
        return torch.cat([rows, rows.new_zeros((length - rows.size(0), *rows.shape[1:]))])

    def gather_state(self) -> dict[str, Tensor]:
        """The state of all rows, by parameter name, on rank 0; {} on other ranks (a collective call)."""
        result: dict[str, Tensor] = {}
        for name, share in self.state.items():
            if self.world_size > 1:
                share = self._padded(share, self.rows_per_rank).contiguous()
                whole = share.new_empty((self.rows_per_rank * self.world_size, *share.shape[1:]))
                all_gather(whole, share)
                if self.rank != 0:
                    continue
                share = whole[: self.rows].cpu()  # one unit at a time: a device may have no room for all
            result.update(zip((f"{param}/{name}" for param in self.names), self._from_rows(share), strict=True))
        return result

    def scatter_state(self, state: dict[str, Tensor]) -> None:
        """Take this rank's rows from what `gather_state` returned."""
        for name, mine in self.state.items():
            mine.copy_(self._own_rows([state[f"{param}/{name}"] for param in self.names]))


class _AdamWUnit(_Unit):
    """One parameter of any shape, as a flat vector."""

    def _as_rows(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0].reshape(-1)

    def _from_rows(self, rows: Tensor) -> list[Tensor]:
        return [rows.view(self.params[0].shape)]

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"exp_avg": (), "exp_avg_sq": ()}

    def _update_rows(self, grad: Tensor, step: int) -> None:
        mine = self.params[0].data.view(-1)[self.begin : self.end]
        adamw_update(mine, grad, self.state["exp_avg"], self.state["exp_avg_sq"], self.group, step)


class _RowsUnit(_AdamWUnit):
    """One embedding, by rows. On a CPU with one process, only rows that were looked up are touched (sparse gradients)."""

    def _as_rows(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0]

    def _from_rows(self, rows: Tensor) -> list[Tensor]:
        return [rows]

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"mean_square": ()}

    def _update_rows(self, grad: Tensor, step: int) -> None:
        rows_update(self.params[0].data[self.begin : self.end], grad, self.state["mean_square"], self.group)


class _MuonUnit(_Unit):
    """Matrices of one shape, stacked: (number of matrices, rows, columns)."""

    def _count_rows(self) -> int:
        return len(self.params)

    def _as_rows(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors)

    def _from_rows(self, rows: Tensor) -> list[Tensor]:
        return list(rows.unbind())

    def _own_rows(self, tensors: list[Tensor]) -> Tensor:
        if self.begin == self.end:
            return tensors[0].new_empty((0, *tensors[0].shape))
        return self._as_rows(tensors[self.begin : self.end])

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = self.params[0].shape
        return {"momentum": shape, "second_moment": second_moment_shape(shape)}

    def _update_rows(self, grad: Tensor, step: int) -> None:
        group = self.group
        # Idle blocks come first and have no gradients, so `grad` belongs to the last grad.size(0) matrices.
        learning = slice(self.end - self.begin - grad.size(0), None)
        mine = self.params[self.begin : self.end][learning]
        momentum, second_moment = (self.state[name][learning] for name in ("momentum", "second_moment"))
        update = muon_update(nesterov(grad, momentum, group), second_moment, group)
        apply_update([p.data for p in mine], update, group, grad.shape[-2:])


UNITS: dict[str, type[_Unit]] = {"muon": _MuonUnit, "rows": _RowsUnit, "adamw": _AdamWUnit}  # by Group.kind

"""Muon and AdamW for parameters whose rows are spread over the ranks (sharding.py). Built by optim.py; same interface.

AdamW works on local rows only. Muon needs whole matrices: each rank owns some of a group's, receives their rows from all
ranks, orthogonalizes them and sends the rows of the result back; momentum and weights stay where their rows are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from nanochat.optim import Group, all_gather
from nanochat.updates import adamw_update, apply_update, muon_update, nesterov, rows_update, second_moment_shape


def local_rows(values: Tensor, like: DTensor) -> Tensor:
    """This rank's rows, in float32, of a tensor (whole or already sharded) with the layout of the parameter `like`."""
    if not isinstance(values, DTensor):
        values = values.to(like.device, torch.float32)
        values = distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)
    return values.to_local()


def as_sharded(rows: Tensor, like: DTensor) -> DTensor:
    """The inverse of `local_rows`: all ranks' rows as one tensor. `rows` may also be state with other numbers per row."""
    shape = torch.Size((like.size(0), *rows.shape[1:]))
    return DTensor.from_local(rows, like.device_mesh, like.placements, shape=shape, stride=rows.stride())


def local_grad(param: DTensor) -> Tensor:
    grad: Any = param.grad  # a DTensor like its parameter
    return torch.zeros_like(param.to_local()) if grad is None else grad.to_local()


class ShardedAdamWUnit:
    """One parameter; everything happens on this rank's rows."""

    def __init__(self, group: Group, names: list[str], params: list[Any], rank: int, world_size: int) -> None:
        self.group, (self.name,), (self.param,) = group, names, params
        self.state = self._new_state(self.param.to_local())

    def _new_state(self, rows: Tensor) -> dict[str, Tensor]:
        return {kind: torch.zeros_like(rows) for kind in ("exp_avg", "exp_avg_sq")}

    def start_reduce(self) -> None:
        """Does nothing: fully_shard has summed the gradients."""

    def update(self, step: int) -> None:
        rows = self.param.to_local()
        if rows.numel():
            adamw_update(rows, local_grad(self.param), self.state["exp_avg"], self.state["exp_avg_sq"], self.group, step)

    def finish_gather(self) -> None:
        """Does nothing: each rank only keeps its own rows."""

    def gather_state(self) -> dict[str, Tensor]:
        return {f"{self.name}/{kind}": as_sharded(rows, self.param) for kind, rows in self.state.items()}

    def scatter_state(self, state: dict[str, Tensor]) -> None:
        for kind, rows in self.state.items():
            rows.copy_(local_rows(state[f"{self.name}/{kind}"], self.param))


class ShardedRowsUnit(ShardedAdamWUnit):
    """One embedding, by the rows held here."""

    def _new_state(self, rows: Tensor) -> dict[str, Tensor]:
        return {"mean_square": rows.new_zeros(rows.size(0))}

    def update(self, step: int) -> None:
        rows = self.param.to_local()
        if rows.numel():
            rows_update(rows, local_grad(self.param), self.state["mean_square"], self.group)


class ShardedMuonUnit:
    """n matrices of one shape; this rank owns `owned` of them and holds `height` rows of each."""

    def __init__(self, group: Group, names: list[str], params: list[Any], rank: int, world_size: int) -> None:
        self.group, self.names, self.params = group, names, params  # DTensors, which torch types as parameters
        self.world_size = world_size
        n, (rows, columns) = len(self.params), self.params[0].shape
        per_rank, chunk = -(-n // world_size), -(-rows // world_size)
        bounds = [min(r * per_rank, n) for r in range(world_size + 1)]
        self.counts = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]  # matrices of each owner
        self.heights = [max(0, min(chunk, rows - r * chunk)) for r in range(world_size)]  # rows that each rank holds
        self.owned, self.height, self.columns = self.counts[rank], self.heights[rank], columns
        self.begin = bounds[rank]
        device = self.params[0].device
        self.state = {
            "momentum": torch.zeros(n, self.height, columns, device=device),
            "second_moment": torch.zeros(second_moment_shape((self.owned, rows, columns)), device=device),
        }
        self._work: Any = None  # dist.Work, while one is under way
        self._buffers: tuple[Tensor, ...] = ()  # kept until the collective that uses them is done

    def _send(self, rows: Tensor, sent: list[int], received: list[int]) -> None:
        """Begin to exchange rows of `columns` numbers; they arrive in the first buffer."""
        arriving = rows.new_empty(sum(received), self.columns)
        group = self.params[0].device_mesh.get_group()
        self._work = dist.all_to_all_single(arriving, rows, received, sent, group=group, async_op=True)
        self._buffers = (arriving, rows)

    def _received(self) -> Tensor:
        self._work.wait()
        arrived = self._buffers[0]
        self._work, self._buffers = None, ()
        return arrived

    def _splits(self) -> tuple[list[int], list[int]]:
        """Rows exchanged with each other rank: (rows held here of its matrices, rows that it holds of this rank's)."""
        return [count * self.height for count in self.counts], [self.owned * height for height in self.heights]

    def start_reduce(self) -> None:
        """Apply Nesterov momentum to the rows held here, then send them to the owners of their matrices."""
        grad = torch.stack([local_grad(param).float() for param in self.params])
        held, owned = self._splits()
        self._send(nesterov(grad, self.state["momentum"], self.group).flatten(0, 1), held, owned)

    def update(self, step: int) -> None:
        """Compute the updates of the matrices owned here, and begin to send their rows back."""
        rows = self._received()
        held, owned = self._splits()
        if self.owned:
            parts = zip(rows.split(owned), self.heights, strict=True)
            matrices = torch.cat([part.view(self.owned, height, self.columns) for part, height in parts], dim=1)
            directions = muon_update(matrices, self.state["second_moment"], self.group)
            rows = torch.cat([part.flatten(0, 1) for part in directions.split(self.heights, dim=1)])
        self._send(rows, owned, held)

    def finish_gather(self) -> None:
        directions = self._received().view(len(self.params), self.height, self.columns)
        values = [param.to_local() for param in self.params]
        apply_update(values, directions, self.group, self.params[0].shape)

    # ------------------------------------------------------------------------- state

    def gather_state(self) -> dict[str, Tensor]:
        """Momentum as sharded rows; the small second moment whole on every rank."""
        per_rank = self.counts[0]
        share = self.state["second_moment"].new_zeros(per_rank, *self.state["second_moment"].shape[1:])
        share[: self.owned] = self.state["second_moment"]
        whole = share.new_empty(per_rank * self.world_size, *share.shape[1:])
        all_gather(whole, share, group=self.params[0].device_mesh.get_group())
        momentum = {f"{name}/momentum": as_sharded(rows, param)
                    for name, rows, param in zip(self.names, self.state["momentum"], self.params, strict=True)}  # fmt: skip
        return momentum | {f"{name}/second_moment": whole[i].clone() for i, name in enumerate(self.names)}

    def scatter_state(self, state: dict[str, Tensor]) -> None:
        for name, rows, param in zip(self.names, self.state["momentum"], self.params, strict=True):
            rows.copy_(local_rows(state[f"{name}/momentum"], param))
        for i in range(self.owned):
            self.state["second_moment"][i].copy_(state[f"{self.names[self.begin + i]}/second_moment"])


SHARDED_UNITS: dict[str, Any] = {"muon": ShardedMuonUnit, "rows": ShardedRowsUnit, "adamw": ShardedAdamWUnit}

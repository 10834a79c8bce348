"""Models too large for one GPU: shards parameters over all ranks with PyTorch's fully_shard (FSDP2). Used with --fsdp.

Each rank holds its rows of every parameter. A block's matrices are whole only while it computes; gradients arrive as sums,
sharded the same way, and sharded_optim.py updates the parts. Each rank writes its own parts of a checkpoint with
torch.distributed.checkpoint; any number of ranks can read it, or one process as a whole without a process group.
"""

from __future__ import annotations

import errno
import functools
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nanochat.common import NanochatError, first_line
from nanochat.devices import get_compute_dtype
from nanochat.gpt import GPT

# The classes that the metadata of a checkpoint of tensors consist of, by module.
RECORDS = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
}  # fmt: skip


def shard(model: GPT, device: torch.device) -> None:
    """Shard the parameters of a model, preferably one still on the meta device, over all ranks.

    Blocks are sent in the compute dtype; embeddings, head and scalars in float32. Raises NanochatError
    outside torchrun.
    """
    if not dist.is_initialized():
        raise NanochatError("--fsdp cuts the model over several processes: start it with torchrun --nproc_per_node=N")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(get_compute_dtype(device), reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        block.forward = functools.partial(model.run_block, block)  # within the hooks that gather its parameters
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for table in model.tables().values():
        if table is not model.wte:  # which is gathered at the start, with the head
            fully_shard(table, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the loss reads the head after the forward pass
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the trainer divides by the tokens of all ranks
            module.set_force_sum_reduction_for_comms(True)
    model.is_sharded = True


def end_pass(model: nn.Module) -> None:
    """Clean up after a pass that failed: otherwise later passes would silently give wrong gradients, or none."""
    model.zero_grad(set_to_none=True)  # of parameters that are whole at the moment
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def fill(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy a whole tensor into a parameter or state, of which this rank may hold only a part. No communication."""
    values = values.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    with torch.no_grad():
        target.copy_(values)


def write_sharded(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write parts into `directory`: each rank its own; what all ranks have is written once (a collective call).

    Raises OSError on every rank if one of them fails.
    """
    try:
        dcp.save(dict(tensors), checkpoint_id=directory)
    except dcp.api.CheckpointException as error:
        reasons = [wrapped[0] for wrapped in error.failures.values()]
        raise OSError(next(filter(None, map(_errno, reasons)), errno.EIO), f"{reasons[0]}", str(directory)) from error


def _errno(reason: BaseException) -> int | None:
    """The system's errno, if there is one: PyTorch's writer notices a full disk only because a tensor is cut short."""
    if "inline_container" in str(reason) and "unexpected pos" in str(reason):
        return errno.ENOSPC
    return reason.errno if isinstance(reason, OSError) else None


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles only what PyTorch writes about tensors into a checkpoint's .metadata, and does not even import the rest.

    Above all no functions, and no BytesStorageMetadata: PyTorch would unpickle what that names without any check.
    """

    def find_class(self, module: str, name: str) -> Any:
        is_path = module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath", "PurePosixPath")
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_path or is_dtype or name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not something that PyTorch writes there about tensors")


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader, but reading the metadata (a pickle) runs no code of the checkpoint's author.

    The metadata is that of the whole checkpoint, never one rank's. It lists every part of every tensor, so it is read once.
    """

    @functools.cached_property
    def metadata(self) -> dcp.Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata: dcp.Metadata = _MetadataUnpickler(file).load()
                return metadata
        except (pickle.UnpicklingError, AttributeError, ImportError, EOFError) as error:
            raise NanochatError(
                f"{path} is not read ({first_line(error)}): get the checkpoint from whoever trained it"
            ) from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        return self.metadata


def read_sharded(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors (whole or sharded) by name. Reads only what is needed; no communication.

    Raises KeyError for a missing tensor.
    """
    _fill_all(_Reader(directory), tensors)


def _fill_all(reader: _Reader, tensors: dict[str, torch.Tensor]) -> None:
    known = reader.metadata.state_dict_metadata  # read here: errors inside `load` come out wrapped in a trace
    if absent := next((name for name in tensors if name not in known), None):
        raise KeyError(absent)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended here
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)


def read_whole(directory: Path, prefix: str) -> dict[str, torch.Tensor]:
    """All tensors whose names begin with the prefix (which is removed), whole and on the CPU."""
    reader = _Reader(directory)
    entries: dict[str, Any] = reader.metadata.state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in entries.items() if name.startswith(prefix)}  # fmt: skip
    _fill_all(reader, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

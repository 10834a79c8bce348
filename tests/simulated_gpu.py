"""Runs a command of ours on a simulated GPU: python tests/simulated_gpu.py LIBRARY MODULE [ARGUMENTS].

Tensors say "cuda" and are computed on the CPU (simulated_gpu.cpp, built as LIBRARY); everything else of torch.cuda is made up
here. So all code for GPUs runs except kernels, graphs, streams and the compiler. Prints, as JSON in the last line, where the
host waited for the GPU: [operation, names of our functions from the innermost one] each.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
# Results whose size or value the host must know.
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal.", "aten.bincount", "aten._unique",
         "aten.unique_", "aten.repeat_interleave.Tensor")  # fmt: skip
PROPERTIES = SimpleNamespace(total_memory=141 << 30, multi_processor_count=132, name="Simulated GPU", major=9, minor=0)
ANSWERS = {
    "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
    "get_device_name": PROPERTIES.name, "get_device_properties": PROPERTIES, "get_arch_list": ["sm_90"],
    "mem_get_info": (130 << 30, 141 << 30), "max_memory_reserved": 1 << 30, "max_memory_allocated": 1 << 30,
    "memory_allocated": 1 << 30, "is_initialized": True, "is_current_stream_capturing": False, "is_bf16_supported": True,
    "set_device": None, "set_stream": None, "manual_seed": None, "manual_seed_all": None, "empty_cache": None,
    "reset_peak_memory_stats": None, "_lazy_init": None,
}  # fmt: skip


class Event:
    """An event, or a stream: all is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, _: Event) -> None: ...


def simulate(library: str) -> list[tuple[str, list[str]]]:
    """From here on PyTorch has a GPU. Returns the list that waits are added to. Call it before PyTorch is imported."""
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    import torch
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    waits: list[tuple[str, list[str]]] = []

    def wait(operation: str) -> None:
        frames = (frame for frame in traceback.extract_stack() if Path(frame.filename).parent == ROOT / "nanochat")
        waits.append((operation, [frame.name for frame in frames][::-1]))

    class Watch(TorchDispatchMode):
        """Notes the operations for which the host has to wait, and does one that only GPUs have."""

        def __torch_dispatch__(self, func: Any, _: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
            name, kwargs = str(func), kwargs or {}
            on_gpu = any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args)
            if name == "aten.copy_.default" and args[0].is_cuda != args[1].is_cuda and not args[2:]:
                wait(name)
            elif name == "aten._to_copy.default" and "device" in kwargs and not kwargs.get("non_blocking"):
                if on_gpu != (torch.device(kwargs["device"] or args[0].device).type == "cuda"):
                    wait(name)
            elif on_gpu and name.startswith(READS):
                wait(name)
            elif on_gpu and name.startswith(("aten.index.", "aten.index_put")):
                if any(index is not None and index.dtype == torch.bool for index in args[1]):
                    wait(name)
            elif name == "aten.addmm.dtype_out":
                return kwargs["out"].copy_(args[0].float() + args[1].float() @ args[2].float())
            return func(*args, **kwargs)

    class Unpinned(TorchFunctionMode):
        """Pinned memory is ordinary memory."""

        def __torch_function__(self, func: Any, _: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
            if func is torch.Tensor.pin_memory:
                return args[0]
            return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Generator:
            return super().__new__(cls)

    def answer(value: Any) -> Any:
        return lambda *_, **__: value

    for name, value in ANSWERS.items():
        setattr(torch.cuda, name, answer(value))
    made_up = {
        "synchronize": lambda *_: wait("synchronize"), "Event": Event, "Stream": Event, "current_stream": answer(Event()),
        "stream": lambda _: contextlib.nullcontext(),
    }  # fmt: skip
    for name, value in made_up.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator  # type: ignore[misc]
    Watch().__enter__()
    Unpinned().__enter__()
    return waits


def main() -> int:
    library, name, *arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    waits = simulate(library)
    from nanochat import machine, pace, trainer
    from nanochat.common import run_command

    for module in (machine, pace, trainer):  # products that keep a real GPU busy would take minutes
        vars(module)["measure_matmul_rate"] = lambda *_: 1e12
    script = importlib.import_module(name)
    code = run_command(lambda _: script.main(arguments))
    print(json.dumps(waits))
    return code


if __name__ == "__main__":
    sys.exit(main())

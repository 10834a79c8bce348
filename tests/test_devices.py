"""The device that is chosen, and the process group that is joined: what cannot be is named."""

from __future__ import annotations

import pytest
import torch

from nanochat import devices
from nanochat.common import NanochatError, describe_error
from nanochat.devices import compute_init


def test_a_seed_beyond_what_pytorch_takes_is_named() -> None:
    with pytest.raises(NanochatError, match=r"--seed 9+ is out of range: choose"):
        compute_init("cpu", int("9" * 30))


def test_a_gpu_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Many ranks would train on the processor for ever; one, on a laptop, goes on."""
    monkeypatch.setattr(devices, "autodetect_device_type", lambda: "cpu")
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: True)
    assert compute_init()[4].type == "cpu"
    assert "cannot use this machine's NVIDIA GPU" in capsys.readouterr().err
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NanochatError, match="cannot use this machine's NVIDIA GPU .*--device-type=cpu"):
        compute_init()


@pytest.mark.parametrize(
    ("rank", "capability", "message"),
    [("2", (9, 0), "no GPU for process 2 .* sees 2"), ("0", (7, 0), "7.0, and .* for 7.5 and later")],
)
def test_a_gpu_that_is_missing_or_too_old_is_named(
    monkeypatch: pytest.MonkeyPatch, rank: str, capability: tuple[int, int], message: str
) -> None:
    stand_ins = {
        "is_available": True, "device_count": 2, "get_device_capability": capability, "get_device_name": "a GPU",
        "get_arch_list": ["sm_75", "sm_90", "compute_120"],
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NanochatError, match=message):
        compute_init()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": ""}, "RANK, LOCAL_RANK and WORLD_SIZE are set, but not MASTER_ADDR: unset RANK"),
        ({"MASTER_PORT": ""}, "but not MASTER_PORT"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is no whole number"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536' is no whole number from 0 to 65535"),
        ({"RANK": ""}, "RANK='' is no whole number .* or start with torchrun"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' is no"),
        ({"WORLD_SIZE": "\N{SUPERSCRIPT TWO}"}, "WORLD_SIZE='\N{SUPERSCRIPT TWO}' is no"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_what_torchrun_did_not_set_is_named(monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str) -> None:
    good = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**good, **change}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NanochatError, match=message):
        compute_init("cpu")


def test_errors_of_nccl_are_lost_ranks_only_where_it_says_so() -> None:
    head = "NCCL error in: NCCLUtils.cpp:94, {}, NCCL version 2.27\n{}: Call to {} failed.\nLast error:\n{}"
    lost = torch.distributed.DistBackendError(head.format("remote process exited", "ncclRemoteError", "x", "socket closed"))
    local = torch.distributed.DistBackendError(
        head.format("unhandled cuda error", "ncclUnhandledCudaError", "x", "no /dev/shm")
    )
    assert "another process of this job has gone" in str(describe_error(lost))
    assert "(no /dev/shm): NCCL_DEBUG=INFO" in str(describe_error(local))


@pytest.mark.parametrize(("works", "ranks", "expected"), [(True, False, "mps"), (False, False, "cpu"), (True, True, "cpu")])
def test_mps_is_taken_where_it_works(works: bool, ranks: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a virtual machine that gives it no memory, nor by ranks, which it has no collectives for."""

    def zeros(size: int, device: str) -> None:
        if not works:
            raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch, "zeros", zeros)
    monkeypatch.setattr(devices, "is_ddp_requested", lambda: ranks)
    assert devices.autodetect_device_type() == expected


def test_ranks_may_not_ask_for_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(devices, "get_dist_info", lambda: (True, 0, 0, 2))
    with pytest.raises(NanochatError, match="processes cannot work together on mps: .* use --device-type=cpu"):
        devices.compute_init("mps")

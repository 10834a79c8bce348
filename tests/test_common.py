"""What everything else stands on: files that are whole or not there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from nanochat import common
from nanochat.common import NanochatError, compute_init, describe_error, get_base_dir, run_command
from nanochat.files import atomic_write


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_a_file_is_as_readable_as_one_that_open_makes(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "opened").write_text("x")
        for _ in ("new", "replaced"):
            atomic_write(tmp_path / "atomic", "x")
            assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "opened").stat().st_mode
    finally:
        os.umask(before)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_alone(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    atomic_write(tmp_path / "file", "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, failing, fail)
        atomic_write(tmp_path / "file", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_a_write_that_fails_names_the_file_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OSError) as failure:
        atomic_write(tmp_path / "page.html", "new")
    assert (failure.value.filename, failure.value.filename2) == (str(tmp_path / "page.html"), None)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither HOME nor an entry of passwd, as of a container's user that is a bare number."""

    def refuse(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", refuse)


def test_a_seed_beyond_what_pytorch_takes_is_named() -> None:
    with pytest.raises(NanochatError, match=r"--seed 9+ is out of range: choose"):
        compute_init("cpu", int("9" * 30))


def test_without_a_home_the_way_out_is_named(homeless: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match="no home folder .*: set NANOCHAT_BASE_DIR"):
        get_base_dir()
    assert describe_error(OSError(28, "No space left on device")).startswith("the disk is full")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert get_base_dir() == tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="there is no folder in which none can be made")
def test_a_place_that_can_hold_no_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "/proc/nanochat/base")
    with pytest.raises(NanochatError, match=r"no folder can be made at /proc/nanochat/base: set NANOCHAT_BASE_DIR"):
        get_base_dir()


def test_without_a_home_a_command_ends_with_one_sentence(
    homeless: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also where the fault was another: its trace, which finds no folder to be kept in, is shown."""

    def fail(argv: list[str] | None) -> int:
        raise ValueError("unforeseen")

    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr("nanochat.common._is_command", False)  # as it is again after this test
    assert run_command(lambda argv: int(bool(get_base_dir()))) == 1
    assert capsys.readouterr().err.startswith("error: there is no home folder")
    assert run_command(fail) == 70
    said = capsys.readouterr().err
    assert said.startswith("error: unexpected ValueError (unforeseen): run again with --debug") and "home" not in said


def test_a_gpu_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Many ranks would train on the processor for ever; one, on a laptop, goes on."""
    monkeypatch.setattr(common, "autodetect_device_type", lambda: "cpu")
    monkeypatch.setattr(common, "has_nvidia_gpu", lambda: True)
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

    monkeypatch.setattr(common.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common.torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(common.torch, "zeros", zeros)
    monkeypatch.setattr(common, "is_ddp_requested", lambda: ranks)
    assert common.autodetect_device_type() == expected


def test_ranks_may_not_ask_for_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(common, "get_dist_info", lambda: (True, 0, 0, 2))
    with pytest.raises(NanochatError, match="processes cannot work together on mps: .* use --device-type=cpu"):
        common.compute_init("mps")

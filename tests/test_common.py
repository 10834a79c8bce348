"""What everything else stands on: files that are whole or not there."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat import files
from nanochat.common import NanochatError, describe_error, get_base_dir, run_command
from nanochat.files import atomic_write, replace, replace_directory


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


def test_a_disk_that_is_full_is_named_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not be the disk of NANOCHAT_BASE_DIR."""

    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space") as failure:
        atomic_write(tmp_path / "shard.parquet", "new")
    assert describe_error(failure.value).startswith(f"the disk is full ({tmp_path / 'shard.parquet'})")


@pytest.mark.parametrize("failures", [1, 10, 11])
def test_what_a_virus_scanner_holds_is_renamed_when_it_lets_go(
    tmp_path: Path, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and directories alike; not waited for without end."""
    left = 0

    def refuse_first(rename: Callable[[Path, Path], None], source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise PermissionError(13, "used by another process")
        rename(source, target)

    monkeypatch.setattr(files, "BUSY_TRIES", 10)  # as on Windows
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, functools.partial(refuse_first, getattr(os, name)))
    for rename, make in ((replace, Path.touch), (replace_directory, Path.mkdir)):
        source, target = tmp_path / f"{make.__name__}.tmp", tmp_path / make.__name__
        make(source)
        left = failures
        with pytest.raises(PermissionError) if failures > 10 else contextlib.nullcontext():
            rename(source, target)
        assert (source.exists(), target.exists()) == ((True, False) if failures > 10 else (False, True))


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither HOME nor an entry of passwd, as of a container's user that is a bare number."""

    def refuse(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", refuse)


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

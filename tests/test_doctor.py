"""The doctor says what is there, is quick, and fails only for what nothing works without."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from nanochat import doctor, flash_attention
from nanochat.common import NanochatError
from nanochat.doctor import Finding
from nanochat.flash_attention import list_backends


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no process, and rates of a machine that we know."""
    monkeypatch.setattr(doctor, "examine_hub", lambda: Finding("used", "hub", "answers"))
    monkeypatch.setattr(doctor, "examine_sandbox", lambda: Finding("used", "sandbox", "bwrap"))
    monkeypatch.setattr(doctor, "autodetect_device_type", lambda: "cpu")
    monkeypatch.setattr(doctor, "measure_matmul_rate", lambda device, dtype: 4e11)
    monkeypatch.setattr(doctor, "measure_memory_rate", lambda device: 2e10)
    monkeypatch.setattr(doctor, "list_packages", lambda: ([], {"eval": [], "ray": ["ray is not installed"]}))


def test_one_screen_for_people(quick: None, base_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) < 160
    text = "\n".join(lines)
    for part in ("processor", "torch.compile", str(base_dir), "400 GFLOP/s", "20 GB/s", "not installed: ray", "--depth"):
        assert part in text


def test_the_same_for_machines(quick: None, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    names = {finding["name"] for finding in report["findings"]}
    assert {"processor", "memory", "PyTorch", "numbers", "attention", "sandbox", "hub"} <= names
    rows = report["expected"]["trainings"]
    for row in rows:
        assert row["seconds"] == pytest.approx(row["tokens"] / row["tokens_per_s"])
    for shallow, deep in itertools.pairwise(rows):
        assert shallow["tokens_per_s"] > deep["tokens_per_s"] and shallow["seconds"] < deep["seconds"]


def test_a_base_directory_that_cannot_be_written_is_essential(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "! base directory" in out
    assert "needed: set NANOCHAT_BASE_DIR" in out


def test_without_a_home_the_base_directory_is_what_is_missing(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~no-such-user/nanochat")
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "there is no home folder for ~no-such-user/nanochat" in out and "needed: set NANOCHAT_BASE_DIR" in out


def test_a_small_disk_is_a_problem_and_a_full_one_essential(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, marked, essential in ((1e12, False, False), (5e9, True, False), (1e6, True, True)):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        finding = next(f for f in doctor.examine_base_dir() if f.name == "base directory")
        assert (finding.way_out is not None, finding.essential) == (marked, essential)


def test_shards_are_found_also_where_the_public_nanochat_keeps_them(base_dir: Path) -> None:
    def text() -> str:
        return next(f.text for f in doctor.examine_base_dir() if f.name == "data")

    assert "the builtin text" in text()
    (base_dir / "base_data_climbmix").mkdir()
    (base_dir / "base_data_climbmix" / "shard_00000.parquet").touch()
    assert text() == f"1 shard of climbmix in {base_dir / 'base_data_climbmix'}"


def test_an_unknown_dtype_is_essential(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "int7")
    assert doctor.main([]) == 1
    assert "needed: unset NANOCHAT_DTYPE" in capsys.readouterr().out


def test_attention_that_was_asked_for_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def finding() -> doctor.Finding:
        flash_attention.choose_backend.cache_clear()
        return next(f for f in doctor.examine_device(torch.device("cpu")) if f.name == "attention")

    monkeypatch.setenv("NANOCHAT_ATTENTION", "plain")
    assert finding().text == "plain: NANOCHAT_ATTENTION says so"
    monkeypatch.setenv("NANOCHAT_ATTENTION", "fa3")
    assert finding().way_out == "unset NANOCHAT_ATTENTION" and finding().essential


def test_without_a_compiler_it_works_and_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "try_to_compile", lambda device: "no C++ compiler is installed (g++ or clang++)")
    finding = next(f for f in doctor.examine_device(torch.device("cpu")) if f.name == "torch.compile")
    assert "g++" in finding.way_out and not finding.essential


def test_packages_are_judged_by_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=1", "torch==0.1", "no-such-package", "no-such-extra; extra == 'more'", "torch; extra == 'less'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    extras = type("Metadata", (), {"get_all": lambda self, key: ["more", "less", "gpu"]})()
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: extras)
    core, found = doctor.list_packages()
    assert core == [f"torch is {importlib.metadata.version('torch')}, and ==0.1 is needed", "no-such-package is not installed"]
    assert found == {"more": ["no-such-extra is not installed"], "less": []}
    assert doctor._what_is_wrong(Requirement(f"torch=={torch.__version__.partition('+')[0]}")) is None


def test_the_hub_is_not_asked_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor.urllib.request, "urlopen", None)
    assert "HF_HUB_OFFLINE" in doctor.examine_hub().text
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for endpoint in ("http://127.0.0.1:1", "http://127.0.0.1:abc"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        finding = doctor.examine_hub()
        assert "cannot be reached" in finding.text and finding.way_out and not finding.essential


def test_a_sandbox_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NanochatError("nothing isolates here (bwrap: not installed): install bubblewrap")

    monkeypatch.setattr("nanochat.execution.choose_launcher", refuse)
    assert doctor.examine_sandbox().way_out == "install bubblewrap"


def test_a_check_that_hangs_is_not_waited_for() -> None:
    import threading

    stuck = threading.Event()
    probe = doctor.Probe("hub", lambda: Finding("used", "hub", str(stuck.wait())), timeout_s=0.01)
    assert "no answer" in probe.finding().text
    stuck.set()


@pytest.mark.parametrize(
    ("seconds", "text"), [(30, "30 seconds"), (6000, "100 minutes"), (108_000, "30 hours"), (4e6, "46 days"), (1e8, "3 years")]
)
def test_durations_are_in_a_unit_that_one_can_imagine(seconds: float, text: str) -> None:
    assert doctor.describe_duration(seconds) == text


@pytest.mark.parametrize(
    ("capability", "dtype", "packages", "kernel", "absent"),
    [
        ((9, 0), torch.bfloat16, ["flash-attn-4", "flash-attn-3"], "FlashAttention 4", None),
        ((9, 0), torch.bfloat16, ["flash-attn"], "FlexAttention", "flash-attn-4"),
        ((9, 0), torch.float32, ["flash-attn-4"], "FlexAttention", None),
        ((7, 5), torch.float16, ["flash-attn-3"], "FlashAttention 3", "flash-attn-4"),
        ((7, 5), torch.float16, [], "matrix products", None),
    ],
)
def test_it_names_the_attention_of_a_gpu(
    capability: tuple[int, int], dtype: torch.dtype, packages: list[str], kernel: str, absent: str | None, monkeypatch
) -> None:
    """Without importing a package that may be broken; FlashAttention 2 is not ours."""

    def version(name: str) -> str:
        if name in packages:
            return "1.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    text = doctor._describe_attention(torch.device("cuda"), dtype)
    assert text.startswith(kernel)
    assert text.endswith(f"({absent} is not installed)") if absent else "not installed" not in text


def test_every_kernel_of_attention_has_a_title(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert {backend.name for backend in list_backends(torch.device("cuda"), torch.bfloat16, True)} <= set(doctor.KERNELS)

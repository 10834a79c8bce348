"""Reports what this machine has, what nanochat will use and why, and what to expect: python -m nanochat.doctor

Prints one screen of text, with a way out of each problem; --json is for machines. Exit code 1 if something essential is
broken. Rates are measured; times are computed from them and the expected share of the matmul rate (expected_mfu).
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from nanochat.common import NanochatError, describe_error, get_base_dir, run_command
from nanochat.compilation import try_to_compile
from nanochat.cpu import INSTRUCTIONS, available_memory, cpu_name, has_instructions, usable_cores
from nanochat.devices import autodetect_device_type, get_compute_dtype, has_nvidia_gpu
from nanochat.flash_attention import asked_backend, choose_backend, list_backends
from nanochat.gpt import GPT
from nanochat.hub_shards import hub_files
from nanochat.machine import expected_mfu, measure_matmul_rate, measure_memory_rate
from nanochat.memory import RESERVED, TrainingLayout, largest_depth
from nanochat.scaling import TOKENS_PER_PARAM, config_for_depth, plan_horizon
from nanochat.settings import SettingsParser

DEPTHS = {"cpu": (4, 8, 12), "cuda": (12, 20, 24), "mps": (4, 8, 12)}
VOCAB_SIZE, SEQUENCE_LEN = 2**15, 2048  # the defaults of tok_train and base_train
# Backends of attention by name, and the package that each needs.
KERNELS = {
    "fa4": ("FlashAttention 4", "flash-attn-4"),
    "flex": ("FlexAttention", None),
    "fa3": ("FlashAttention 3", "flash-attn-3"),
}
LEAST_DISK, MODEST_DISK = 1e9, 20e9  # bytes
HUB_TIMEOUT_S, SANDBOX_TIMEOUT_S = 2.0, 4.0


@dataclass(frozen=True)
class Finding:
    """One line: what was found and, if it is a problem, the way out. essential: nothing works until it is solved."""

    section: str
    name: str
    text: str
    way_out: str | None = None
    essential: bool = False


# ----------------------------------------------------------------------------- the machine and its software


def examine_machine(device_type: str) -> Iterator[Finding]:
    usable, count = usable_cores(), os.cpu_count() or 1
    cores = f"{count} cores" + (f" ({usable} of them for this process)" if usable < count else "")
    cores += "".join(f", {name}" for name in INSTRUCTIONS if has_instructions(name))
    yield Finding("machine", "processor", f"{cpu_name()}: {cores}")
    total = psutil.virtual_memory().total
    yield Finding("machine", "memory", f"{available_memory() / 1e9:.1f} of {total / 1e9:.1f} GB free")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"{properties.major}.{properties.minor}"
        size = f"{torch.cuda.mem_get_info(i)[0] / 1e9:.1f} of {properties.total_memory / 1e9:.1f} GB free"
        yield Finding("machine", f"GPU {i}", f"{properties.name}: {size}, compute capability {capability}")
    if device_type == "mps":
        yield Finding("machine", "GPU", "Apple's, which shares the memory")
    if device_type == "cpu":
        if has_nvidia_gpu():
            way_out = "install the CUDA build with bash runs/setup.sh, and a driver that is new enough for it"
            yield Finding("machine", "GPU", f"an NVIDIA GPU that PyTorch {torch.__version__} cannot use", way_out)
        else:
            yield Finding("machine", "GPU", "none")


def examine_software() -> Iterator[Finding]:
    yield Finding("software", "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    threads = torch.get_num_threads()
    yield Finding("software", "PyTorch", f"{torch.__version__}, {threads} thread{'s' * (threads != 1)}")
    try:
        core, extras = list_packages()
    except importlib.metadata.PackageNotFoundError:
        yield Finding("software", "packages", "nanochat itself is not installed", "bash runs/setup.sh, or pip install -e .")
        return
    if core:
        yield Finding("software", "packages", "; ".join(core), "bash runs/setup.sh, or pip install -e .", essential=True)
    else:
        yield Finding("software", "packages", "all that nanochat needs")
    there = [extra for extra, missing in extras.items() if not missing]
    absent = [extra for extra, missing in extras.items() if missing]
    text = f"{', '.join(there) or 'none'}" + (f" (not installed: {', '.join(absent)})" if absent else "")
    yield Finding("software", "extras", text)


def list_packages() -> tuple[list[str], dict[str, list[str]]]:
    """(what is wrong with the packages that nanochat needs, the same for each extra). Raises PackageNotFoundError."""
    wanted = [Requirement(line) for line in importlib.metadata.requires("nanochat") or []]
    names = importlib.metadata.metadata("nanochat").get_all("Provides-Extra") or []

    def wrong(extra: str) -> list[str]:
        needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": extra})]
        return [sentence for requirement in needed if (sentence := _what_is_wrong(requirement))]

    core = wrong("")
    only_torch = ("cpu", "gpu")  # names for uv's package index
    return core, {name: [s for s in wrong(name) if s not in core] for name in names if name not in only_torch}


def _what_is_wrong(requirement: Requirement) -> str | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}, and {requirement.specifier} is needed"
    return None


# ----------------------------------------------------------------------------- what will be used


def examine_device(device: torch.device) -> Iterator[Finding]:
    """How the device computes, and why."""
    yield Finding("used", "device", device.type)
    try:
        dtype = get_compute_dtype(device)
    except NanochatError as error:
        yield Finding("used", "numbers", str(error), "unset NANOCHAT_DTYPE", essential=True)
        return
    natively = "multiplied natively here" if dtype != torch.float32 else "bfloat16 would be emulated here"
    why = "NANOCHAT_DTYPE says so" if os.environ.get("NANOCHAT_DTYPE") else natively
    yield Finding("used", "numbers", f"{str(dtype).removeprefix('torch.')}: {why}")
    try:
        chosen = asked_backend() and f"{choose_backend(device, dtype, 128, True).name}: NANOCHAT_ATTENTION says so"
        yield Finding("used", "attention", chosen or _describe_attention(device, dtype))
    except NanochatError as error:
        yield Finding("used", "attention", str(error), "unset NANOCHAT_ATTENTION", essential=True)
    reason = try_to_compile(device)
    if reason is None:
        yield Finding("used", "torch.compile", "yes")
    else:
        way_out = "apt-get install g++ python3-dev (training runs without, slower)" if "C++" in reason else None
        yield Finding("used", "torch.compile", f"no: {reason}", way_out)


def _describe_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that flash_attention.choose_backend will try first in training; probing it here would take too long."""
    absent: list[str] = []
    for backend in list_backends(device, dtype, fixed_shape=True):
        title, package = KERNELS.get(backend.name, (backend.name, None))
        if package is None or _what_is_wrong(Requirement(package)) is None:
            without = f" ({', '.join(absent)} is not installed)" if absent else ""
            return f"{title}, if its probe succeeds when a command starts{without}"
        absent.append(package)
    return "matrix products of blocks of queries and keys, so that windows save time"


def examine_base_dir() -> Iterator[Finding]:
    """Where everything is written."""
    why = "NANOCHAT_BASE_DIR" if os.environ.get("NANOCHAT_BASE_DIR") else "the default; NANOCHAT_BASE_DIR changes it"
    way_out = "set NANOCHAT_BASE_DIR to a folder on a larger disk, or free some space"
    try:
        base_dir = get_base_dir()
        with tempfile.TemporaryFile(dir=base_dir) as file:
            file.write(b"x" * 4096)
    except (OSError, NanochatError) as error:
        yield Finding("used", "base directory", describe_error(error) or str(error), "set NANOCHAT_BASE_DIR", essential=True)
        return
    free = shutil.disk_usage(base_dir).free
    problem: dict[str, Any] = {"way_out": way_out, "essential": free < LEAST_DISK} if free < MODEST_DISK else {}
    yield Finding("used", "base directory", f"{base_dir} ({why}), {free / 1e9:.1f} GB free", **problem)
    directory, shards = hub_files("climbmix")
    text = f"{len(shards)} shard{'s' * (len(shards) != 1)} of climbmix in {directory}"
    yield Finding("used", "data", text if shards else "the builtin text, since climbmix is not downloaded")


def examine_hub() -> Finding:
    from huggingface_hub import constants

    name = "hub"
    if constants.HF_HUB_OFFLINE:
        return Finding("used", name, "not asked, since HF_HUB_OFFLINE is set: what was downloaded before is used")
    without = "set HTTPS_PROXY or HF_ENDPOINT if your network needs it; --data builtin or PATH need no hub"
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return Finding("used", name, f"{constants.ENDPOINT} answers")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return Finding("used", name, f"{constants.ENDPOINT} cannot be reached ({reason})", without)


def examine_sandbox() -> Finding:
    from nanochat.execution import choose_launcher, plain_command

    try:
        launcher = choose_launcher()
    except NanochatError as error:
        found, _, way_out = str(error).rpartition(": ")
        return Finding("used", "sandbox", found, way_out)
    if launcher is plain_command:
        return Finding("used", "sandbox", "none: NANOCHAT_UNSAFE_EXECUTION is set", "unset it to isolate a model's programs")
    return Finding("used", "sandbox", f"{launcher.__name__.removesuffix('_command')} isolates the programs of a model")


class Probe:
    """A check that may hang, so it runs in a thread that is not joined at exit."""

    def __init__(self, name: str, check: Callable[[], Finding], timeout_s: float) -> None:
        self.name, self.timeout_s = name, timeout_s
        self._findings: list[Finding] = []
        self._thread = threading.Thread(target=lambda: self._findings.append(check()), daemon=True)
        self._thread.start()

    def finding(self) -> Finding:
        self._thread.join(self.timeout_s)
        missing = Finding("used", self.name, f"no answer in {self.timeout_s:g} s", "look at what holds it up, or do without")
        return (self._findings or [missing])[0]


# ----------------------------------------------------------------------------- what to expect


def expect(device: torch.device) -> dict[str, Any]:
    """Measured rates, the training times that follow for some depths, and the largest depth that fits in memory."""
    dtype = get_compute_dtype(device)
    matmul, memory_rate = measure_matmul_rate(device, dtype), measure_memory_rate(device)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    mfu = expected_mfu(device, dtype)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    rows = []
    for depth in DEPTHS[device.type]:
        config = config_for_depth(depth, VOCAB_SIZE, SEQUENCE_LEN)
        model = GPT.on_meta(config)
        flops = model.estimate_flops()
        tokens_per_s = count * mfu * matmul / flops
        tokens = plan_horizon(config, flops).tokens
        row = {"depth": depth, "parameters": model.num_scaling_params()["total"], "tokens": tokens}
        rows.append({**row, "tokens_per_s": tokens_per_s, "seconds": tokens / tokens_per_s})
    depth = largest_depth((1 - RESERVED) * free, SEQUENCE_LEN, VOCAB_SIZE, 1, TrainingLayout(dtype=dtype))
    return {
        "dtype": str(dtype).removeprefix("torch."), "matmul_flops_per_s": matmul, "memory_bytes_per_s": memory_rate,
        "busy": psutil.getloadavg()[0] > (os.cpu_count() or 1), "devices": count, "assumed_mfu": mfu, "trainings": rows,
        "largest_depth": depth,
    }  # fmt: skip


def describe_expectations(found: dict[str, Any]) -> list[str]:
    rate, bandwidth = found["matmul_flops_per_s"], found["memory_bytes_per_s"]
    products = f"{rate / 1e12:,.0f} TFLOP/s" if rate > 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
    busy = " (less than it can: others compute here)" if found["busy"] else ""
    devices = f" on {found['devices']} devices" if found["devices"] > 1 else ""
    lines = [
        f"  measured        {found['dtype']} products {products}, memory {bandwidth / 1e9:,.0f} GB/s{busy}",
        f"  largest depth   {found['largest_depth']}, computed for the memory that is free",
        f"  pretraining     {TOKENS_PER_PARAM:g} tokens a parameter at {found['assumed_mfu']:.0%} of those products{devices}",
        f"  {'--depth':>11} {'parameters':>12} {'tokens/s':>10} {'tokens':>8} {'time':>12}",
    ]
    for row in found["trainings"]:
        cells = f"{row['parameters'] / 1e6:>10,.0f} M {row['tokens_per_s']:>10,.0f} {row['tokens'] / 1e9:>6.2f} G"
        lines.append(f"  {row['depth']:>11} {cells} {describe_duration(row['seconds']):>12}")
    return lines


def describe_duration(seconds: float) -> str:
    """In the largest unit of which there are two: 100 minutes, 30 hours, 40 days, 5 years."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


# ----------------------------------------------------------------------------- the command

TITLES = {"machine": "This machine", "software": "Software", "used": "What will be used"}


def show(findings: list[Finding], expected: dict[str, Any] | None) -> None:
    problems = [finding for finding in findings if finding.way_out]
    for section, title in TITLES.items():
        print(title)
        for finding in (finding for finding in findings if finding.section == section):
            mark = "!" if finding.way_out else " "
            print(f"{mark} {finding.name:<15} {finding.text}")
    if expected:
        print("\n".join(["What to expect", *describe_expectations(expected)]))
    print("Problems" if problems else "No problems")
    for finding in problems:
        print(f"! {finding.name:<15} {'needed' if finding.essential else 'optional'}: {finding.way_out}")


def main(argv: list[str] | None = None) -> int:
    parser = SettingsParser(
        "What this machine has, what will be used of it, and what to expect.", examples=["%(prog)s", "%(prog)s --json"]
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(argv)
    probes = [Probe("sandbox", examine_sandbox, SANDBOX_TIMEOUT_S), Probe("hub", examine_hub, HUB_TIMEOUT_S + 1)]
    device = torch.device(autodetect_device_type())
    findings = [*examine_machine(device.type), *examine_software(), *examine_device(device), *examine_base_dir()]
    findings += [probe.finding() for probe in probes]
    broken = any(finding.essential for finding in findings)
    expected = None if broken else expect(device)
    if args.json:
        print(json.dumps({"ok": not broken, "findings": [asdict(f) for f in findings], "expected": expected}, indent=2))
    else:
        show(findings, expected)
    return int(broken)


if __name__ == "__main__":
    sys.exit(run_command(main))

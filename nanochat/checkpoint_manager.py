"""Checkpoints: safetensors and JSON, all of a step visible together or not at all. Used by trainer.py and every script.

A run is one directory, `<base>/runs/<tag>`, with a directory for each stage: base, sft, rl. A step of a stage:

    runs/<tag>/<stage>/step_000400/model.safetensors, optim.safetensors (optional), meta.json, manifest.json

It is written under a temporary name, flushed to disk, hashed, and renamed last. The manifest holds the hash of each file;
a directory without a manifest, or under another name, is not a checkpoint and is never selected.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.common import NanochatError, get_base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

FORMAT_VERSION = 1
STAGES = ("base", "sft", "rl")
MODEL_FILE, OPTIMIZER_FILE, META_FILE, MANIFEST_FILE = (
    "model.safetensors",
    "optim.safetensors",
    "meta.json",
    "manifest.json",
)


class CheckpointError(NanochatError):
    """A checkpoint that is absent, damaged, or of another model."""


# ----------------------------------------------------------------------------- where things are


def get_runs_dir() -> Path:
    return get_base_dir() / "runs"


def get_run_dir(tag: str) -> Path:
    """The directory of a run. Raises NanochatError for a tag that is not a plain name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag):
        raise NanochatError(f"model tag {tag!r} is not a plain name: use letters, digits, '.', '_' and '-'")
    return get_runs_dir() / tag


def get_stage_dir(tag: str, stage: str) -> Path:
    if stage not in STAGES:
        raise NanochatError(f"unknown source {stage!r}: choose one of {', '.join(STAGES)}")
    return get_run_dir(tag) / stage


def step_dir(stage_dir: Path, step: int) -> Path:
    return stage_dir / f"step_{step:06d}"


def list_steps(stage_dir: Path) -> list[int]:
    """The complete checkpoints of a stage, oldest first."""
    found = [re.fullmatch(r"step_(\d+)", path.parent.name) for path in stage_dir.glob(f"step_*/{MANIFEST_FILE}")]
    return sorted(int(match[1]) for match in found if match)


def find_run(stage: str, model_tag: str | None = None) -> str:
    """The tag that was asked for, or that of the run whose checkpoint of this stage is the newest."""
    if model_tag is not None:
        if list_steps(get_stage_dir(model_tag, stage)):
            return model_tag
        known = [path.name for path in sorted(get_runs_dir().glob("*")) if list_steps(path / stage)]
        choices = f"runs with one: {', '.join(known)}" if known else "no run has one yet"
        raise CheckpointError(f"run {model_tag!r} has no {stage} checkpoint in {get_runs_dir()}; {choices}")
    newest: tuple[float, str] | None = None
    for stage_dir in get_runs_dir().glob(f"*/{stage}"):
        steps = list_steps(stage_dir)
        if steps:
            created = _read_json(step_dir(stage_dir, steps[-1]) / MANIFEST_FILE).get("created", 0.0)
            newest = max(newest or (created, stage_dir.parent.name), (created, stage_dir.parent.name))
    if newest is None:
        command = {"base": "scripts.base_train", "sft": "scripts.chat_sft", "rl": "scripts.chat_rl"}[stage]
        raise CheckpointError(f"no {stage} checkpoint in {get_runs_dir()}: make one with python -m {command}")
    return newest[1]


# ----------------------------------------------------------------------------- writing


def save_checkpoint(
    stage_dir: Path,
    step: int,
    model_state: dict[str, torch.Tensor],
    optimizer_state: dict[str, torch.Tensor] | None,
    meta: dict[str, Any],
) -> Path:
    """Write one step of a stage and return its directory. A crash at any byte leaves what was there before.

    `meta` must be JSON. Raises OSError if the disk is full; nothing half-written stays.
    """
    target = step_dir(stage_dir, step)
    stage_dir.mkdir(parents=True, exist_ok=True)
    temporary = stage_dir / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _save_tensors(model_state, temporary / MODEL_FILE)
        if optimizer_state is not None:
            _save_tensors(optimizer_state, temporary / OPTIMIZER_FILE)
        _write_json({"version": FORMAT_VERSION, "step": step, **meta}, temporary / META_FILE)
        files = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in temporary.iterdir()}
        manifest = {"version": FORMAT_VERSION, "step": step, "created": time.time(), "files": files}
        _write_json(manifest, temporary / MANIFEST_FILE)
        for path in (*temporary.iterdir(), temporary):
            _flush_to_disk(path)
        if target.exists():  # the same step again, after a resume: the old one gives way only now
            old = stage_dir / f".{target.name}.{os.getpid()}.old"
            os.rename(target, old)
            os.rename(temporary, target)
            shutil.rmtree(old)
        else:
            os.rename(temporary, target)
        _flush_to_disk(stage_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # its own class for what is an OSError, a full disk most often
        raise OSError(28 if "No space" in str(error) else 5, f"cannot write {path}: {error}", str(path)) from error


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _flush_to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle to flush a directory by
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------- reading


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): choose another step with --step") from error


def verify_checkpoint(directory: Path) -> None:
    """Raise CheckpointError unless every file is there, whole and unchanged since it was written."""
    manifest = _read_json(directory / MANIFEST_FILE)
    if manifest.get("version", 0) > FORMAT_VERSION:
        raise CheckpointError(f"{directory} has format {manifest['version']}, newer than this nanochat reads: update it")
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            others = [str(step) for step in list_steps(directory.parent) if step_dir(directory.parent, step) != directory]
            way_out = f"use another step: {', '.join(others)}" if others else "train it again"
            raise CheckpointError(f"{path} is damaged (missing, or not what was saved); {way_out}")


def load_checkpoint(
    stage_dir: Path, step: int, device: torch.device | str = "cpu", load_optimizer: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None, dict[str, Any]]:
    """(model_state, optimizer_state or None, meta) of a step, verified. Raises CheckpointError."""
    directory = step_dir(stage_dir, step)
    if step not in list_steps(stage_dir):
        steps = ", ".join(map(str, list_steps(stage_dir))) or "none"
        raise CheckpointError(f"there is no checkpoint of step {step} in {stage_dir}; steps there: {steps}")
    verify_checkpoint(directory)
    model_state = load_file(directory / MODEL_FILE, device=str(device))
    optimizer_state = None
    if load_optimizer:
        if not (directory / OPTIMIZER_FILE).exists():
            raise CheckpointError(f"{directory} was saved without optimizer state: training cannot go on from it")
        optimizer_state = load_file(directory / OPTIMIZER_FILE, device=str(device))
    return model_state, optimizer_state, _read_json(directory / META_FILE)


def read_meta(stage_dir: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself, without its tensors. Raises CheckpointError if it cannot be read."""
    return _read_json(step_dir(stage_dir, step) / META_FILE)


def newest_valid_step(stage_dir: Path) -> tuple[int | None, list[str]]:
    """(the newest step whose files are all intact, or None; one sentence for each newer one that was passed over)."""
    skipped = []
    for step in reversed(list_steps(stage_dir)):
        try:
            verify_checkpoint(step_dir(stage_dir, step))
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return step, skipped
    return None, skipped


def load_model(
    source: str, device: torch.device | str, phase: str, model_tag: str | None = None, step: int | None = None
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model, its tokenizer and its meta. source: base, sft or rl; phase: "train" or "eval".

    Without a tag the newest run with such a checkpoint; without a step its newest. meta gains "tag", "stage" and
    "weights", the hash by which results of other weights can be told. Raises CheckpointError.
    """
    if phase not in ("train", "eval"):
        raise ValueError(f"phase must be train or eval, not {phase!r}")
    tag = find_run(source, model_tag)
    stage_dir = get_stage_dir(tag, source)
    step = list_steps(stage_dir)[-1] if step is None or step < 0 else step
    model_state, _, meta = load_checkpoint(stage_dir, step, device)
    tokenizer = Tokenizer.load(get_run_dir(tag))
    if tokenizer.fingerprint() != meta["tokenizer"]:
        raise CheckpointError(
            f"the tokenizer in {get_run_dir(tag)} is not the one that step {step} of {source} was trained with: "
            "restore it, or train again"
        )
    model = build_model(meta["model_config"], model_state, device)
    model.train(phase == "train")
    manifest = _read_json(step_dir(stage_dir, step) / MANIFEST_FILE)
    weights = manifest["files"][MODEL_FILE]["sha256"]
    return model, tokenizer, {**meta, "tag": tag, "stage": source, "weights": weights}


def build_model(
    model_config: dict[str, Any], state: dict[str, torch.Tensor] | None, device: torch.device | str, seed: int = 42
) -> GPT:
    """A GPT on `device` with the given weights, or newly initialized ones if `state` is None."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**model_config))
    if state is None:
        model.to_empty(device=device)
        model.init_weights(seed)
        return model
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"these weights do not fit the model they claim to be ({reason}): train it again") from None
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.to(device)

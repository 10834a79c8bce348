"""Checkpoints: safetensors and JSON; a step becomes visible as a whole or not at all. Used by everything that trains or loads
a model; trainer.py writes them through checkpoint_writer.py.

A run is one directory, `<base>/runs/<tag>`, with a directory for each stage: base, sft, rl. A step of a stage:

    runs/<tag>/<stage>/step_000400/model.safetensors, optim.safetensors (optional), meta.json, manifest.json

With --fsdp, `sharded/` (torch.distributed.checkpoint) takes the place of the safetensors.

A step is written under a temporary name, hashed, flushed to disk, and renamed last. The manifest holds the hash of each
file; a directory without a manifest, or with another name, is not a checkpoint and is never selected.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nanochat.common import NanochatError, get_base_dir, get_dist_info
from nanochat.files import locked, read_json_object, remove_leftovers, replace, replace_directory, sha256_of, share_mode
from nanochat.gpt import GPT, GPTConfig
from nanochat.ranks import all_or_none, on_rank0
from nanochat.runs import (
    MANIFEST_FILE,
    SETTINGS_FILE,
    STAGES,
    check_stage,
    get_run_dir,
    get_runs_dir,
    get_stage_dir,
    is_tag,
    list_steps,
    step_dir,
)
from nanochat.tokenizer import FILE_NAME as TOKENIZER_FILE
from nanochat.tokenizer import Tokenizer, get_run_tokenizer

FORMAT_VERSION = 2  # increase it whenever the code can no longer read existing checkpoints
MAX_TIMESTAMP = 1e11  # seconds since 1970: a manifest that claims to be later is damaged
SHARDED_DIR = "sharded"
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optim.safetensors"
META_FILE = "meta.json"
PUBLIC_FOLDERS = ("base_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints")  # the public nanochat's, in the same place


class CheckpointError(NanochatError):
    """A checkpoint is missing, damaged, or belongs to another model. reason: the message without its way out."""

    def __init__(self, reason: str, way_out: str = "") -> None:
        super().__init__(reason + way_out)
        self.reason = reason


# ----------------------------------------------------------------------------- which run is meant


def find_run(stage: str, model_tag: str | None = None, heir: str | None = None) -> str:
    """The given tag, or that of the run with the newest checkpoint of this stage.

    heir: a later stage, which may continue even if this one is gone.
    """
    if model_tag is not None:
        if any(list_steps(get_stage_dir(model_tag, name)) for name in (stage, heir) if name):
            return model_tag
        known = [path.name for path in sorted(get_runs_dir().glob("*")) if list_steps(path / stage)]
        choices = f"runs with one: {', '.join(known)}" if known else "no run has one yet"
        if others := [other for other in STAGES if list_steps(get_stage_dir(model_tag, other))]:
            choices += f"; of this run there is {', '.join(others)} (--source)"
        raise CheckpointError(f"run {model_tag!r} has no {stage} checkpoint in {get_runs_dir()}; {choices}")
    runs = newest_of_runs(stage)
    if not runs:
        command = "scripts.base_train" if stage == STAGES[0] else f"scripts.chat_{stage}"
        theirs = [name for name in PUBLIC_FOLDERS if (get_base_dir() / name).is_dir()]
        note = f" (the public nanochat's in {', '.join(theirs)} are not read: see docs/exporting.md)" if theirs else ""
        raise CheckpointError(f"no {stage} checkpoint in {get_runs_dir()}{note}: make one with python -m {command}")
    return max(runs)[1]


def newest_of_runs(stage: str) -> list[tuple[float, str]]:
    """(time of its newest checkpoint, tag) for each run with this stage ("*": any), without unreadable ones."""
    found = []
    for stage_dir in get_runs_dir().glob(f"*/{stage if stage == '*' else check_stage(stage)}"):
        if not is_tag(stage_dir.parent.name):
            continue  # such as "d4 copy", made by a file manager
        for step in reversed(list_steps(stage_dir)):
            with contextlib.suppress(NanochatError):
                manifest = read_json_object(step_dir(stage_dir, step) / MANIFEST_FILE)
                created, is_other = manifest.get("created"), manifest.get("version") != FORMAT_VERSION  # to be reported
                is_whole = is_other or manifest.get("digest") == _digest(manifest)
                if is_whole and isinstance(created, int | float) and abs(created) < MAX_TIMESTAMP:
                    found.append((created, stage_dir.parent.name))
                    break
    return found


# ----------------------------------------------------------------------------- writing


def save_checkpoint(
    stage_dir: Path,
    step: int,
    model_state: dict[str, torch.Tensor],
    optimizer_state: dict[str, torch.Tensor] | None,
    meta: dict[str, Any],
) -> Path:
    """Write one step of a stage and return its directory. A crash at any point leaves the previous state intact.

    `meta` must be JSON. Raises OSError if the disk is full, and leaves nothing half-written.
    """
    temporary = begin_checkpoint(stage_dir, step)
    try:
        save_tensors(model_state, temporary / MODEL_FILE)
        if optimizer_state is not None:
            save_tensors(optimizer_state, temporary / OPTIMIZER_FILE)
        return finish_checkpoint(temporary, stage_dir, step, meta)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_sharded(stage_dir: Path, step: int, states: dict[str, dict[str, torch.Tensor]], meta: dict[str, Any]) -> None:
    """Write one step whose parts the ranks hold (a collective call); states: keys are MODEL_FILE and OPTIMIZER_FILE.

    Raises OSError, or NanochatError on the other ranks, if it cannot be written; leaves nothing half-written.
    """
    from nanochat.sharding import write_sharded

    tensors = {f"{file_name}/{name}": tensor for file_name, state in states.items() for name, tensor in state.items()}
    temporary = _temporary(stage_dir, step)
    try:
        on_rank0(lambda: begin_checkpoint(stage_dir, step))
        all_or_none(lambda: write_sharded(temporary / SHARDED_DIR, tensors))
        on_rank0(lambda: finish_checkpoint(temporary, stage_dir, step, meta))
    finally:
        if get_dist_info().rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def begin_checkpoint(stage_dir: Path, step: int) -> Path:
    """An empty directory for the files of a step; `finish_checkpoint` makes it visible."""
    temporary = _temporary(stage_dir, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _temporary(stage_dir: Path, step: int) -> Path:
    return stage_dir / f".{step_dir(stage_dir, step).name}.tmp"


def finish_checkpoint(temporary: Path, stage_dir: Path, step: int, meta: dict[str, Any]) -> Path:
    """Add meta and manifest to the files in a temporary directory, flush everything, and give it its final name."""
    target = step_dir(stage_dir, step)
    _write_json({"version": FORMAT_VERSION, "step": step, **meta}, temporary / META_FILE)
    share_mode(temporary / META_FILE)
    paths = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    files = {
        path.relative_to(temporary).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in paths
    }
    manifest = {"version": FORMAT_VERSION, "step": step, "created": _later_than_all(time.time()), "files": files}
    _write_json({**manifest, "digest": _digest(manifest)}, temporary / MANIFEST_FILE)
    for path in (*temporary.rglob("*"), temporary):
        _flush_to_disk(path)
    replace_directory(temporary, target)  # it exists already if a resumed run saves the same step again
    _flush_to_disk(stage_dir)
    return target


def _later_than_all(now: float) -> float:
    """A time for a new checkpoint: later than that of every existing one, even if the clock was set back."""
    return max([now, *(created + 1e-3 for created, _ in newest_of_runs("*"))])


def lock_stage(stage_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from writing to the stage. Raises NanochatError if one holds the lock."""
    busy = f"{stage_dir} is being trained by another process: wait for it, stop it, or choose another --model-tag"
    return locked(stage_dir / ".lock", busy)


def clean_up(stage_dir: Path) -> None:
    """Remove what killed processes left half-written, and put back checkpoints that they were about to replace.

    Call it while holding the stage's lock. Files of other commands, such as eval.json, are not touched.
    """
    for old in stage_dir.glob(".step_*.old"):
        target = stage_dir / old.name.removeprefix(".").removesuffix(".old")
        if not target.exists():
            replace(old, target)
    for left in (*stage_dir.glob(".step_*.tmp"), *stage_dir.glob(".step_*.old")):
        shutil.rmtree(left, ignore_errors=True)
    remove_leftovers(stage_dir / SETTINGS_FILE)
    if stage_dir.name == "base":  # this stage also writes the run's tokenizer
        remove_leftovers(stage_dir.parent / TOKENIZER_FILE)


def set_aside(stage_dir: Path, step: int) -> list[str]:
    """Rename checkpoints after `step`, because a run continues from `step`; returns their new names, oldest first."""
    names = []
    for later in (n for n in list_steps(stage_dir) if n > step):
        folder, attempt = step_dir(stage_dir, later), 1
        while (target := stage_dir / f"abandoned_{folder.name}_{attempt}").exists():
            attempt += 1
        replace(folder, target)
        names.append(target.name)
    return names


def prune(stage_dir: Path, step: int, keep_last: int, best: int | None) -> None:
    """Remove checkpoints up to `step` except the newest keep_last, the best, and those that later stages were begun from.

    Those after `step` belong to another attempt. Visibly damaged ones (a missing or short file) do not count among the newest;
    their content is not read.
    """
    kept, parents = 0, _parents(stage_dir)
    for n in reversed([n for n in list_steps(stage_dir) if n <= step]):
        if kept < keep_last:
            kept += _seems_whole(step_dir(stage_dir, n))
        elif n != best and f"{stage_dir.name} step {n}" not in parents:
            shutil.rmtree(_temporary(stage_dir, n), ignore_errors=True)
            with contextlib.suppress(PermissionError):  # Windows, another process is reading it: the next save tries again
                os.rename(step_dir(stage_dir, n), _temporary(stage_dir, n))  # first, so that no partly deleted one is seen
            shutil.rmtree(_temporary(stage_dir, n), ignore_errors=True)


def _parents(stage_dir: Path) -> set[str]:
    """What the run's stages were begun from, such as "base step 400": they may read it again, for its optimizer or for KL."""
    parents = set()
    for path in stage_dir.parent.glob(f"*/{SETTINGS_FILE}"):
        with contextlib.suppress(NanochatError):
            parents.add(str(read_json_object(path).get("parent")))
    return parents


def _seems_whole(directory: Path) -> bool:
    try:
        list_files(directory)
        return True
    except CheckpointError:
        return False


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file of safetensors. Raises OSError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # the library's class for an OSError, most often a full disk
        number = errno.ENOSPC if "No space" in str(error) else errno.EIO
        raise OSError(number, f"cannot write {path}: {error}", str(path)) from error


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _flush_to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot flush a directory
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(fd)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EIO, errno.ENOTSUP):  # network folders return these
            raise
    finally:
        os.close(fd)


def _digest(manifest: dict[str, Any]) -> str:
    """A hash of the manifest's content, so that damage to the manifest itself is noticed."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------- reading


def _read_json(path: Path) -> dict[str, Any]:
    """The meta or manifest of a step. Raises CheckpointError if it is unreadable or has another format than ours."""
    try:
        content = read_json_object(path)
    except NanochatError as error:
        raise CheckpointError(str(error), ": choose another step with --step") from error
    version = content.get("version")
    if type(version) is not int:
        raise _damage(path)
    if version != FORMAT_VERSION:
        way_out = "update it" if version > FORMAT_VERSION else "train it again, or use the nanochat that saved it"
        reason = f"{path.parent} has format {version}, but this nanochat reads only {FORMAT_VERSION}"
        raise CheckpointError(reason, f": {way_out}")
    return content


def verify_checkpoint(directory: Path, but_for: str = "") -> None:
    """Raise CheckpointError unless every file except `but_for` is there, complete and unchanged since it was written."""
    for name, expected in list_files(directory, but_for).items():
        if sha256_of(directory / name) != expected["sha256"]:
            raise _damage(directory / name)


def list_files(directory: Path, but_for: str = "") -> dict[str, dict[str, Any]]:
    """{name: {"sha256", "bytes"}} from the manifest. Raises CheckpointError if a file is missing or of another size."""
    manifest = _read_json(directory / MANIFEST_FILE)
    files: Any = manifest.get("files")
    whole = isinstance(files, dict) and all(isinstance(f, dict) and {"sha256", "bytes"} <= set(f) for f in files.values())
    if not whole or manifest.get("digest") != _digest(manifest):
        raise _damage(directory / MANIFEST_FILE)
    files = {name: expected for name, expected in files.items() if name != but_for}
    for name, expected in files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise _damage(path)
    return files


def _damage(path: Path) -> CheckpointError:
    directory = next(parent for parent in path.parents if parent.name.startswith("step_"))
    others = [str(step) for step in list_steps(directory.parent) if step_dir(directory.parent, step) != directory]
    way_out = f"use another step: {', '.join(others)}" if others else "train it again"
    return CheckpointError(f"{path} is damaged (missing, or not what was saved)", f"; {way_out}")


def load_checkpoint(
    stage_dir: Path, step: int, device: torch.device | str = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(model_state, meta) of a step, verified. Raises CheckpointError. For the optimizer: stage.load_optimizer."""
    directory = step_dir(stage_dir, step)
    if step not in list_steps(stage_dir):
        raise no_such_step(stage_dir, step)
    verify_checkpoint(directory, but_for=OPTIMIZER_FILE)
    model_state = read_tensors(directory, MODEL_FILE)
    model_state = {name: tensor.to(device, copy=True) for name, tensor in model_state.items()}  # a copy frees the file
    return model_state, _read_json(directory / META_FILE)


def no_such_step(stage_dir: Path, step: int) -> CheckpointError:
    steps = ", ".join(map(str, list_steps(stage_dir))) or "none"
    return CheckpointError(f"there is no checkpoint of step {step} in {stage_dir}; steps there: {steps}")


def read_tensors(directory: Path, file_name: str) -> dict[str, torch.Tensor]:
    """The tensors of MODEL_FILE or OPTIMIZER_FILE on the CPU, however they were saved; {} if there are none."""
    if (directory / SHARDED_DIR).exists():
        from nanochat.sharding import read_whole

        return read_whole(directory / SHARDED_DIR, prefix=f"{file_name}/")
    try:
        return load_file(directory / file_name) if (directory / file_name).exists() else {}
    except SafetensorError as error:
        raise _damage(directory / file_name) from error


def load_into(directory: Path, file_name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors, of which this rank may hold only some rows, from a checkpoint; reads no more than it must.

    Raises CheckpointError for a missing or damaged file, KeyError for a tensor that the checkpoint lacks.
    """
    from nanochat.sharding import fill, read_sharded

    if (directory / SHARDED_DIR).exists():
        read_sharded(directory / SHARDED_DIR, {f"{file_name}/{name}": tensor for name, tensor in tensors.items()})
        return
    try:
        with safe_open(directory / file_name, "pt") as file:
            known = set(file.keys())
            for name, tensor in tensors.items():
                if name not in known:
                    raise KeyError(name)
                fill(tensor, file.get_tensor(name))
    except (FileNotFoundError, SafetensorError) as error:
        raise _damage(directory / file_name) from error


def read_meta(stage_dir: Path, step: int) -> dict[str, Any]:
    """The meta of a checkpoint, without its tensors. Raises CheckpointError if it cannot be read."""
    return _read_json(step_dir(stage_dir, step) / META_FILE)


def newest_valid_step(stage_dir: Path) -> tuple[int | None, list[str]]:
    """(the newest step whose files are all intact, or None; why each newer one was skipped)."""
    skipped: list[str] = []
    for step in reversed(list_steps(stage_dir)):
        try:
            verify_checkpoint(step_dir(stage_dir, step))
            return step, skipped
        except CheckpointError as error:
            skipped.append(error.reason)
    return None, skipped


def open_checkpoint(
    source: str, model_tag: str | None = None, step: int | None = None
) -> tuple[Path, Tokenizer, dict[str, Any]]:
    """(stage directory, tokenizer, meta) of a step, without its tensors. source: base, sft or rl.

    Without a tag: the newest run with such a checkpoint. Without a step: its newest. meta gains "tag", "stage" and
    "weights" (a hash of them). Raises CheckpointError. A collective call: rank 0 chooses, since a run that still trains
    would have saved more by the time that another rank looks.
    """
    tag, step = on_rank0(lambda: _choose(source, model_tag, step))
    stage_dir = get_stage_dir(tag, source)
    meta = read_meta(stage_dir, step)
    if not {"tokenizer", "model_config"} <= meta.keys():
        raise _damage(step_dir(stage_dir, step) / META_FILE)
    tokenizer = get_run_tokenizer(tag)
    if tokenizer.fingerprint() != meta["tokenizer"]:
        raise CheckpointError(
            f"the tokenizer in {get_run_dir(tag)} is not the one that step {step} of {source} was trained with: "
            "restore it, or train again"
        )
    weights = hash_of_weights(stage_dir, step)
    return stage_dir, tokenizer, {**meta, "step": step, "tag": tag, "stage": source, "weights": weights}


def _choose(source: str, model_tag: str | None, step: int | None) -> tuple[str, int]:
    """(tag, step) of the checkpoint that `open_checkpoint` is asked for."""
    tag = find_run(source, model_tag)
    stage_dir = get_stage_dir(tag, source)
    steps = list_steps(stage_dir)
    step = steps[-1] if step is None or step < 0 else step
    if step not in steps:
        raise no_such_step(stage_dir, step)
    return tag, step


def hash_of_weights(stage_dir: Path, step: int) -> str:
    """A hash of a step's weights, to tell its results from those of others. Raises CheckpointError if files are missing."""
    hashes = {name: file["sha256"] for name, file in list_files(step_dir(stage_dir, step), but_for=OPTIMIZER_FILE).items()}
    if MODEL_FILE in hashes:
        return str(hashes[MODEL_FILE])
    shards = sorted(hash for name, hash in hashes.items() if name != META_FILE)  # the same in a copy
    return hashlib.sha256("".join(shards).encode()).hexdigest()


def load_model(
    source: str, device: torch.device | str, phase: str = "eval", model_tag: str | None = None, step: int | None = None
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model, its tokenizer and its meta (see `open_checkpoint`); phase: "train" or "eval". Raises CheckpointError."""
    if phase not in ("train", "eval"):
        raise ValueError(f"phase must be train or eval, not {phase!r}")
    stage_dir, tokenizer, meta = open_checkpoint(source, model_tag, step)
    model_state, _ = load_checkpoint(stage_dir, meta["step"], device)
    model = build_model(read_config(meta["model_config"]), model_state, device)
    model.train(phase == "train")
    return model, tokenizer, meta


def read_config(content: Any) -> GPTConfig:
    """The model_config of a meta.json, which may be damaged or written by another version. Raises NanochatError."""
    if not isinstance(content, dict):
        raise NanochatError("the model does not say what it is like (model_config): restore its file, or use another model")
    if unknown := sorted(content.keys() - {field.name for field in fields(GPTConfig)}):
        raise NanochatError(f"the model is of another version: its model_config has {', '.join(unknown)}; update nanochat")
    try:
        return GPTConfig(**content)
    except NanochatError as error:
        raise NanochatError(f"model_config: {error}; restore the file, or use another model") from error


def build_model(config: GPTConfig, state: dict[str, torch.Tensor] | None, device: torch.device | str, seed: int = 42) -> GPT:
    """A GPT on `device` with the given weights, or newly initialized ones if `state` is None."""
    model = GPT.on_meta(config)
    if state is None:
        # The same as to_empty, whose empty_like imports the symbolic algebra of PyTorch's compiler (0.4 s)
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        model.init_weights(seed)
        return model
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"these weights do not fit the model they claim to be ({reason}): train it again") from None
    return model.to(device)

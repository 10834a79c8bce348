"""Checks that a resumed run still has the settings and data that it began with, and that all ranks agree.

Used by stage.py, the training scripts and scripts/compare.py.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from nanochat.checkpoint_manager import read_meta
from nanochat.common import NanochatError, print0, some_of
from nanochat.conversation_loader import fingerprint
from nanochat.listings import VAL, is_of_split
from nanochat.runs import STAGES, get_run_dir
from nanochat.settings import flag_of
from nanochat.training_flags import RATES

if TYPE_CHECKING:
    from nanochat.dataset import Source
    from nanochat.settings import Arguments
    from nanochat.stage import Stage
    from tasks.common import Task

# Settings of a command and of the machine that it runs on.
COMMAND_SETTINGS = {
    "resume", "resume_from_step", "run", "log_to", "model_tag", "tag",
    "device", "device_type", "world_size", "fsdp", "activation_checkpointing", "device_batch_size", "max_rows", "compile",
}  # fmt: skip
# Settings that change how the work is done, not what is computed.
WORK_SETTINGS = COMMAND_SETTINGS | {
    "eval_every", "eval_tokens", "eval_examples", "eval_samples", "core_metric_every", "core_metric_max_per_task",
    "eval_bundle", "sample_every", "save_every", "keep_last",
}  # fmt: skip
# Settings that may change when a run is resumed: also learning rates, because lowering them cures a divergence, what another
# machine may do differently, and paths, because their content is compared instead.
FREE_SETTINGS = WORK_SETTINGS | {
    *RATES, "dtype", "attention", "fp8", "data", "tasks", "task_data", "tokenizer", "from_hf", "model_step"
}  # fmt: skip
# Flags that a resumed stage takes from its command alone. All others that are left out keep the values that it was begun with.
# --fp8 needs a GPU that not all machines have, and no flag would switch it off again.
NOT_KEPT = COMMAND_SETTINGS | {"fp8"}


def check_settings(stage: Stage, new: dict[str, Any], args: Arguments) -> None:
    """Raise NanochatError if a resumed stage was started with other settings."""
    if stage.resume_step is None:
        return
    old, anew = stage.recorded_settings(), way_to_begin_anew(stage.directory)
    fingerprint = new["tokenizer_fingerprint"]
    if old.get("tokenizer_fingerprint", fingerprint) != fingerprint:
        raise NanochatError(
            f"the tokenizer is not the one that run {stage.tag!r} was started with: give the copy that the run keeps, "
            f"--tokenizer={get_run_dir(stage.tag)}, or {anew}"
        )
    for key, value in json.loads(json.dumps(new)).items():
        flag = "--set" if key == "switches" else flag_of(key)
        if key not in old and key not in args.given:
            continue
        before = old[key] if key in old else args.defaults[key]  # the run is older than this flag
        if key in RATES and before != value:
            print0(f"going on with {flag} {value}: until now it was {before}")
        if key in FREE_SETTINGS or before == value:
            continue
        if key not in args.defaults:  # follows from the flags, as num_params does
            raise NanochatError(
                f"this nanochat makes {key} {value} of these settings, and run {stage.tag!r} has {before}: use the version "
                f"that began it to go on, or {anew}"
            )
        raise NanochatError(
            f"run {stage.tag!r} was started with {flag} {before}, not {value}: leave the flag out to go on, or {anew}"
        )


def check_data(stage: Stage, source: Source) -> None:
    """Raise NanochatError if files that a stage has read are gone or changed.

    Known files keep the order that the stage recorded, on every rank; new ones are read after them. The validation split stays
    as it was. Files that the run has not reached may change: a damaged one that stopped it may have been repaired.
    """
    if stage.resume_step is None:
        return
    meta = read_meta(stage.directory, stage.resume_step)
    recorded = meta["data"]
    source.keep_split(recorded)
    now, before = source.describe()["files"], recorded["files"]
    place = {name: i for i, name in enumerate(before)}
    for files in (source.train_files, source.val_files):
        known = [file.name in place for file in files]
        if known != sorted(known, reverse=True):  # such as shards of a download that arrived in another order
            new = [file.name for file in files if file.name not in place]
            print0(f"{some_of(new)} of {source.name} came later: read behind the files that run {stage.tag!r} began with")
        files.sort(key=lambda file: place.get(file.name, len(place)))
    samples = recorded.get("samples", {})  # runs that were begun before they were recorded have none

    def is_edited(name: str) -> bool:
        return name in samples and source.samples.get(name, samples[name]) != samples[name]

    if changed := [name for name, size in before.items() if now.get(name) != size or is_edited(name)]:
        source.changed.update(changed)
        if needed := _needed_to_go_on(source, before, changed, meta["trainer"]["loader"]):
            what = "is gone" if needed not in now else "has changed"
            raise NanochatError(f"{needed} of {source.name} {what} since run {stage.tag!r} read it: restore it to go on")
        print0(f"going on with {some_of(changed, 3)} of {source.name} as found now: run {stage.tag!r} had not read so far")


def _needed_to_go_on(source: Source, before: dict[str, Any], changed: list[str], states: list[dict[str, Any]]) -> str | None:
    """The first of the changed or missing files that a run has read to its end, or that lacks what was read of it.

    before: the files as they were, in their order; states: of the loaders. The numbers of documents, by which a loader finds
    its place, depend on all rows before them.
    """
    for name in changed:
        is_train = name in {file.name for file in source.train_files}  # whatever its address says, as in s3://team-val/
        if name in {file.name for file in source.val_files} or (not is_train and is_of_split(VAL, PurePath(name))):
            return name  # or measurements before and after could not be compared
    name, counted = changed[0], states[0]["counted"]
    if not isinstance(before[name], int):  # a hash, of text that this machine made
        return name
    source.know_rows(counted)
    files = {file.name: file for file in source.train_files}
    first = sum(files[other].num_rows() for other in itertools.takewhile(lambda other: other != name, before))
    epoch, reached = max(tuple(state["reading"][:2]) for state in states)
    if epoch == 0 and reached <= first:
        return None
    rows_read = reached - first
    ended = epoch > 0 or rows_read > counted.get(name, math.inf)
    return name if ended or name not in files or files[name].num_rows() < rows_read else None


def check_mixture(stage: Stage, task: Task, tasks: str) -> dict[str, Any] | None:
    """What a stage records about its conversations, those of `tasks`; None if it was completed with other conversations.

    Raises NanochatError if it was started with other conversations and is not complete.
    """
    mixture = {"conversations": len(task), "mixture": fingerprint(task)}
    before = {**mixture, "tasks": tasks, **stage.recorded_settings()}
    if all(before[name] == now for name, now in mixture.items()):
        return mixture
    if before["tasks"] == tasks and stage.is_complete(before["num_iterations"]):
        stage.say_complete(before["num_iterations"])
        return None
    raise NanochatError(
        f"the mixture, {len(task):,} conversations, is not the one that run {stage.tag!r} was started with "
        f"({before['conversations']:,}): it has other files or another choice of tasks, or a newer nanochat makes other "
        f"conversations; restore them to go on, or {way_to_begin_anew(stage.directory)}"
    )


def way_to_begin_anew(directory: Path) -> str:
    """The end of a sentence: how to start a stage again. Later stages cannot use another tag: it has no model for them."""
    if directory.name == STAGES[0]:
        return "choose another --model-tag"
    return f"begin another run with --from-run {directory.parent.name} (or remove {directory} to start it again)"

"""Begins a run of its own with the model of another run: --from-run. Used by the training scripts.

Fine-tuning and reinforcing write beside the stage that they start from, so the new run gets a copy of that stage. Its files
are links where the disk has them and take no room: files of a checkpoint are never changed, only removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import begin_checkpoint, hash_of_weights, lock_stage, open_checkpoint
from nanochat.common import NanochatError
from nanochat.eval_results import EVAL_FILE
from nanochat.files import replace
from nanochat.metrics import METRICS_FILE
from nanochat.ranks import on_rank0
from nanochat.runs import SETTINGS_FILE, STAGES, get_run_dir, get_stage_dir, list_steps, step_dir
from nanochat.settings import CONFIG_FILE, Arguments
from nanochat.stage import Stage, free_tag
from nanochat.tokenizer import FILE_NAME, Tokenizer

RECORDS = (METRICS_FILE, SETTINGS_FILE, CONFIG_FILE, EVAL_FILE)  # how the copied stage came about, for reports


def check_tag(args: Arguments, resume: str) -> None:
    """Raise NanochatError if it is not clear which run of those that began with the same model goes on."""
    if args.from_run is not None and args.model_tag is None and resume != "none":
        raise NanochatError("--from-run with --resume does not say which run goes on: add its --model-tag")


def branch(args: Arguments, name: str, source: str, step: int | None) -> str:
    """The tag of the run for stage `name` that begins with a copy of --from-run's stage `source`: --model-tag, or a free one.

    A copy made earlier is used again. Raises NanochatError if the tag belongs to another model. A collective call.
    """
    check_tag(args, args.resume)
    if args.resume != "none" and list_steps(get_stage_dir(args.model_tag, name)):
        return str(args.model_tag)  # whatever became of the other run
    directory, tokenizer, meta = open_checkpoint(source, args.from_run, step)
    tag: str = on_rank0(lambda: args.model_tag or free_tag(STAGES[0], args.from_run))
    on_rank0(lambda: _copy(directory, tokenizer, meta, tag))
    return tag


def _copy(directory: Path, tokenizer: Tokenizer, meta: dict[str, Any], tag: str) -> None:
    """Copy a step of a stage, its tokenizer and its records into the run of that tag, the step last."""
    step, target, kept = meta["step"], get_stage_dir(tag, directory.name), get_run_dir(tag) / FILE_NAME
    other = f"run {tag!r} has another {{}} than {meta['tag']!r}: choose another --model-tag"
    with lock_stage(target):
        if steps := list_steps(target):
            if hash_of_weights(target, steps[-1]) != meta["weights"]:
                raise NanochatError(other.format(f"{directory.name} model"))
            return
        if kept.exists() and Tokenizer.load(kept).fingerprint() != tokenizer.fingerprint():
            raise NanochatError(other.format("tokenizer"))
        tokenizer.save(kept.parent)
        for record in RECORDS:
            if (directory / record).exists():
                shutil.copy2(directory / record, target / record)
        temporary = begin_checkpoint(target, step)
        shutil.copytree(step_dir(directory, step), temporary, copy_function=_link, dirs_exist_ok=True)
        replace(temporary, step_dir(target, step))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def start_of(args: Arguments, stage: Stage, shape: tuple[str, ...]) -> tuple[Path, int] | None:
    """The checkpoint whose weights a base model begins with: the one to resume from, that of --from-run, or none.

    With --from-run the flags in `shape` and the tokenizer become that model's. Raises NanochatError if one is given.
    """
    if args.from_run is None:
        return stage.start
    if useless := args.typed_of((*shape, "tokenizer")):
        raise NanochatError(f"--from-run {args.from_run} decides what the model is: leave out {useless}")
    if stage.start is not None:
        args.adopt({name: stage.recorded_settings()[name] for name in shape})
        return stage.start
    directory, _, meta = open_checkpoint(STAGES[0], args.from_run)
    if "imported" in meta:
        raise NanochatError(f"the base model of run {args.from_run!r} came from elsewhere: it can only be fine-tuned")
    args.adopt({name: meta["settings"][name] for name in shape})
    args.tokenizer = str(get_run_dir(args.from_run))
    if "expand_at" not in args.given:
        args.expand_at = 0.0  # all blocks have learned
    return directory, meta["step"]

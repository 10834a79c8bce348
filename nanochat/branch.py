"""Begins a run of its own with the model of another run: --from-run. Used by the training scripts.

Fine-tuning and reinforcing write beside the stage that they start from, so the new run gets a copy of its checkpoint, once all
else has been checked. The files are links where the disk has them and take no room: files of a checkpoint are never changed,
only removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nanochat.checkpoint_manager import (
    META_FILE,
    begin_checkpoint,
    finish_checkpoint,
    lock_stage,
    open_checkpoint,
    read_meta,
    verify_checkpoint,
)
from nanochat.common import NanochatError
from nanochat.eval_results import EVAL_FILE
from nanochat.metrics import METRICS_FILE
from nanochat.ranks import on_rank0
from nanochat.runs import MANIFEST_FILE, SETTINGS_FILE, STAGES, get_run_dir, get_stage_dir, list_steps, step_dir
from nanochat.settings import Arguments
from nanochat.stage import Stage, free_tag, restarted_by
from nanochat.tokenizer import FILE_NAME

RECORDS = (SETTINGS_FILE, METRICS_FILE, EVAL_FILE)  # how the copied stage came about, for reports


def branch_tag(args: Arguments, stage: str, resume: str) -> str:
    """The tag of the run that --from-run begins: --model-tag, or a free one.

    Raises NanochatError if a run of that tag already has other models, or if it is unclear which run to continue. A
    collective call.
    """
    source, tag = args.from_run, args.model_tag
    if tag is None:
        if resume != "none" or restarted_by():
            raise NanochatError("--from-run does not say which of its runs goes on: add the --model-tag of one")
        return str(on_rank0(lambda: free_tag(STAGES[0], source)))
    if tag == source:
        raise NanochatError(f"--from-run {source} begins another run: give that another --model-tag")
    for other in STAGES:
        directory = get_stage_dir(tag, other)
        if other != stage and (steps := list_steps(directory)) and read_meta(directory, steps[-1]).get("copy_of") != source:
            raise NanochatError(f"run {tag!r} has a model of its own in {directory}: choose another --model-tag")
    return str(tag)


def copy_start(stage: Stage, start_dir: Path, step: int) -> None:
    """Copy the step that a stage starts from into the stage's run, if it is another run's. A collective call."""
    if start_dir.parent != stage.directory.parent:
        on_rank0(lambda: _copy(start_dir, step, stage.directory.parent))


def _copy(start_dir: Path, step: int, run_dir: Path) -> None:
    """The step of a stage with its tokenizer and its records; the step becomes visible last."""
    source, target = step_dir(start_dir, step), run_dir / start_dir.name
    verify_checkpoint(source)
    with lock_stage(target):
        shutil.copyfile(start_dir.parent / FILE_NAME, run_dir / FILE_NAME)
        is_newest = step == list_steps(start_dir)[-1]
        for record in RECORDS if is_newest else RECORDS[:1]:  # the others tell of later steps, too
            if (start_dir / record).exists():
                shutil.copyfile(start_dir / record, target / record)
        temporary = begin_checkpoint(target, step)
        try:
            for path in source.rglob("*"):
                if path.is_file() and path.name not in (META_FILE, MANIFEST_FILE):
                    copy = temporary / path.relative_to(source)
                    copy.parent.mkdir(exist_ok=True)
                    _link(path, copy)
            finish_checkpoint(temporary, target, step, {**read_meta(start_dir, step), "copy_of": start_dir.parent.name})
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def start_of(args: Arguments, stage: Stage, shape: tuple[str, ...]) -> tuple[Path, int] | None:
    """The checkpoint whose weights a base model begins with: the one to resume from, that of --from-run, or none.

    With --from-run, the flags in `shape` and the tokenizer become that model's. Raises NanochatError if one is given.
    """
    if args.from_run is None:
        return stage.start
    if "from_run" in args.given:
        if useless := args.typed_of((*shape, "tokenizer")):
            given = useless.replace("--switches", "--set")
            raise NanochatError(f"--from-run {args.from_run} decides what the model is: leave out {given}")
        args.forget(*shape, "tokenizer")
    if stage.start is not None:
        stage.adopt(args)
        return stage.start
    directory, _, meta = open_checkpoint(STAGES[0], args.from_run)
    if "imported" in meta:
        raise NanochatError(f"the base model of run {args.from_run!r} came from elsewhere: it can only be fine-tuned")
    args.adopt({name: meta["settings"][name] for name in shape if name in meta["settings"]})
    args.tokenizer = str(get_run_dir(args.from_run))
    if "expand_at" not in args.given:
        args.expand_at = 0.0  # all blocks have learned
    return directory, meta["step"]

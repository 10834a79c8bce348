"""Checkpoints: whole or invisible, verified, chosen as told."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from filelock import SoftFileLock

from nanochat import checkpoint_manager, files
from nanochat.checkpoint_manager import (
    CheckpointError,
    clean_up,
    find_run,
    load_checkpoint,
    load_into,
    load_model,
    newest_valid_step,
    prune,
    read_config,
    read_meta,
    save_checkpoint,
    save_sharded,
)
from nanochat.common import NanochatError, describe_error
from nanochat.files import atomic_write, sha256_of
from nanochat.gpt import GPTConfig
from nanochat.report import find_newest_run
from nanochat.runs import get_run_dir, list_steps, step_dir
from nanochat.stage import load_optimizer
from nanochat.tokenizer import Tokenizer
from scripts import base_train
from tests.helpers import load_all

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def change_manifest(directory: Path, **content: object) -> None:
    """Have the manifest of a checkpoint say something else, as if it had been written so."""
    path = directory / "manifest.json"
    manifest = {**json.loads(path.read_text()), **content}
    path.write_text(json.dumps({**manifest, "digest": checkpoint_manager._digest(manifest)}))


def replace_file(path: Path, content: bytes) -> None:
    """Put another file into a checkpoint, and into its manifest."""
    path.write_bytes(content)
    files = json.loads((path.parent / "manifest.json").read_text())["files"]
    about = {"sha256": sha256_of(path), "bytes": len(content)}
    change_manifest(path.parent, files={**files, path.name: about})


@pytest.fixture
def stage_dir(base_dir: Path) -> Path:
    return base_dir / "runs" / "r" / "base"


def test_what_is_saved_is_loaded(stage_dir: Path) -> None:
    save_checkpoint(stage_dir, 5, STATE, {"m": torch.zeros(2)}, {"note": "x"})
    model, optimizer, meta = load_all(stage_dir, 5)
    assert all(torch.equal(model[name], tensor) for name, tensor in STATE.items())
    assert torch.equal(optimizer["m"], torch.zeros(2))
    assert (meta["note"], meta["step"]) == ("x", 5)


def test_its_files_are_as_readable_as_others(stage_dir: Path) -> None:
    stage_dir.mkdir(parents=True)
    (stage_dir / "other").write_text("x")
    directory = save_checkpoint(stage_dir, 5, STATE, STATE, {})
    assert {path.stat().st_mode for path in directory.iterdir()} == {(stage_dir / "other").stat().st_mode}


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "tear", "remove"])
def test_damage_is_found_and_the_step_before_is_used(stage_dir: Path, name: str, damage: str) -> None:
    for step in (1, 2):
        save_checkpoint(stage_dir, step, STATE, STATE, {"note": "x"})
    path = step_dir(stage_dir, 2) / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(CheckpointError):
        load_all(stage_dir, 2)
    step, skipped = newest_valid_step(stage_dir)
    assert step == 1
    assert len(skipped) == (0 if name == "manifest.json" and damage == "remove" else 1)


@pytest.mark.parametrize("failing", ["save_tensors", "_write_json", "sha256_of", "_flush_to_disk"])
def test_a_failure_at_any_stage_leaves_what_was_there(stage_dir: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(stage_dir, 1, STATE, None, {"note": "old"})

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(checkpoint_manager, failing, fail)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(stage_dir, step, STATE, None, {"note": "new"})
    monkeypatch.undo()
    assert list_steps(stage_dir) == [1]
    assert load_checkpoint(stage_dir, 1)[1]["note"] == "old"
    assert [path.name for path in stage_dir.iterdir()] == ["step_000001"]


def test_a_full_disk_is_an_oserror(stage_dir: Path) -> None:
    """safetensors has an error of its own for it; ours is the system's, with its number."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError) as error:
        checkpoint_manager.save_tensors(STATE, Path("/dev/full/x"))
    assert error.value.errno


def test_saving_a_step_again_replaces_it(stage_dir: Path) -> None:
    for note in ("one", "two"):
        save_checkpoint(stage_dir, 1, STATE, None, {"note": note})
    assert load_checkpoint(stage_dir, 1)[1]["note"] == "two"
    assert [path.name for path in stage_dir.iterdir()] == ["step_000001"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damaged", "keep_last", "left"),
    [
        ((), 2, [2, 5, 6]),
        ((5,), 2, [2, 4, 5, 6]),  # 5 goes when 4 does
        ((3, 4), 1, [2, 6]),
        ((3, 4, 5), 2, [2, 3, 4, 5, 6]),
        ((6,), 1, [2, 5, 6]),
        ((1, 2, 3, 4), 3, [1, 2, 3, 4, 5, 6]),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, _truncate])
def test_the_newest_whole_checkpoints_are_kept_and_the_best(
    stage_dir: Path, damaged: tuple[int, ...], keep_last: int, left: list[int], name: str, damage: Callable[[Path], None]
) -> None:
    """Those later than the step at hand are nobody's business; without a manifest a step is no checkpoint to begin with."""
    for step in range(1, 8):
        save_checkpoint(stage_dir, step, STATE, None, {})
    for step in damaged:
        damage(step_dir(stage_dir, step) / name)
    listed = list_steps(stage_dir)
    prune(stage_dir, 6, keep_last, best=2)
    assert list_steps(stage_dir) == [step for step in [*left, 7] if step in listed]


def test_what_a_later_stage_was_begun_from_is_kept(tiny_run: Path) -> None:
    """Its base may still be training: the stage reads it again, for the optimizer's state or for --kl-weight."""
    parent = json.loads((tiny_run / "sft" / "settings.json").read_text(encoding="utf-8"))["parent"]
    assert parent == "base step 6"
    for step in (7, 8):
        shutil.copytree(step_dir(tiny_run / "base", 6), step_dir(tiny_run / "base", step))
    (tiny_run / "rl").mkdir()
    (tiny_run / "rl" / "settings.json").write_text("damaged", encoding="utf-8")
    prune(tiny_run / "base", 8, 1, best=None)
    assert list_steps(tiny_run / "base") == [6, 8]


class Death(BaseException):
    """Ends a write as kill -9 would."""


def test_what_deaths_leave_half_written_is_cleaned_up(stage_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that only the holder of the stage's lock writes; not what an evaluation may be about to put in place."""

    def die(*arguments: object, **options: object) -> None:
        raise Death

    run_dir = stage_dir.parent
    ours = [stage_dir / "settings.json", run_dir / "tokenizer.json"]
    theirs = [stage_dir / "eval.json", run_dir / "report.md", run_dir / "sft" / "settings.json"]
    for path in (*ours, *theirs):
        atomic_write(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(Path, "unlink", lambda *arguments, **options: None)
        for path in (*ours, *theirs, *ours):
            with pytest.raises(Death):
                atomic_write(path, "new")
    there = set(run_dir.rglob("*"))
    clean_up(stage_dir)
    removed = there - set(run_dir.rglob("*"))
    assert sorted(path.with_name(".".join(path.name.split(".")[1:3])) for path in removed) == sorted(ours * 2)
    assert all(path.read_text() == "old" for path in (*ours, *theirs))


def test_the_newest_run_is_chosen_not_the_largest(tiny_run: Path) -> None:
    other = get_run_dir("d99")
    shutil.copytree(tiny_run, other)
    assert find_run("base", "tiny") == "tiny"
    for run, created in ((tiny_run, 2.0), (other, 1.0)):
        change_manifest(step_dir(run / "base", 6), created=created)
    assert find_run("base") == "tiny"
    assert load_model("base", "cpu", "eval")[2]["tag"] == "tiny"


@pytest.mark.parametrize("manifest", ["{}", '{"version": 2}', '{"version": "2"}', '{"version": 2, "created": null}',
                                      "[" * 100_000, '{"version": 2, "created": 4e9}'])  # fmt: skip
def test_a_bad_manifest_in_another_run_hinders_nobody(tiny_run: Path, manifest: str) -> None:
    bad = step_dir(get_run_dir("bad") / "base", 20)
    bad.mkdir(parents=True)
    (bad / "manifest.json").write_text(manifest)
    save_checkpoint(tiny_run / "base", 9, STATE, None, {})
    assert find_run("base") == "tiny"
    with pytest.raises(CheckpointError, match="step_000020|no base checkpoint"):
        load_model("base", "cpu", "eval", "bad")


@pytest.mark.parametrize("created", [None, True, "4e9", 1e300, float("nan")])
def test_a_time_that_is_none_hinders_nobody(tiny_run: Path, created: object) -> None:
    shutil.copytree(tiny_run, get_run_dir("bad"))
    for step in list_steps(get_run_dir("bad") / "base"):
        change_manifest(step_dir(get_run_dir("bad") / "base", step), created=created)
    assert find_run("base") == "tiny"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("manifest.json", {"files": None}, r"manifest\.json is damaged .* use another step: 3"),
        ("manifest.json", {"files": {"meta.json": 1}}, r"manifest\.json is damaged .* use another step: 3"),
        ("meta.json", {"tokenizer": ...}, r"meta\.json is damaged .* use another step: 3"),
        ("meta.json", {"step": "x"}, None),
        ("meta.json", {"model_config": None}, "does not say what it is like"),
        ("meta.json", {"foo": 1}, "of another version: its model_config has foo; update nanochat"),
        (
            "meta.json",
            {"n_layer": "2"},
            "n_layer '2' is not a whole number above 0, .*; restore the file, or use another",
        ),
        ("meta.json", {"n_layer": 2.5}, "n_layer 2.5 is not"),
        ("meta.json", {"n_layer": -1}, "n_layer -1 is not"),
        ("meta.json", {"n_head": 0}, "n_head 0 is not"),
        ("meta.json", {"n_kv_head": True}, "n_kv_head True is not"),
        ("meta.json", {"sequence_len": -5}, "sequence_len -5 is not"),
        ("meta.json", {"rotary_base": "x"}, "rotary_base 'x' is not a number above 0"),
        ("meta.json", {"bigrams": -1}, "bigrams -1 is not"),
        ("meta.json", {"value_embeddings": 1}, "value_embeddings 1 is not true or false"),
        ("meta.json", {"window_pattern": 7}, "window_pattern 7 is not a text"),
    ],
)
def test_json_that_says_something_else_is_named(tiny_run: Path, name: str, change: dict, reason: str | None) -> None:
    """In a checkpoint whose manifest is made to agree."""
    directory = step_dir(tiny_run / "base", 6)
    content = json.loads((directory / name).read_text())
    for key, value in change.items():
        inner = content if key in content else content["model_config"]
        inner[key] = value
        if value is ...:
            del inner[key]
    if name == "manifest.json":
        change_manifest(directory, **content)
    else:
        replace_file(directory / name, json.dumps(content).encode())
    if reason is None:
        assert load_model("base", "cpu", "eval", "tiny")[2]["step"] == 6
        return
    with pytest.raises(NanochatError, match=reason):
        load_model("base", "cpu", "eval", "tiny")


def test_weights_that_are_none_are_named(tiny_run: Path) -> None:
    replace_file(step_dir(tiny_run / "base", 6) / "model.safetensors", b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged .* use another step: 3"):
        load_model("base", "cpu", "eval", "tiny")


def test_what_is_absent_is_named_with_what_there_is(tiny_run: Path) -> None:
    with pytest.raises(CheckpointError, match="'nope' has no base checkpoint.*runs with one: tiny"):
        load_model("base", "cpu", "eval", "nope")
    with pytest.raises(CheckpointError, match=r"'tiny' has no rl .* no run has one yet; of this run there is base, sft \("):
        load_model("rl", "cpu", "eval", "tiny")
    (tiny_run.parent.parent / "chatsft_checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"no rl .* nanochat's in chatsft_checkpoints are not.*scripts.chat_rl"):
        load_model("rl", "cpu", "eval")
    with pytest.raises(CheckpointError, match="steps there: 3, 6"):
        load_model("base", "cpu", "eval", "tiny", step=5)
    with pytest.raises(NanochatError, match="not a plain name"):
        load_model("base", "cpu", "eval", "../etc")
    with pytest.raises(NanochatError, match="choose one of base, sft, rl"):
        load_model("best", "cpu", "eval", "tiny")
    with pytest.raises(NanochatError, match="unknown source 'mid': choose one of base, sft, rl"):
        load_model("mid", "cpu")


def test_a_changed_tokenizer_is_noticed(tiny_run: Path) -> None:
    Tokenizer([bytes([i]) for i in range(256)]).save(tiny_run)
    with pytest.raises(CheckpointError, match="is not the one"):
        load_model("base", "cpu", "eval", "tiny")


def test_weights_of_another_shape_are_refused(tiny_run: Path) -> None:
    _, meta = load_checkpoint(tiny_run / "base", 6)
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoint_manager.build_model(GPTConfig(**meta["model_config"]), STATE, "cpu")


def test_lineage_is_stored(tiny_run: Path) -> None:
    meta = load_checkpoint(tiny_run / "sft", 4)[1]
    assert meta["parent"] == {"stage": "base", "step": 6}


def test_all_of_a_step_is_on_disk_before_it_is_seen(stage_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files and their folder before it gets its name, the folder with the name after: a power cut loses none of it."""
    events: list[object] = []
    flush, rename = os.fsync, os.replace

    def note_flush(fd: int) -> None:
        events.append(os.fstat(fd).st_ino)
        flush(fd)

    def note_rename(*paths: object) -> None:
        events.append("named")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "replace", note_rename)
    directory = save_checkpoint(stage_dir, 1, STATE, STATE, {})
    named = events.index("named")
    paths = list(directory.iterdir()) + [directory] * (os.name != "nt")  # Windows flushes no folders
    assert len(paths) >= 4 and {path.stat().st_ino for path in paths} <= set(events[:named])
    assert os.name == "nt" or stage_dir.stat().st_ino in events[named:]


def test_a_lock_that_outlived_its_process_is_named(stage_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system has no locks, the file alone says that a stage is taken, and a killed process leaves it behind."""
    monkeypatch.setattr(files, "FileLock", SoftFileLock)
    stage_dir.mkdir(parents=True)
    stale = stage_dir / ".lock"
    stale.write_text("1\nanother-host\n")
    with pytest.raises(NanochatError, match=f"remove {re.escape(str(stale))}$"), checkpoint_manager.lock_stage(stage_dir):
        pass
    stale.unlink()
    with checkpoint_manager.lock_stage(stage_dir):
        assert stale.exists()


@pytest.mark.skipif(os.name == "nt", reason="it has locks of another kind")
def test_a_file_system_that_refuses_locks_is_named(stage_dir: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does where its lock service does not run."""
    import fcntl

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError) as failure, checkpoint_manager.lock_stage(stage_dir):
        pass
    assert describe_error(failure.value) == (
        f"the file system of {base_dir} locks no files: mount it with locks, or choose another with NANOCHAT_BASE_DIR"
    )


def test_weights_alone_are_enough_to_generate(tiny_run: Path) -> None:
    """As in a copy without the optimizer's state, which is twice their size; to train on, it is missed."""
    (step_dir(tiny_run / "base", 6) / "optim.safetensors").unlink()
    assert load_model("base", "cpu", "eval", "tiny")[2]["step"] == 6
    with pytest.raises(CheckpointError, match=r"optim.safetensors is damaged \(missing"):
        load_all(tiny_run / "base", 6)


def test_a_flipped_bit_of_the_optimizers_state_is_found_where_it_is_read(tiny_run: Path) -> None:
    optimizer = load_model("base", "cpu", "eval", "tiny")[0].setup_optimizer()
    load_optimizer(optimizer, tiny_run / "base", 6)
    path = step_dir(tiny_run / "base", 6) / "optim.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="optim.safetensors is damaged"):
        load_optimizer(optimizer, tiny_run / "base", 6)


@dataclass
class ShardedOptimizer:
    """As with --fsdp, whose state is read in parts by its names."""

    names: tuple[str, ...]
    sharded: bool = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(4) for name in self.names}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert all(bool(tensor.any()) for tensor in state.values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("in_parts", [False, True])
def test_state_that_is_read_in_parts_and_is_not_there_is_named(stage_dir: Path, in_parts: bool) -> None:
    states = {"model.safetensors": STATE, "optim.safetensors": {"b": STATE["b"].float()}}
    if in_parts:
        save_sharded(stage_dir, 1, states, {})
    else:
        save_checkpoint(stage_dir, 1, *states.values(), {})
    load_optimizer(ShardedOptimizer(("b",)), stage_dir, 1)
    with pytest.raises(CheckpointError, match=r"with another optimizer \(it has no '.*c'\): add --load-optimizer 0"):
        load_optimizer(ShardedOptimizer(("b", "c")), stage_dir, 1)
    save_checkpoint(stage_dir, 1, STATE, None, {})
    with pytest.raises(CheckpointError, match="was saved without optimizer state: add --load-optimizer 0"):
        load_optimizer(ShardedOptimizer(("b",)), stage_dir, 1)
    with pytest.raises(CheckpointError, match=r"optim\.safetensors is damaged \(missing, .*; train it again"):
        load_into(step_dir(stage_dir, 1), "optim.safetensors", {"b": torch.zeros(4)})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("in_parts", [False, True])
def test_what_a_killed_save_left_is_not_in_the_next_one(stage_dir: Path, in_parts: bool) -> None:
    left = stage_dir / ".step_000001.tmp" / "sharded" / "left"
    left.parent.mkdir(parents=True)
    left.touch()
    if in_parts:
        save_sharded(stage_dir, 1, {"model.safetensors": STATE}, {})
    else:
        save_checkpoint(stage_dir, 1, STATE, None, {})
    assert not [path for path in stage_dir.rglob("*") if path.name == "left" or ".tmp" in path.name]


def test_a_copy_that_a_file_manager_named_is_no_run(tiny_run: Path) -> None:
    shutil.copytree(tiny_run, tiny_run.with_name("tiny copy"))
    assert find_run("base") == find_newest_run() == "tiny"


@pytest.mark.parametrize(("version", "way_out"), [(1, "train it again, or use the nanochat that saved it"), (99, "update it")])
def test_another_format_is_refused_in_a_sentence(tiny_run: Path, version: int, way_out: str) -> None:
    """Wherever a checkpoint is first looked at; what is newest is told by it as by others."""
    stage_dir = tiny_run / "base"
    save_checkpoint(get_run_dir("other") / "base", 1, STATE, None, {})  # later than the tiny run's
    for directory in (step_dir(stage_dir, step) for step in list_steps(stage_dir)):
        meta = json.loads((directory / "meta.json").read_text())
        replace_file(directory / "meta.json", json.dumps({**meta, "version": version}).encode())
        change_manifest(directory, version=version, created=4e9)
        if version == 1:  # whose manifests had no digest
            manifest = json.loads((directory / "manifest.json").read_text())
            del manifest["digest"]
            (directory / "manifest.json").write_text(json.dumps(manifest))
    assert find_run("base") == "tiny"
    sentence = f"step_000006 has format {version}, but this nanochat reads only 2: {way_out}$"
    uses: list[Callable[[], object]] = [
        lambda: load_model("base", "cpu", "eval"),
        lambda: load_checkpoint(stage_dir, 6),
        lambda: read_meta(stage_dir, 6),
        lambda: base_train.main(["--depth=2", "--model-tag=tiny", "--resume=6", "--device-type=cpu"]),
    ]
    for use in uses:
        with pytest.raises(CheckpointError, match=sentence):
            use()
    with pytest.raises(NanochatError, match=rf"format {version}, .* or choose another --model-tag$"):
        base_train.main(["--depth=2", "--model-tag=tiny", "--resume=auto", "--device-type=cpu"])


def test_a_new_switch_may_be_off_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the developer guide adds one: what is its default suits it, whatever that is."""

    @dataclass(frozen=True)
    class Config(GPTConfig):
        smear: float = 0.0
        heads_alone: int | None = None

    monkeypatch.setattr(checkpoint_manager, "GPTConfig", Config)
    assert read_config(asdict(Config(bigrams=0))) == Config(bigrams=0)
    assert read_config({"smear": 0.5, "heads_alone": 2}) == Config(smear=0.5, heads_alone=2)
    with pytest.raises(NanochatError, match="smear -0.5"):
        read_config({"smear": -0.5})


def test_what_is_skipped_is_told_without_the_way_out_that_was_taken(stage_dir: Path) -> None:
    for step, content in ((1, "{"), (2, '{"version": 99}')):
        directory = step_dir(stage_dir, step)
        directory.mkdir(parents=True)
        (directory / "manifest.json").write_text(content)
    step, skipped = newest_valid_step(stage_dir)
    assert step is None and skipped[0].endswith(f"reads only {checkpoint_manager.FORMAT_VERSION}")
    assert not any(word in reason for reason in skipped for word in ("update it", "--step", "train it"))

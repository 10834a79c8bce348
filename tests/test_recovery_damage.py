"""Training survives damage: torn files and flipped bytes of checkpoints, leftovers, and data that goes away."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat import dataloader
from nanochat.checkpoint_manager import find_run, load_checkpoint, newest_valid_step, save_checkpoint
from nanochat.common import NanochatError
from nanochat.runs import list_steps, step_dir
from scripts import base_train
from tests.helpers import load_all, make_document, write_documents
from tests.nursery import Nursery
from tests.recovery_helpers import (
    FILES,
    LAST,
    STATE,
    assert_ended_alike,
    content_of,
    interrupted_copy,
    logged_steps,
    stage_dir_of,
    train,
    train_here,
)

pytestmark = pytest.mark.usefixtures("tokenizer_in_place")

# ----------------------------------------------------------------------------- torn writes


def _damages(content: bytes, rng: random.Random) -> dict[str, bytes | None]:
    """What may be found in the place of a file; None: nothing."""
    place = rng.randrange(len(content))
    return {
        "empty": b"", "one byte": content[:1], "half": content[: len(content) // 2], "all but one byte": content[:-1],
        f"flipped at {place}": _flip(content, place, rng), "removed": None,
    }  # fmt: skip


def _flip(content: bytes, place: int, rng: random.Random) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoints_are_passed_over_and_replaced(
    nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path, name: str
) -> None:
    """Whatever happened to a file of the newest steps, the run goes on from the one before, says so, and ends alike."""
    damages = list(_damages((step_dir(whole, 8) / name).read_bytes(), random.Random(name)).items())
    for chosen in (damages[:3], damages[3:]):
        stage_dir = interrupted_copy(whole, base_dir)
        listed = []
        for step, (_, damaged) in zip((4, 6, 8), chosen, strict=True):
            path = step_dir(stage_dir, step) / name
            path.write_bytes(damaged) if damaged is not None else path.unlink()
            if name != "manifest.json" or damaged is not None:  # without a manifest it is no checkpoint
                listed.append(str(step_dir(stage_dir, step)))
        said = train(nursery, base_dir, [*base_flags, "--keep-last=-1"])
        assert "going on from step 2 " in said, chosen
        assert re.findall(r"^passed over: (.*/step_\d+)", said, re.MULTILINE) == listed[::-1], chosen
        assert list_steps(stage_dir) == list_steps(whole)
        assert all(content_of(stage_dir, step) == content_of(whole, step) for step in list_steps(whole))
        assert newest_valid_step(stage_dir) == (LAST, [])
        assert_ended_alike(stage_dir, whole)
        shutil.rmtree(stage_dir)


def test_when_none_is_whole_nothing_is_written_over(base_flags: list[str], whole: Path, base_dir: Path) -> None:
    """As of a run that was copied without the optimizer's state, whose weights are still good."""
    stage_dir = interrupted_copy(whole, base_dir)
    for step in list_steps(stage_dir):
        (step_dir(stage_dir, step) / "optim.safetensors").unlink()

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in stage_dir.rglob("[a-z]*") if path.is_file()}

    before = contents()
    with pytest.raises(NanochatError, match="no checkpoint in .* is whole .*: restore its files, or choose another"):
        base_train.main(base_flags)
    assert contents() == before


def test_a_flip_anywhere_is_found(whole: Path, base_dir: Path) -> None:
    """Of tensors and meta every bit counts."""
    stage_dir, rng = interrupted_copy(whole, base_dir), random.Random(3)
    for name in FILES[:3]:
        path = step_dir(stage_dir, 8) / name
        content = path.read_bytes()
        for place in (0, 8, len(content) - 1, *(rng.randrange(len(content)) for _ in range(100))):
            path.write_bytes(_flip(content, place, rng))
            assert newest_valid_step(stage_dir)[0] == 6, (name, place)
        path.write_bytes(content)
        assert newest_valid_step(stage_dir) == (8, [])


def _flips(content: bytes, rng: random.Random) -> Iterator[bytes]:
    """Each byte changed in two ways; an "e" makes other numbers of digits."""
    for place, old in enumerate(content):
        for new in {old ^ 1 << rng.randrange(8), rng.choice((ord("e"), rng.randrange(256)))} - {old}:
            yield content[:place] + bytes([new]) + content[place + 1 :]


def test_a_flip_in_the_manifest_is_found_or_harmless(base_dir: Path) -> None:
    """Either the step is passed over, or it is read as it was written."""
    stage_dir = stage_dir_of(base_dir)
    for step in (1, 2):
        save_checkpoint(stage_dir, step, STATE, STATE, {"note": step})
    path = step_dir(stage_dir, 2) / "manifest.json"
    found = 0
    for content in _flips(path.read_bytes(), random.Random(4)):
        path.write_bytes(content)
        step, skipped = newest_valid_step(stage_dir)
        assert (step, len(skipped)) in ((1, 1), (2, 0)), content
        found += step == 1
        if step == 2:
            model, optimizer, meta = load_all(stage_dir, 2)
            assert torch.equal(model["a"], STATE["a"]) and torch.equal(optimizer["a"], STATE["a"]) and meta["note"] == 2
    assert found > 500


def test_a_damaged_manifest_never_makes_its_run_the_newest(base_dir: Path) -> None:
    """Nor does it keep the newest one from being found."""
    save_checkpoint(stage_dir_of(base_dir), 1, STATE, None, {})
    save_checkpoint(base_dir / "runs" / "newer" / "base", 1, STATE, None, {})
    path = step_dir(stage_dir_of(base_dir), 1) / "manifest.json"
    for content in _flips(path.read_bytes(), random.Random(5)):
        path.write_bytes(content)
        assert find_run("base") == "newer", content


def test_training_goes_on_beside_a_manifest_without_its_date(
    nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path
) -> None:
    """What is damaged in one step, or in another run, never stops a save."""
    stage_dir = interrupted_copy(whole, base_dir)
    path = step_dir(stage_dir, 8) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"created"', b'"creaked"'))
    train(nursery, base_dir, base_flags)
    assert_ended_alike(stage_dir, whole)


def test_strays_and_leftovers_are_harmless(nursery: Nursery, base_flags: list[str], whole: Path, base_dir: Path) -> None:
    """Files that do not belong there change nothing; what a kill left is removed, and what it had set aside put back. A row
    that was cut short spoils none after it.
    """
    stage_dir = interrupted_copy(whole, base_dir)
    with open(stage_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"timestamp": 1, "step": 9, "tra')
    (step_dir(stage_dir, 8) / "stray").write_text("x")
    (stage_dir / "step_000099").mkdir()
    (stage_dir / "step_x").mkdir()
    half = stage_dir / ".step_000006.tmp"
    half.mkdir()
    shutil.copy(step_dir(stage_dir, 6) / "model.safetensors", half)
    shutil.copytree(step_dir(stage_dir, 6), stage_dir / ".step_000006.old")  # replaced already, and not yet removed
    (stage_dir / ".step_000006.old" / "manifest.json").unlink()
    os.rename(step_dir(stage_dir, 8), stage_dir / ".step_000008.old")  # set aside, and not yet replaced
    said = train(nursery, base_dir, base_flags)
    assert "going on from step 8" in said and "passed over" not in said
    assert_ended_alike(stage_dir, whole)


# ----------------------------------------------------------------------------- data that goes away


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Many small shards, read just before they are needed."""
    for name in ("BATCHES_AHEAD", "CHUNKS_AHEAD", "LANE_DOCUMENTS"):
        monkeypatch.setattr(dataloader, name, 1)
    monkeypatch.setattr(dataloader, "CHUNK_DOCUMENTS", 2)
    folder = tmp_path / "shards"
    for shard in range(40):
        texts = [make_document(100 * shard + i, 5) for i in range(4)]
        write_documents(folder / f"{'val' if shard == 39 else 'train'}_{shard:02d}.parquet", texts)
    return folder


def _delete(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.slow
def test_data_that_fails_in_mid_run(
    shards: Path, base_flags: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence names the file, all that was learned is saved, and once the file is back the end is the same."""
    flags, stage_dir = [*base_flags, f"--data={shards}", "--save-every=5", "--device-batch-size=1"], stage_dir_of(base_dir)
    undisturbed = load_checkpoint(train_here(flags, {}, monkeypatch), LAST)[0]
    losses = logged_steps(stage_dir, "train/loss")
    victim = shards / "train_23.parquet"  # its rows come to an update that has read some of its micro-batches
    content = victim.read_bytes()
    for damage in (_delete, _truncate, _zero):
        shutil.rmtree(stage_dir)
        with pytest.raises(NanochatError, match=re.escape(str(victim))) as error:
            train_here(flags, {3: lambda damage=damage: damage(victim)}, monkeypatch)
        assert "\n" not in str(error.value)
        trained = logged_steps(stage_dir, "train/loss")[-1][0]
        assert 3 < trained < LAST and newest_valid_step(stage_dir) == (trained, [])
        if damage is not _delete:  # then it would go on without it
            with pytest.raises(NanochatError):
                train_here(flags, {}, monkeypatch)
        assert newest_valid_step(stage_dir) == (trained, [])
        victim.write_bytes(content)
        train_here(flags, {}, monkeypatch)
        assert logged_steps(stage_dir, "train/loss") == losses
        for name, tensor in load_checkpoint(stage_dir, LAST)[0].items():
            assert torch.equal(tensor, undisturbed[name]), name


def test_validation_data_that_fails_costs_no_training(
    shards: Path, base_flags: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at a step at which no checkpoint was due."""
    flags = [*base_flags, f"--data={shards}", "--save-every=0"]
    with pytest.raises(NanochatError, match="val_39"):
        train_here(flags, {5: lambda: _delete(shards / "val_39.parquet")}, monkeypatch)
    assert newest_valid_step(stage_dir_of(base_dir)) == (5, [])

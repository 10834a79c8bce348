"""A run that goes on is the run that was begun: what is held out for validation stays so, wherever the text lies."""

from __future__ import annotations

import json
import ntpath
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from nanochat import dataset, same_run
from nanochat.checkpoint_manager import hash_of_weights, read_meta
from nanochat.common import NanochatError
from nanochat.dataloader import TokenLoader
from nanochat.dataset import Source, get_source
from nanochat.files import hash_of_sample, read_json
from nanochat.same_run import check_data
from nanochat.stage import Stage
from nanochat.tokenizer import Tokenizer
from scripts import base_eval, base_train, chat_sft
from tests.conftest import TINY_TRAINING, TINY_TUNING
from tests.helpers import make_document, write_documents

pytestmark = pytest.mark.usefixtures("tokenizer_in_place")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Few documents, of which a hash holds at least one out."""
    write_documents(tmp_path / "texts" / "a.jsonl", map(make_document, range(12)))
    return tmp_path / "texts"


def _train(texts: Path | str, *flags: str) -> None:
    assert base_train.main([*TINY_TRAINING, "--data", str(texts), "--model-tag=r", "--save-every=3", *flags]) == 0


def _measure() -> None:
    assert base_eval.main(["--model-tag=r", "--eval=bpb", "--device-type=cpu", "--split-tokens=512"]) == 0


def test_what_a_hash_holds_out_is_never_learned_from(texts: Path, base_dir: Path) -> None:
    _train(texts)
    stage_dir = base_dir / "runs" / "r" / "base"
    held_out = list(get_source(str(texts)).documents("val"))
    moved = []
    for seeds in (range(100 * n, 100 * n + 300) for n in range(1, 8)):  # some of these have a lower hash
        write_documents(texts / "b.jsonl", map(make_document, seeds))
        alone, resumed = get_source(str(texts)), get_source(str(texts))
        check_data(Stage("r", "base", stage_dir, 3, [3, 6]), resumed)
        moved.append(not set(held_out) <= set(alone.documents("val")))
        assert set(held_out) <= set(resumed.documents("val"))
        assert not set(held_out) & set(resumed.documents("train"))
    assert any(moved)  # without the run's own limit


def test_what_is_measured_was_not_learned_from(texts: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the file that had the document of the lowest hash, which decides what is held out, has gone since."""
    write_documents(texts / "b.jsonl", map(make_document, range(100, 400)))
    _train(texts)
    learned = set(get_source(str(texts)).documents("train"))
    (texts / "b.jsonl").unlink()
    assert set(get_source(str(texts)).documents("val")) & learned
    measured = []

    def open_loader(source: Source, tokenizer: Tokenizer, rows: int, length: int, split: str, *more: Any, **rest: Any) -> Any:
        measured.extend(source.documents(split) if split == "val" else [])
        return TokenLoader(source, tokenizer, rows, length, "train", *more, **rest)

    monkeypatch.setattr(base_eval, "TokenLoader", open_loader)
    _measure()
    assert not set(measured) & learned


def test_nothing_is_measured_on_training_text_when_the_validation_files_are_gone(texts: Path, base_dir: Path) -> None:
    write_documents(texts / "val.jsonl", map(make_document, range(90, 95)))
    _train(texts)
    (texts / "val.jsonl").unlink()
    with pytest.raises(NanochatError, match=r"the validation files that the run holds out are gone from .*: restore them"):
        _measure()


def test_files_are_read_in_the_order_in_which_the_run_knows_them(base_dir: Path, tmp_path: Path) -> None:
    """Shards of a download may arrive in any order, some between two resumptions."""
    shards = tmp_path / "shards"
    for name, seeds in (("2", range(12)), ("4", range(12, 24)), ("val", range(90, 95))):
        write_documents(shards / f"{name}.jsonl", map(make_document, seeds))
    _train(shards)
    stage_dir = base_dir / "runs" / "r" / "base"
    write_documents(shards / "3.jsonl", map(make_document, range(24, 36)))
    _train(shards, "--resume=3")
    assert list(read_meta(stage_dir, 6)["data"]["files"]) == ["2.jsonl", "4.jsonl", "3.jsonl", "val.jsonl"]
    write_documents(shards / "1.jsonl", map(make_document, range(36, 48)))
    source = get_source(str(shards))
    check_data(Stage("r", "base", stage_dir, 6, [3, 6]), source)
    assert list(source.numbered("train")) == [(number, make_document(number)) for number in range(48)]


def test_damaged_text_is_mended_and_the_run_goes_on(base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shards, broken = tmp_path / "shards", tmp_path / "shards" / "b.jsonl"
    for name, seeds in (("a", range(100, 640)), ("b", range(12)), ("val", range(90, 95))):
        write_documents(shards / f"{name}.jsonl", map(make_document, seeds))
    lines = broken.read_text(encoding="utf-8").splitlines(keepends=True)
    broken.write_text("".join([*lines[:5], lines[5][:20] + "\n", *lines[6:]]), encoding="utf-8")
    long = ("--num-iterations=40", "--resume=auto")
    with pytest.raises(NanochatError, match=r"b.jsonl, line 6, is not JSON"):
        _train(shards, *long)
    broken.write_text("".join([*lines[:5], *lines[6:]]), encoding="utf-8")  # without that line
    _train(shards, *long)
    assert f"going on with b.jsonl of {shards} as found now: run 'r' had not read so far" in capsys.readouterr().out
    write_documents(broken, map(make_document, range(13)))  # and now the run has read it
    with pytest.raises(NanochatError, match=r"b.jsonl of .* has changed since run 'r' read it: restore it to go on"):
        _train(shards, *long, "--resume=39")


def test_an_edit_that_keeps_the_size_is_noticed(texts: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the run was begun before samples were recorded."""
    _train(texts)
    path = texts / "a.jsonl"
    _train(texts, "--resume=3")
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("a", "e", 1), encoding="utf-8")
    with pytest.raises(NanochatError, match=r"a.jsonl of .* has changed since run 'r' read it: restore it to go on"):
        _train(texts, "--resume=3")

    def read_old(stage_dir: Path, step: int) -> dict[str, Any]:
        meta = read_meta(stage_dir, step)
        return {**meta, "data": {name: value for name, value in meta["data"].items() if name != "samples"}}

    monkeypatch.setattr(same_run, "read_meta", read_old)
    _train(texts, "--resume=3")


@pytest.mark.parametrize(("size", "edited"), [(5000, (0, 2500, 4999)), (3 << 20, (0, 4095, (3 << 20) - 1))])
def test_a_file_is_known_by_all_of_it_or_by_pieces(tmp_path: Path, size: int, edited: tuple[int, ...]) -> None:
    path, content = tmp_path / "text", bytearray(size)
    path.write_bytes(content)
    hashes = {hash_of_sample(path)}
    for place in edited:
        path.write_bytes(content[:place] + b"x" + content[place + 1 :])
        hashes.add(hash_of_sample(path))
    assert len(hashes) == 1 + len(edited)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_only_what_no_place_depends_on_may_change(
    tmp_path: Path, tokenizer: Tokenizer, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that goes on finds the documents that it holds, and those not yet dealt, whatever became of its files."""
    ends = {"a": 40, "b": 400, "c": 440, "d": 480}  # it stands in b
    texts = {name: [make_document(seed) for seed in range(end - (360 if name == "b" else 40), end)]
             for name, end in ends.items()}  # fmt: skip
    for name, documents in {**texts, "val": [make_document(900)]}.items():
        write_documents(tmp_path / f"{name}{suffix}", documents)
    source = get_source(str(tmp_path))
    with TokenLoader(source, tokenizer, 2, 64) as loader:
        for _ in range(20):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
    reached = state["reading"][1]
    read = reached - ends["a"]
    assert ends["a"] < reached < ends["b"]
    meta = {"data": source.describe(), "trainer": {"loader": [state]}}
    monkeypatch.setattr(same_run, "read_meta", lambda *_: meta)

    def go_on(name: str, documents: list[str] | None) -> None:
        path = tmp_path / f"{name}{suffix}"
        content = path.read_bytes()
        path.unlink() if documents is None else write_documents(path, documents)
        try:
            resumed = get_source(str(tmp_path))
            check_data(Stage("r", "base", tmp_path, 20, [20]), resumed)
            with TokenLoader(resumed, tokenizer, 2, 64) as again:
                again.load_state_dict([state])
                assert json.loads(json.dumps(again.state_dict()))["lanes"] == state["lanes"]
            assert dict(resumed.numbered("train"))[reached - 1] == texts["b"][read - 1]
        finally:
            path.write_bytes(content)

    a, b, c = (texts[name] for name in "abc")
    for name, documents in (("c", None), ("d", None), ("c", c[1:]), ("b", b[:read]), ("b", b + c)):
        go_on(name, documents)
    for name, documents in (("a", None), ("a", a[1:]), ("b", None), ("b", b[: read - 1]), ("val", ["new"] * 2)):
        with pytest.raises(NanochatError, match=rf"{name}{suffix} of .* since run 'r' read it: restore it"):
            go_on(name, documents)
    state["reading"][0] = 1  # all of them were read once, and numbered so
    with pytest.raises(NanochatError, match=rf"d{suffix} of .* has changed since"):
        go_on("d", c + c)
    state["reading"][0] = 0
    meta["data"]["files"][f"d{suffix}"] = "a hash, as of the builtin text"  # which another Python has otherwise
    with pytest.raises(NanochatError, match=rf"d{suffix} of .* has changed since"):
        go_on("d", texts["d"])


def test_what_an_address_is_called_says_nothing_of_its_files(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of a bucket named for validation may still change where the run has not come to."""
    bucket = fsspec.filesystem("memory")
    for name, count in (("a", 40), ("b", 40), ("val", 5)):
        bucket.pipe_file(f"/team-val/{name}.jsonl", b'{"text": "some words"}\n{"text": "others"}\n' * count)
    state = {"reading": [0, 10], "counted": {}}
    meta = {"data": get_source("memory://team-val").describe(), "trainer": {"loader": [state]}}
    monkeypatch.setattr(same_run, "read_meta", lambda *_: meta)
    bucket.pipe_file("/team-val/b.jsonl", b'{"text": "mended"}\n' * 3)
    stage = Stage("r", "base", base_dir, 20, [20])
    check_data(stage, get_source("memory://team-val"))
    bucket.pipe_file("/team-val/val.jsonl", b'{"text": "mended"}\n' * 3)
    with pytest.raises(NanochatError, match=r"val.jsonl of .* has changed since run 'r' read it: restore it to go on"):
        check_data(stage, get_source("memory://team-val"))


def test_validation_files_that_come_later_are_refused(texts: Path, base_dir: Path) -> None:
    _train(texts)
    write_documents(texts / "val.jsonl", map(make_document, range(12, 20)))
    refused = r"val.jsonl of .* is for validation and came after the run began, .*: move it away"
    with pytest.raises(NanochatError, match=refused):
        _train(texts, "--resume=3")
    with pytest.raises(NanochatError, match=refused):
        _measure()


def test_a_resumed_run_keeps_its_tokenizer(texts: Path, base_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """Though another default one was trained since; but not if another is asked for."""
    _train(texts)
    other = Tokenizer.train((make_document(seed) for seed in range(500, 600)), 300)
    other.save(base_dir / "tokenizers" / "default")
    other.save(base_dir / "tokenizers" / "other")
    _train(texts, "--resume=3")
    with pytest.raises(NanochatError, match="the tokenizer is not the one that run 'r' was started with"):
        _train(texts, "--resume=3", "--tokenizer=other")


def test_a_run_goes_on_by_its_tag_alone(corpus: Path, tiny_run: Path, tokenizer: Tokenizer, base_dir: Path) -> None:
    """Whatever it was begun with: model, text, horizon, rates, seed, evaluation; only the machine's flags are given again."""
    tokenizer.save(base_dir / "tokenizers" / "own")
    flags = [*TINY_TRAINING, "bigrams=2", "--model-tag=own", f"--data={corpus}", "--seed=7", "--warmdown-ratio=0.5"]
    assert base_train.main([*flags, "--tokenizer=own", "--save-every=3", "--eval-every=2", "--keep-last=-1"]) == 0
    for script, tag, stage, last in ((base_train, "own", "base", 6), (chat_sft, "tiny", "sft", 4)):
        stage_dir = tiny_run.parent / tag / stage
        weights, settings = hash_of_weights(stage_dir, last), read_json(stage_dir / "settings.json")
        shutil.rmtree(stage_dir / f"step_{last:06d}")
        shutil.rmtree(base_dir / "tokenizers", ignore_errors=True)  # the run has a copy
        assert script.main([f"--model-tag={tag}", "--resume=auto", "--device-type=cpu", "--no-compile"]) == 0
        assert hash_of_weights(stage_dir, last) == weights
        assert read_json(stage_dir / "settings.json") == settings | {"resume": "auto"}


def test_what_is_typed_and_differs_is_refused(tiny_run: Path) -> None:
    for script, flags, sentence in (
        (base_train, ["--depth=3"], "run 'tiny' was started with --depth 2, not 3: leave the flag out to go on, or choose"),
        (base_train, ["--set", "bigrams=2"], r"was started with --set \['bigrams=1'\], not \['bigrams=2'\]: leave the flag"),
        (base_train, ["--fsdp", "--core-metric-every=1"], "--core-metric-every needs a whole model: make it -1 with --fsdp"),
        (chat_sft, ["--seed=7"], "was started with --seed 42, not 7: leave the flag out"),
        (chat_sft, ["--model-step=3"], "started from base step 6, not base step 3: leave --model-step out to go on, or begin"),
    ):
        with pytest.raises(NanochatError, match=sentence):
            script.main(["--model-tag=tiny", "--resume=auto", "--device-type=cpu", "--no-compile", *flags])


@pytest.mark.parametrize("path", ["C:/data", "file://C:/data", "file:///C:/data"])
def test_a_drive_is_recorded_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as windows:
        windows.setattr(os, "path", ntpath)
        windows.setattr(os, "getcwd", lambda: "C:\\here")
        recorded = dataset._absolute(path)
    assert recorded == "C:/data"


def test_a_text_is_found_again_from_elsewhere(
    texts: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(texts.parent)
    _train("texts")
    stage_dir = base_dir / "runs" / "r" / "base"
    assert read_meta(stage_dir, 6)["settings"]["data"] == os.path.join(os.getcwd(), "texts")
    monkeypatch.chdir(base_dir)
    assert base_train.main([*TINY_TRAINING, "--model-tag=r", "--save-every=3", "--resume=3"]) == 0
    monkeypatch.chdir(texts.parent)
    if sys.platform == "linux":  # others refuse such names
        undecodable = os.fsdecode(b"caf\xe9")
        texts.rename(undecodable)
        with pytest.raises(NanochatError, match="has a name that is not valid text: rename it"):
            get_source(undecodable)


def test_rates_that_are_left_out_stay_as_they_were(corpus: Path, tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    flags = [flag for flag in TINY_TRAINING if "-lr=" not in flag]
    assert base_train.main([*flags, "--data", str(corpus), "--model-tag=tiny", "--resume=3"]) == 0
    assert chat_sft.main([*TINY_TUNING, "--resume=2", "--matrix-lr=0.004", "--model-step=6"]) == 0
    assert "until now it was" in capsys.readouterr().out
    shutil.rmtree(tiny_run / "sft" / "step_000004")
    assert chat_sft.main([*TINY_TUNING, "--resume=auto"]) == 0
    assert "until now it was" not in capsys.readouterr().out

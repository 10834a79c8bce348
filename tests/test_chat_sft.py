"""The mixture that chat_sft takes where it is told none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint_manager import read_meta
from nanochat.common import NanochatError
from nanochat.loss_eval import batches_to_validate
from nanochat.pace import TimeLimit
from nanochat.report import settings_table
from nanochat.runs import list_steps
from nanochat.schedules import Schedule
from nanochat.stage import Stage, optimizer_switches
from nanochat.tokenizer import Tokenizer
from scripts import base_train, chat_sft
from tasks import smoltalk
from tests.conftest import TINY_TRAINING
from tests.helpers import write_gsm8k

FLAGS = ["--model-tag=tiny", "--no-compile", "--device-type=cpu", "--eval-tokens=256", "--num-iterations=2", "--save-every=1"]


def as_planned(limit: TimeLimit, step: int, seconds: float, schedule: Schedule) -> int:
    """For TimeLimit.updates, on a machine that is as fast as was measured."""
    return schedule.num_iterations


def test_an_identity_of_ones_own_is_learned_and_kept(
    tiny_run: Path, base_dir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_sft, "DEFAULT_TASKS", "Arithmetic:60,Identity*2")  # without the hub's
    stage_dir = tiny_run / "sft"
    shutil.rmtree(stage_dir)
    own = base_dir / "identity_conversations.jsonl"
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Sam."}]
    own.write_text("\n".join([json.dumps(talk)] * 40), encoding="utf-8")
    assert chat_sft.main(FLAGS) == 0
    assert f"{own} takes the place of Identity" in capsys.readouterr().out
    settings = json.loads((stage_dir / "settings.json").read_text(encoding="utf-8"))
    assert settings["tasks"] == f"Arithmetic:60,{own}*2" and settings["conversations"] == 60 + 2 * 38
    shutil.rmtree(stage_dir / "step_000002")
    assert chat_sft.main([*FLAGS, "--resume=auto"]) == 0  # with the same mixture, and without deciding again
    assert list_steps(stage_dir) == [1, 2] and "takes the place" not in capsys.readouterr().out
    own.unlink()
    with pytest.raises(NanochatError, match=own.name):  # nor is it another one now
        chat_sft.main([*FLAGS, "--resume=auto"])


def test_a_folder_with_a_comma_holds_no_entry_of_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "a,b"))
    assert chat_sft.default_tasks() == chat_sft.DEFAULT_TASKS
    (tmp_path / "a,b" / "identity_conversations.jsonl").write_text("[]", encoding="utf-8")
    with pytest.raises(NanochatError, match="a,b.identity_conversations.jsonl cannot be .* a comma ends an entry"):
        chat_sft.default_tasks()


def test_a_file_that_comes_later_changes_no_run(tiny_run: Path, base_dir: Path, capsys: pytest.CaptureFixture) -> None:
    (base_dir / "identity_conversations.jsonl").write_text("[]", encoding="utf-8")
    flags = ["--model-tag=tiny", "--resume=auto", "--num-iterations=4", "--no-compile", "--device-type=cpu"]
    assert chat_sft.main(flags) == 0
    assert "is complete" in capsys.readouterr().out


def test_a_resumed_stage_keeps_its_updates_and_asks_nothing_anew(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many a newer nanochat would make of a pass over the same conversations."""
    settings = json.loads((tiny_run / "sft" / "settings.json").read_text(encoding="utf-8"))
    step = list_steps(tiny_run / "sft")[-1]
    shutil.rmtree(tiny_run / "sft" / f"step_{step:06d}")
    monkeypatch.setattr(chat_sft, "estimate_tokens", None)
    assert chat_sft.main(["--model-tag=tiny", "--resume=auto", "--no-compile", "--device-type=cpu", "--eval-tokens=256"]) == 0
    assert list_steps(tiny_run / "sft")[-1] == step == settings["num_iterations"]


def test_a_resumed_stage_knows_its_tasks_files_and_its_rows(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they were named, and wherever it goes on."""
    shutil.rmtree(tiny_run / "sft")
    write_gsm8k(tmp_path / "questions", 100)
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--tasks=GSM8K:60", "--task-data=questions", "--max-seq-len=64"]
    assert chat_sft.main(flags) == 0
    for resumed in (FLAGS, [*FLAGS, "--max-seq-len=-1"]):
        shutil.rmtree(tiny_run / "sft" / "step_000002")
        monkeypatch.chdir("/")
        assert chat_sft.main([*resumed, "--resume=auto"]) == 0
        assert list_steps(tiny_run / "sft") == [1, 2]
    with pytest.raises(NanochatError, match="was started with --max-seq-len 64, not 32"):
        chat_sft.main([*FLAGS, "--max-seq-len=32", "--resume=1"])


def test_conversations_of_ones_own_are_found_again(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, by --resume and by --config; and a stage that recorded the path as it was typed goes on."""
    shutil.rmtree(tiny_run / "sft")
    shutil.copytree(tiny_run, tiny_run.parent / "again")
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Sam."}]
    (tmp_path / "mine.jsonl").write_text("\n".join([json.dumps(talk)] * 40), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert chat_sft.main([*FLAGS, "--tasks=Arithmetic:60, mine.jsonl*2"]) == 0
    shutil.rmtree(tiny_run / "sft" / "step_000002")
    monkeypatch.chdir(tiny_run)
    for flags in ([*FLAGS, "--resume=auto"], ["--config", str(tiny_run / "sft" / "config.toml"), "--model-tag=again"]):
        assert chat_sft.main(flags) == 0
    recorded = json.loads((tiny_run / "sft" / "settings.json").read_text(encoding="utf-8"))["tasks"]
    assert recorded == f"Arithmetic:60,{tmp_path / 'mine.jsonl'}*2"
    shutil.rmtree(tiny_run / "sft" / "step_000002")
    monkeypatch.setattr(Stage, "recorded_settings", lambda stage: read_meta(*stage.start)["settings"] | {"tasks": typed})
    typed = "Arithmetic:60,mine.jsonl*2"
    monkeypatch.chdir(tmp_path)
    assert chat_sft.main([*FLAGS, "--resume=auto"]) == 0
    assert list_steps(tiny_run / "sft") == [1, 2]


def test_the_sooner_of_updates_and_minutes_ends_a_stage(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(tiny_run / "sft")
    monkeypatch.setattr(chat_sft, "steps_in", lambda *_: 2)
    monkeypatch.setattr(TimeLimit, "updates", as_planned)
    flags = ["--model-tag=tiny", "--tasks=Arithmetic:60", "--no-compile", "--device-type=cpu", "--eval-tokens=256"]
    flags += ["--num-iterations=5", "--target-minutes=1"]
    assert chat_sft.main(flags) == 0
    assert list_steps(tiny_run / "sft") == [2]
    monkeypatch.setattr(chat_sft, "steps_in", lambda *_: 3)  # as a faster machine, or the same when less goes on beside it
    for again in (flags, flags[:-2]):  # also without the two
        assert chat_sft.main([*again, "--resume=auto"]) == 0
        assert list_steps(tiny_run / "sft") == [2]


def test_a_stage_by_time_is_repeated_by_its_updates(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many a slower machine, or the same when more goes on beside it, would do in that time."""
    config = tiny_run / "sft" / "config.toml"
    shutil.rmtree(tiny_run / "sft")
    shutil.copytree(tiny_run, tiny_run.parent / "again")
    monkeypatch.setattr(chat_sft, "steps_in", lambda *_: 3)
    monkeypatch.setattr(TimeLimit, "updates", as_planned)
    assert chat_sft.main([*FLAGS, "--num-iterations=-1", "--tasks=Arithmetic:60", "--target-minutes=1"]) == 0
    monkeypatch.setattr(chat_sft, "steps_in", lambda *_: 1)
    for flags in (["--resume=auto"], ["--model-tag=again"]):
        assert chat_sft.main(["--config", str(config), *flags]) == 0
    assert list_steps(tiny_run.parent / "again" / "sft")[-1] == list_steps(tiny_run / "sft")[-1] == 3


@pytest.mark.parametrize(
    ("asked", "device", "batches"), [(None, "cpu", 256), (None, "cuda", 4096), (-1, "cpu", None), (5, "cpu", 1)]
)
def test_evaluations_of_all_runs_take_equally_many_tokens(asked: int | None, device: str, batches: int | None) -> None:
    assert batches_to_validate(asked, torch.device(device), 1024) == batches


def test_the_bases_switches_of_the_optimizer_hold(
    corpus: Path, tokenizer: Tokenizer, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when fine-tuning goes on, and in whatever starts from it."""
    tokenizer.save(base_dir / "tokenizers" / "default")
    flags = [*TINY_TRAINING, "muon_beta2=0.5", f"--data={corpus}", "--model-tag=tiny"]
    assert base_train.main(flags) == 0
    given: list[dict[str, Any]] = []
    real = chat_sft.setup_optimizer
    monkeypatch.setattr(chat_sft, "setup_optimizer", lambda *args, **more: given.append(more) or real(*args, **more))
    assert chat_sft.main([*FLAGS, "--tasks=Arithmetic:60"]) == 0
    assert chat_sft.main([*FLAGS, "--tasks=Arithmetic:60", "--resume=1"]) == 0
    assert given == [{"muon_beta2": 0.5}] * 2
    settings = read_meta(base_dir / "runs" / "tiny" / "sft", 2)["settings"]
    assert optimizer_switches({"settings": settings}) == given[0]
    assert ["switches", "bigrams=1, muon_beta2=0.5"] in settings_table(settings)


OUT_OF_TURN = {"messages": [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]}


def test_a_conversation_out_of_turn_is_named_before_training(tiny_run: Path, tmp_path: Path) -> None:
    shutil.rmtree(tiny_run / "sft")
    path = tmp_path / "smoltalk" / "train.jsonl"
    path.parent.mkdir()
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path.write_text("\n".join(map(json.dumps, [*[talk] * 2000, OUT_OF_TURN])), encoding="utf-8")
    refused = r"train.jsonl, line 2001, is not a row .* out of turn: message 2 is from 'user', .*: correct it"
    with pytest.raises(NanochatError, match=refused):
        chat_sft.main([*FLAGS, "--tasks=SmolTalk", f"--task-data={tmp_path}"])


@pytest.mark.parametrize("row", [OUT_OF_TURN, {"question": "q"}])
def test_a_row_of_the_hub_that_is_no_conversation_is_named(monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]) -> None:
    monkeypatch.setattr(smoltalk, "load_rows", lambda *_: [row])
    with pytest.raises(NanochatError, match=r"SmolTalk, row 0 from 0, is no conversation \(.*: correct it in a local copy"):
        smoltalk.SmolTalk("train")[0]

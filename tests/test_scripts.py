"""The commands as their users meet them: bad input is one clear sentence and a non-zero exit, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import pace
from nanochat.common import NanochatError, describe_error
from nanochat.dataloader import TokenLoader
from nanochat.dataset import get_source
from nanochat.runs import get_stage_dir, list_steps
from scripts import base_eval, base_train, chat_cli, chat_eval, chat_sft, chat_web, tok_eval, tok_train
from tests.conftest import TINY_TRAINING, TINY_TUNING
from tests.helpers import OUT_OF_MEMORY, write_corpus

SCRIPTS = [
    "tok_train", "tok_eval", "base_train", "base_eval", "chat_sft", "chat_rl", "chat_eval", "chat_cli", "chat_web",
    "compare", "data_prep", "export_hf", "infer_bench",
]  # fmt: skip


def _run(script: str, *flags: str, **kwargs: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", script, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_without_work_and_explain_themselves(
    script: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the width of a terminal, and without the placeholders that argparse makes of flags, such as API_KEY."""
    monkeypatch.setenv("COLUMNS", "80")
    module = __import__(f"scripts.{script}", fromlist=["main"])
    monkeypatch.setattr("nanochat.settings._program", lambda: f"python -m scripts.{script}")
    with pytest.raises(SystemExit) as leaving:
        module.main(["--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python -m scripts.{script} ")
    assert [line for line in out.splitlines() if len(line) > 80] == []
    flags = re.findall(r"^  .*--([a-z-]+) (\S+)", out, re.MULTILINE)
    assert [(flag, what) for flag, what in flags if what == flag.upper().replace("-", "_")] == []


def test_text_that_the_output_cannot_hold_does_not_end_a_command() -> None:
    """As Windows' code pages cannot, into which Python writes where the output is a pipe or a file."""
    code = "from nanochat.common import run_command\nrun_command(lambda argv: print('caf\\u00e9 \\u7a7a') or 0)"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60, check=True)
    assert result.stdout.decode("cp1252").strip() == "café ?"


def test_ctrl_c_during_the_imports_shows_no_trace() -> None:
    result = subprocess.run([sys.executable, "-c", "import scripts; raise KeyboardInterrupt"], capture_output=True, timeout=60)
    assert (result.stderr.strip(), result.returncode) == (b"interrupted", 0xC000013A if os.name == "nt" else -signal.SIGINT)
    result = subprocess.run([sys.executable, "-c", "import scripts; 1 / 0"], capture_output=True, timeout=60)
    assert b"ZeroDivisionError" in result.stderr and b"Traceback" in result.stderr


# ----------------------------------------------------------------------------- what is absent or wrong


def test_an_error_is_one_sentence_and_an_exit_code(base_dir: Path) -> None:
    result = _run("scripts.chat_cli", "--model-tag=absent", "-p", "hello")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "absent" in result.stderr
    traced = _run("scripts.chat_cli", "--model-tag=absent", "-p", "hello", "--debug")
    assert "Traceback" in traced.stderr


def test_a_mistake_of_ours_is_one_sentence_and_keeps_its_trace(base_dir: Path, tmp_path: Path) -> None:
    code = "import sys\nfrom nanochat.common import run_command\ndef main(argv): return 1 // 0\nsys.exit(run_command(main))"
    result = subprocess.run([sys.executable, "-c", code, "--api-key=x"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 70
    assert result.stderr.startswith("error: unexpected ZeroDivisionError") and result.stderr.count("\n") == 1
    (trace,) = (path.read_text(encoding="utf-8") for path in (base_dir / "logs").iterdir())
    assert "Traceback" in trace and "--api-key" not in trace
    result = subprocess.run([sys.executable, "-c", code, "--debug"], capture_output=True, text=True, timeout=60)
    assert "Traceback" in result.stderr
    (tmp_path / "file").write_text("", encoding="utf-8")
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "file")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 70
    assert "Traceback" in result.stderr  # where it cannot be kept it is shown


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(13, "Permission denied", "/x"), "no permission for /x: choose"),
        (OSError(30, "Read-only file system", "/x"), "/x is on a read-only file system: choose another folder"),
        (FileExistsError(17, "File exists", "/x"), "/x is a file"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "/x: No such file or directory: check the path"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb.sdk"), "wandb.sdk is not installed"),
    ],
)
def test_what_may_happen_to_anyone_has_a_way_out(error: Exception, sentence: str) -> None:
    assert sentence in describe_error(error)
    assert "\n" not in describe_error(error)


@pytest.mark.parametrize("error", [MemoryError(), *OUT_OF_MEMORY])
def test_the_way_out_of_too_little_memory_is_open_to_every_command(error: Exception) -> None:
    """Some have --device-batch-size, some --batch-size, some --max-rows, and chat_cli has none."""
    sentence = describe_error(error)
    assert sentence and "fewer rows at a time" in sentence and "--" not in sentence


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), ModuleNotFoundError("x", name="nanochat.x")])
def test_what_nobody_foresaw_is_told_apart(error: Exception) -> None:
    assert describe_error(error) is None


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions bind neither root nor Windows")
def test_a_base_directory_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    result = _run("scripts.tok_train", "--data=builtin", env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: no permission for {tmp_path / 'base'}: choose another folder")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (base_train.main, ["--data=/nowhere/at/all"], "/nowhere/at/all"),
        (base_train.main, ["--data="], "--data is empty, as from a variable that is not set"),
        (tok_train.main, ["--data="], "--data is empty"),
        (base_eval.main, ["--model-tag=tiny", "--eval=bpb", "--data="], "--data is empty"),
        (chat_sft.main, ["--model-tag=tiny", "--resume=auto", "--tasks="], "--tasks names no task"),
        (base_train.main, ["--tokenizer=unknown"], "tok_train"),
        (base_train.main, ["--depth=0"], "depth 0"),
        (base_train.main, ["--depth=2", "--window-pattern=SX"], "SX"),
        (base_train.main, ["--depth=2", "--head-dim=12"], "head_dim 12"),
        (base_train.main, ["--resume=soon"], "soon"),
        (base_train.main, ["--device-type=tpu"], "tpu"),
        (base_eval.main, ["--eval=magic"], "magic"),
        (base_eval.main, ["--model-tag=absent"], "absent"),
        (chat_sft.main, ["--model-tag=tiny", "--resume=auto", "--tasks=Nonsense"], "Nonsense"),
        (chat_sft.main, ["--model-tag=tiny", "--resume=auto", "--tasks=CustomJSON:/nowhere.jsonl"], "nowhere"),
        (chat_sft.main, ["--model-tag=tiny", "--resume=auto", "--model-step=77"], "77"),
        (chat_eval.main, ["--model-tag=tiny", "-a", "Nonsense"], "Nonsense"),
        (chat_eval.main, ["--model-tag=tiny", "-a", "GSM8K", "--task-data=/nowhere"], "nowhere"),
        (chat_eval.main, ["--model-tag=tiny", "-b", "0"], "--batch-size 0 is too small"),
        (chat_eval.main, ["--model-tag=tiny", "-a", "ARC-Easy", "-t", "-1"], "temperature cannot be -1.0: choose 0 or more"),
        (chat_eval.main, ["--model-tag=tiny", "-n", "0"], "--num-samples 0 is too small"),
        (chat_eval.main, ["--model-tag=tiny", "-m", "0"], "--max-new-tokens 0 is too small"),
        (chat_eval.main, ["--model-tag=tiny", "-x", "0"], "--max-problems 0 asks for nothing: choose 1 or more"),
        (chat_cli.main, ["--model-tag=tiny", "-p", "word " * 500], "does not fit"),
        (chat_cli.main, ["--source=rl"], "rl"),
        (chat_cli.main, ["--model-tag=tiny", "-m", "0"], "--max-tokens 0 is too small"),
        (chat_cli.main, ["--model-tag=tiny", "-p", ""], "--prompt is empty: give the text to answer, or leave --prompt out"),
        (chat_cli.main, ["--model-tag=tiny", "--source=base", "-p", " \n"], "--prompt is empty"),
        (chat_cli.main, ["--model-tag=absent", "-t", "-1"], "temperature cannot be -1.0: choose 0 or more"),
        (chat_web.main, ["--model-tag=tiny", "-m", "0"], "--max-tokens 0 is too small"),
        (tok_train.main, ["--data=builtin", "--tokenizer="], "--tokenizer is empty"),
        (tok_train.main, ["--data=builtin", "--vocab-size=100"], "100"),
        (tok_train.main, ["--data=builtin", f"--tokenizer={__file__}"], "test_scripts.py is no folder: give another name"),
        (base_eval.main, ["--eval=core, bpb, x"], "--eval x is not measured here"),
        (tok_train.main, ["--data=builtin", "--max-chars=-1"], "--max-chars -1 is too small"),
        (chat_web.main, ["--model-tag=tiny", "--api-key="], "the API key is empty"),
        (chat_web.main, ["--model-tag=tiny", "-t=-1"], "temperature cannot be -1.0"),
        (chat_web.main, ["--model-tag=tiny", "--port=0"], "--port 0 is out of range: choose 1 to 65535"),
        (
            chat_web.main,
            ["--model-tag=tiny", "--request-timeout=0"],
            "--request-timeout 0 is out of range: choose 1 to 86400",
        ),
        (chat_web.main, ["--model-tag=tiny", "--kv-tokens=-5"], "--kv-tokens -5 is out of range: choose 0 or more"),
        (chat_web.main, ["--model-tag=tiny", "--allow-host=my.example:80"], "--allow-host my.example:80 is no name"),
        (tok_eval.main, ["--tokenizer=unknown"], "tok_train"),
    ],
)
def test_bad_input_names_the_value_and_the_way_out(main, flags: list[str], message: str, tiny_run: Path) -> None:
    before = sorted(path for path in tiny_run.rglob("*"))
    with pytest.raises(NanochatError) as error:
        main(flags if main is not base_train.main else [*TINY_TRAINING, "--data=builtin", *flags])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path for path in tiny_run.rglob("*")) == before


def test_empty_text_is_an_error(tmp_path: Path, tokenizer, base_dir: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("\n \n", encoding="utf-8")
    for folder in ("empty", "blank"):
        with pytest.raises(NanochatError, match=folder):
            tok_train.main(["--data", str(tmp_path / folder)])
        tokenizer.save(base_dir / "tokenizers" / "default")
        with pytest.raises(NanochatError, match=folder):
            base_train.main([*TINY_TRAINING, "--data", str(tmp_path / folder)])


def test_a_full_disk_stops_with_one_sentence_and_keeps_the_checkpoints(corpus: Path, tokenizer, tmp_path: Path) -> None:
    """On a real, small file system, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        tokenizer.save(disk / "tokenizers" / "default")
        flags = [*TINY_TRAINING, "--data", str(corpus), "--model-tag=full", "--num-iterations=50", "--save-every=1"]
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(disk)}
        result = _run("scripts.base_train", *flags, env=environment)
        assert result.returncode == 1
        assert "the disk is full" in result.stderr
        assert "Traceback" not in result.stderr
        steps = list_steps(disk / "runs" / "full" / "base")
        assert steps
        assert steps[-1] < 50
        (disk / "runs" / "full" / "base" / "metrics.jsonl").unlink()  # room for the evaluation's result
        assert (
            _run("scripts.base_eval", "--model-tag=full", "--split-tokens=512", "--eval=bpb", env=environment).returncode == 0
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ----------------------------------------------------------------------------- what they do


def test_the_guides_first_command_works_alone(base_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """Nothing downloaded, no tokenizer trained: the builtin text and a tokenizer made from it."""
    flags = ["--depth=1", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64", "--total-batch-size=128"]
    flags += ["--num-iterations=2", "--core-metric-every=-1", "--sample-every=-1", "--eval-tokens=64", "--no-compile"]
    assert base_train.main([*flags, "--device-type=cpu"]) == 0
    out = capsys.readouterr().out
    assert "climbmix is not downloaded" in out
    assert "training one" in out
    assert list_steps(base_dir / "runs" / "d1" / "base") == [2]


def test_pretraining_ends_with_how_much_of_the_text_it_used(
    corpus: Path, tokenizer, tokenizer_in_place, capsys: pytest.CaptureFixture
) -> None:
    """All that a loader of its own gives in as many rows, over both sessions of a run that was resumed."""
    flags = [*TINY_TRAINING, "--data", str(corpus), "--model-tag=told", "--save-every=3"]
    said = []
    for more in ([], ["--resume=3"]):
        assert base_train.main([*flags, *more]) == 0
        line = r"^([\d,]+) tokens of text read, no document cut short; rows (\d+)% full$"
        said += re.findall(line, capsys.readouterr().out, re.MULTILINE)
    settings = json.loads((get_stage_dir("told", "base") / "settings.json").read_text(encoding="utf-8"))
    rows, length = settings["device_batch_size"], settings["max_seq_len"]
    with TokenLoader(get_source(str(corpus)), tokenizer, rows, length) as loader:
        for _ in range(settings["num_iterations"] * settings["total_batch_size"] // (rows * length)):
            next(loader)
        used = loader.stats()
    assert said == [(f"{used['tokens']:,}", f"{100 * used['filled']:.0f}")] * 2


def test_text_without_validation_is_no_text_to_begin_with(tmp_path: Path, tokenizer, base_dir: Path) -> None:
    """Not after hours of training, when it is first validated on."""
    corpus = write_corpus(tmp_path / "corpus", 20)
    (corpus / "val.jsonl").write_text('{"text": " "}', encoding="utf-8")
    tokenizer.save(base_dir / "tokenizers" / "default")
    with pytest.raises(NanochatError, match="corpus has no val document: give more text"):
        base_train.main([*TINY_TRAINING, "--data", str(corpus), "--save-every=1"])
    assert not list_steps(base_dir / "runs" / "d2" / "base")


def test_a_run_of_so_many_minutes_goes_on_as_it_was_planned(
    tiny_run: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(pace, "measure_matmul_rate", lambda *_: 1e11)  # a faster one would find the text too short
    flags = [*TINY_TRAINING, "--data", str(corpus), "--model-tag=timed", "--resume=auto", "--target-minutes=0.003"]
    flags += ["--num-iterations=-1", "--expand-at=-1", "--save-every=1"]
    assert base_train.main(flags) == 0
    stage_dir = tiny_run.parent / "timed" / "base"
    settings = json.loads((stage_dir / "settings.json").read_text(encoding="utf-8"))
    planned = settings["num_iterations"]
    assert settings["expand_at"] == 0.85
    assert list_steps(stage_dir)[-1] == planned
    shutil.rmtree(stage_dir / f"step_{planned:06d}")
    assert base_train.main(flags) == 0
    assert list_steps(stage_dir)[-1] == planned
    capsys.readouterr()
    assert base_train.main(flags) == 0
    assert "is complete" in capsys.readouterr().out
    sft = ["--model-tag=timed", "--tasks=Arithmetic:60", "--target-minutes=0.001", "--no-compile", "--resume=auto"]
    for _ in range(2):
        assert chat_sft.main([*sft, "--eval-tokens=128", "--device-type=cpu"]) == 0
    assert "is complete" in capsys.readouterr().out


def test_tok_train_then_tok_eval(corpus: Path, base_dir: Path, capsys: pytest.CaptureFixture) -> None:
    train = ["--data", str(corpus), "--vocab-size=400"]
    assert tok_train.main(train) == 0
    assert tok_train.main(train) == 0
    assert "there already" in capsys.readouterr().out
    assert tok_eval.main(["--data", str(corpus)]) == 0
    table = capsys.readouterr().out
    for text in ("news", "code", "maths", "other scripts", "(train)", "(val)"):
        assert text in table


def test_tok_eval_of_text_with_odd_splits_and_characters(
    tmp_path: Path, tokenizer_in_place: None, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "odd").mkdir()
    pair, half = "\\ud83d\\ude42", "\\ud83d"
    for name, text in (("train", f"the cat {half} sees {pair} a house"), ("val", " ")):
        (tmp_path / "odd" / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}', encoding="utf-8")
    assert tok_eval.main(["--data", str(tmp_path / "odd")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'odd'} (val) is empty: left out" in out
    assert "(train) 29 " in " ".join(out.split())  # bytes: three for a half, as for what it is read as


def test_base_eval_measures_and_shows(tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    assert base_eval.main(["--model-tag=tiny", "--split-tokens=1024", "--device-type=cpu"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    results = json.loads((tiny_run / "base" / "eval.json").read_text(encoding="utf-8"))
    assert results["step"] == 6
    assert 0 < results["bpb"]["val"] < 10
    assert len(results["samples"]) == 4


def test_bits_per_byte_of_other_text_do_not_replace_those_of_the_runs_own(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "other text").mkdir()
    for name in ("train", "val"):
        (tmp_path / "other text" / f"{name}.txt").write_text("A cat sees a house. " * 40, encoding="utf-8")
    flags = ["--model-tag=tiny", "--split-tokens=256", "--eval=bpb", "--device-type=cpu"]
    assert base_eval.main(flags) == 0
    own = json.loads((tiny_run / "base" / "eval.json").read_text(encoding="utf-8"))["bpb"]
    assert base_eval.main([*flags, "--data", str(tmp_path / "other text") + "/"]) == 0
    both = json.loads((tiny_run / "base" / "eval.json").read_text(encoding="utf-8"))["bpb"]
    assert both.keys() - own.keys() == {"train of other text", "val of other text"}
    assert own.items() <= both.items()


def test_base_eval_knows_how_many_batches_a_short_text_has(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for name, times in (("train", 500), ("val", 1)):
        (text / f"{name}.txt").write_text("A cat sees a house. " * times, encoding="utf-8")
    assert base_eval.main(["--model-tag=tiny", "--eval=bpb", "--device-batch-size=8", "--data", str(text)]) == 0
    out = capsys.readouterr().out
    first, last = re.findall(r"bits per byte of train: batch (\d+)/(\d+)\b", out)
    assert first[0] == "1" and first[1] == last[0] == last[1] and 1 < int(last[0]) < 10
    assert re.findall(r"bits per byte of val: batch (\d+)/(\d+)\b", out) == [("1", "1")]


@pytest.mark.parametrize("given", [0, 3, 127, 128, 129, 500])
@pytest.mark.parametrize("most", [1, 128, 300])
def test_looking_ahead_drops_no_batch(given: int, most: int) -> None:
    batches, total = base_eval.look_ahead(iter(range(given)), most)
    assert list(batches) == list(range(min(given, most)))
    assert total == (min(given, most) if given < 128 else most)


def test_chat_eval_counts_and_gives_intervals(tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--model-tag=tiny", "-a", "Arithmetic,Identity", "-x", "5", "-m", "8", "--device-type=cpu"]
    drawn = ["-n", "2", "--temperature=1"]
    assert chat_eval.main(flags) == chat_eval.main([*flags, *drawn]) == chat_eval.main([*flags, *drawn, "-k", "5"]) == 0
    tasks = json.loads((tiny_run / "sft" / "eval.json").read_text(encoding="utf-8"))["tasks"]
    kinds = ("", ", 2 drawn at 1", ", 2 drawn at 1 from the 5 likeliest")  # results side by side
    assert set(tasks) == {f"{name}{kind}, at most 8 tokens" for name in ("Arithmetic", "Identity") for kind in kinds}
    assert all(task["n"] == 5 and 0 <= task["low"] <= task["accuracy"] <= task["high"] <= 1 for task in tasks.values())


def test_a_stage_ends_with_a_command_that_works_next(
    tiny_run: Path, corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "quit")

    def next_command(script, *flags: str) -> list[str]:
        assert script.main([*flags, "--device-type=cpu"]) == 0
        return re.findall(r"^next: python -m scripts\.(.*)$", capsys.readouterr().out, re.MULTILINE)

    on = ["--model-tag=tiny", "--resume=auto"]
    assert next_command(base_train, *TINY_TRAINING, "--data", str(corpus), *on) == ["chat_sft --model-tag=tiny"]
    assert next_command(chat_sft, *TINY_TUNING, *on) == ["chat_cli --model-tag=tiny"]
    assert next_command(chat_cli, "--model-tag=tiny") == []
    monkeypatch.setenv("NANOCHAT_STAGE", "2/6")  # a recipe knows what comes next
    assert next_command(chat_sft, *TINY_TUNING, *on) == []


def test_chat_cli_answers_once_and_goes_on(
    tiny_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model-tag=tiny", "--max-tokens=8", "--device-type=cpu"]
    assert chat_cli.main([*flags, "-p", "What is 2 + 2?"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert chat_cli.main([*flags, "--source=base", "-p", "the cat"]) == 0
    typed = iter(["hello", "word " * 500, "clear", "again", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert chat_cli.main(flags) == 0
    out = capsys.readouterr().out
    assert re.search("^a message of .* does not fit", out, re.MULTILINE)  # which is not the model's word
    assert "A new conversation." in out  # it went on
    assert out.count("nanochat: ") == 2


def test_switches_reach_the_model_and_the_optimizer(tiny_run: Path, corpus: Path) -> None:
    flags = [*TINY_TRAINING, "--data", str(corpus), "--model-tag=switched", "--num-iterations=1"]
    for pair, sentence in (
        ("n_layers=1", "did you mean n_layer"), ("n_layer=one", "must be like"), ("x=1", "no switch 'x'"),
        ("muon_blocks=2", "must be like True"), ("muon_beta2=2", "muon_beta2 cannot be 2"),
        ("adam_betas=(0.9,1)", r"adam_betas cannot be \(0.9, 1\): choose 0 or more, and less than 1"),
        ("adam_betas=(0.9,)", "give two numbers"), ("muon_momentum=-1", "muon_momentum cannot be -1"),
        ("adam_eps=-1", "adam_eps cannot be -1"),
    ):  # fmt: skip
        with pytest.raises(NanochatError, match=sentence):
            base_train.main([*flags, "--set", pair])
    assert not (tiny_run.parent / "switched").exists()
    assert base_train.main([*flags, "--set", "n_layer=1", "muon_beta2=0.5", "value_embeddings=false"]) == 0
    meta = json.loads((tiny_run.parent / "switched" / "base" / "step_000001" / "meta.json").read_text(encoding="utf-8"))
    assert meta["model_config"]["n_layer"] == 1
    assert meta["model_config"]["value_embeddings"] is False

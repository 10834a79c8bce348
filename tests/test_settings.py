"""Settings from a file are what the same flags would have been, and what was saved of a run repeats it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import NanochatError
from nanochat.settings import SettingsParser
from scripts import base_eval, base_train, chat_cli, chat_eval, chat_rl, chat_sft, chat_web, data_prep
from tests.conftest import TINY_TRAINING
from tests.helpers import logged


def parse(main_module, content: str, folder: Path, *flags: str) -> dict:
    """What a command's arguments are with a file of this content."""
    path = folder / "some.toml"
    path.write_text(content, encoding="utf-8")
    return vars(main_module.parse_arguments([f"--config={path}", *flags]))


def test_a_mark_at_the_beginning_of_a_file_is_passed_over(tmp_path: Path) -> None:
    """Some editors on Windows write one."""
    assert parse(base_train, "\ufeffdepth = 4", tmp_path)["depth"] == 4


def test_a_file_means_what_its_flags_mean(tmp_path: Path) -> None:
    content = """
        depth = 4
        target_flops = 1e15
        no_compile = true
        [text]
        data = "builtin"
        [anything.at-all]
        max-seq-len = 512
        set = ["bigrams=8", "n_layer=1"]
        fp8 = false
        resume = 500
    """
    flags = ["--depth=4", "--target-flops=1e15", "--no-compile", "--data=builtin", "--max-seq-len=512", "--resume=500"]
    flags += ["--set", "bigrams=8", "n_layer=1"]
    assert parse(base_train, content, tmp_path) == vars(base_train.parse_arguments(flags))


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    found = parse(base_train, 'depth = 4\nset = ["bigrams=8"]\nno_compile = true', tmp_path, "--depth=6", "--set", "n_layer=1")
    assert (found["depth"], found["switches"], found["compile"]) == (6, ["n_layer=1"], False)
    origins = 'cors_origin = ["http://a", "http://b"]'
    assert parse(chat_web, origins, tmp_path)["cors_origin"] == ["http://a", "http://b"]
    assert parse(chat_web, origins, tmp_path, "--cors-origin=http://c")["cors_origin"] == ["http://c"]


def test_a_file_may_give_what_a_command_requires(tmp_path: Path) -> None:
    assert parse(data_prep, 'input = "raw"\noutput = "prepared"', tmp_path)["input"] == "raw"
    assert parse(chat_eval, 'task_data = "~/x"', tmp_path)["task_data"] == Path("~/x").expanduser()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("depht = 4", ("depht", "did you mean depth?")),
        ("zzz = 4", ("zzz", "--help")),
        ("debug = true", ("debug",)),
        ('depth = "four"', ('"four"', "a whole number", "depth = 12")),
        ("depth = 4.0", ("4.0", "a whole number")),
        ("depth = true", ("true", "a whole number")),
        ("depth = [4]", ("[4]", "a whole number")),
        ('matrix_lr = "high"', ('"high"', "not a number")),
        ("data = false", ("false", "text")),
        ("no_compile = 1", ("no_compile = 1", "true")),
        ('set = "bigrams=8"', ("bigrams=8", "[ ]")),
        ("depth = 4\n[model]\ndepth = 5", ("depth", "more than once")),
        ("max_seq_len = 4\nmax-seq-len = 4", ("max-seq-len", "more than once")),
        ("depth = x", ("not TOML", "line 1")),
        (f"seed = {'9' * 6000}", ("not TOML", "4300 digits")),
        (f"set = {'[' * 5000}", ("not TOML",)),
        (f"matrix_lr = {'9' * 400}", ("matrix_lr = 999", "does not suit --matrix-lr", "too large")),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(content: str, named: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(NanochatError) as error:
        parse(base_train, content, tmp_path)
    assert "some.toml" in str(error.value)
    assert "\n" not in str(error.value)
    assert all(name in str(error.value) for name in named), error.value


def test_a_value_must_be_among_the_choices(tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match=r'source = "sfx".*base, sft, rl'):
        parse(chat_eval, 'source = "sfx"', tmp_path)
    with pytest.raises(NanochatError, match=r"load_optimizer = 2.*0, 1"):
        parse(chat_sft, "load_optimizer = 2", tmp_path)


def test_a_file_must_be_there_and_be_text(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for path, sentence in ((tmp_path / "absent.toml", "absent.toml"), (tmp_path, "cannot be read"),
                           ("~nobody.here/a.toml", "cannot be read"), (tmp_path / "bytes.toml", "not TOML")):  # fmt: skip
        with pytest.raises(NanochatError, match=sentence):
            base_train.parse_arguments(["--config", str(path)])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["--depth=4.5"], "'4.5' is not a whole number, such as 12"), (["--matrix-lr=x"], "'x' is not a number, such as 0.5"),
     (["--data", "a.txt", "b.txt"], "'b.txt' belongs to no flag: quote"), (["--depht=4"], "did you mean --depth?"),
     (["--warmup_ratio=0.1"], "'--warmup_ratio=0.1' here: give --warmup-steps"), (["-d", "x"], "here: for another precision"),
     (["--fp8-recipe", "rowwise"], "here: leave it out")],
)  # fmt: skip
def test_what_is_wrong_with_a_command_line_is_one_sentence(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    """A glob without quotes, above all: its second file is there, but has no flag."""
    with pytest.raises(SystemExit):
        base_train.parse_arguments(flags)
    message = capsys.readouterr().err
    assert sentence in message and message.count("\n") == 1


def test_a_horizon_on_the_command_line_replaces_that_of_the_file(tmp_path: Path) -> None:
    """Though a stage's file always has num_iterations, which would come first."""
    file = "num_iterations = 5\ntarget_flops = 1e9\ndepth = 2"
    for flags, expected in (
        ([], (5, -1.0, 1e9)), (["--target-minutes=3"], (-1, 3.0, -1.0)), (["--target-flops=2"], (-1, -1.0, 2.0)),
        (["--num-iterations=-1"], (-1, -1.0, 1e9)), (["--num-iterations=0"], (-1, -1.0, 1e9)), (["--depth=3"], (5, -1.0, 1e9)),
    ):  # fmt: skip
        found = parse(base_train, file, tmp_path, *flags)
        assert tuple(found[name] for name in ("num_iterations", "target_minutes", "target_flops")) == expected
    assert parse(chat_rl, "num_iterations = 5", tmp_path, "--num-epochs=2")["num_iterations"] == -1


@pytest.mark.parametrize(("flags", "named"), [(["--detph=4"], "--depth"), (["--depth=x"], "'x'"), (["--config"], "--config")])
def test_a_wrong_flag_is_one_sentence(flags: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        base_train.parse_arguments(flags)
    said = capsys.readouterr().err
    assert leaving.value.code == 2
    assert named in said
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [(base_train, ["--target-minutes=nan"], "--target-minutes nan is not a finite number"),
     (base_train, ["--expand-at", "NaN"], "--expand-at nan is not a finite number"),
     (base_train, ["--target-flops=inf"], "--target-flops inf is not a finite number"),
     (base_train, ["--expand-at=-0.5"], "--expand-at -0.5 is out of range: choose 0 to 1"),
     (base_train, ["--warmup-steps=-5"], "--warmup-steps -5 is out of range: choose 0 or more"),
     (chat_sft, ["--warmup-steps=-5"], "--warmup-steps -5 is out of range: choose 0 or more"),
     (chat_rl, ["--temperature=nan"], "--temperature nan is not a finite number"),
     (base_train, ["--core-metric-max-per-task=0"], "--core-metric-max-per-task 0 asks for nothing: .* leave it out"),
     (base_eval, ["--max-per-task=0"], "--max-per-task 0 asks for nothing: .* leave it out"),
     (base_eval, ["--split-tokens=0"], "--split-tokens 0 asks for nothing: .* leave it out"),
     (chat_eval, ["--max-problems=0"], "--max-problems 0 asks for nothing: .* leave it out")],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(module: Any, flags: list[str], words: str) -> None:
    with pytest.raises(NanochatError, match=words):
        module.parse_arguments(flags)


def test_no_file_gives_nan(tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match="--target-minutes nan is not a finite number"):
        parse(base_train, "target_minutes = nan", tmp_path)


def test_flags_may_be_written_with_underscores(capsys: pytest.CaptureFixture) -> None:
    """As in the public recipes; their values stay as they are, and what is no flag is named as it was written."""
    flags = ["--max_seq_len=1024", "--device_batch_size", "4", "--no_compile", "--model_tag=a_b=--keep_last", "--set", "a_b=1"]
    found = base_train.parse_arguments(flags)
    assert (found.max_seq_len, found.device_batch_size, found.compile) == (1024, 4, False)
    assert (found.model_tag, found.switches) == ("a_b=--keep_last", ["a_b=1"])
    parser = SettingsParser("A test.")
    parser.add_argument("--some-flag")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--some_flag=x", "--", "--some_flag"]).rest == ["--some_flag"]
    assert parser.parse_args(["--", "--some_flag=x"]).some_flag == "x"  # from a line of torchrun
    with pytest.raises(SystemExit):
        base_train.parse_arguments(["--max_seq_lenn=4"])
    assert "'--max_seq_lenn=4' here; did you mean --max-seq-len?" in capsys.readouterr().err


@pytest.mark.parametrize("module", [base_train, chat_sft, chat_rl])
def test_what_is_written_is_what_is_read(module, tmp_path: Path) -> None:
    """For each kind of value: numbers, switches, lists, paths, and text that TOML must quote."""
    flags = ["--depth=3", "--set", 'x="y"', "a\\b"] if module is base_train else ["--task-data", str(tmp_path), "--seed=7"]
    args = module.parse_arguments([*flags, "--model-tag=a [b]", "--no-compile", "--matrix-lr=1e-5"])
    assert parse(module, args.to_toml(vars(args)), tmp_path) == vars(args)


@pytest.mark.parametrize("module", [base_train, base_eval, chat_cli, chat_eval, chat_rl, chat_sft, chat_web, data_prep])
def test_help_has_groups_defaults_and_examples_that_parse(
    module, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.settings._program", lambda: "command")
    with pytest.raises(SystemExit):
        module.parse_arguments(["--help"])
    text, _, examples = capsys.readouterr().out.partition("examples:\n")
    for part in ("usage: command ", "every command:", "--debug", "--config FILE", "default: "):
        assert part in text
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE)[-1] == "every command"  # the command's own flags come first
    for line in examples.splitlines():
        command, *flags = shlex.split(line)
        if command == "command" and "--config" not in flags:
            module.parse_arguments(flags)
    assert "command" in examples


def test_a_run_can_be_repeated_from_what_it_saved(tiny_run: Path, corpus: Path) -> None:
    """Base and SFT: the same settings, and the same losses."""
    for stage, module in (("base", base_train), ("sft", chat_sft)):
        config = tiny_run / stage / "config.toml"
        assert module.main(["--config", str(config), "--model-tag=again"]) == 0
        folders = (tiny_run / stage, tiny_run.parent / "again" / stage)
        first, second = (json.loads((folder / "settings.json").read_text(encoding="utf-8")) for folder in folders)
        assert {**first, "tag": "again", "model_tag": "again"} == second
        losses = [logged(folder) for folder in folders]
        assert losses[0] and losses[0] == losses[1]
        texts = [(folder / "config.toml").read_text(encoding="utf-8") for folder in folders]
        assert texts[0].replace('"tiny"', '"again"') == texts[1]
        assert first["device_batch_size"] > 0 and "device_batch_size = -1" in texts[0]  # other ranks choose their own


@pytest.mark.usefixtures("planned_pace")
def test_a_run_by_time_can_be_repeated_and_gone_on_with_from_what_it_saved(base_dir: Path, corpus: Path) -> None:
    """Though its file tells steps: rates and weight decay are those of the tokens that the time allowed."""
    flags = ["--num-iterations=-1", "--target-minutes=0.02", "--weight-decay=0.2", "--data", str(corpus)]
    assert base_train.main([*TINY_TRAINING, *flags]) == 0
    config = str(base_dir / "runs" / "d2" / "base" / "config.toml")
    assert base_train.main(["--config", config, "--resume=auto"]) == 0
    assert base_train.main(["--config", config, "--model-tag=again"]) == 0
    losses = [logged(base_dir / "runs" / tag / "base") for tag in ("d2", "again")]
    assert len(losses[0]) > 1 and losses[0] == losses[1]


def test_resuming_is_no_setting_of_a_run(tiny_run: Path) -> None:
    """So that the file of a resumed run can start another one, and --resume auto with it goes on with this one."""
    config = (tiny_run / "base" / "config.toml").read_text(encoding="utf-8")
    assert "resume" not in config
    assert 'model_tag = "tiny"' in config
    with pytest.raises(NanochatError, match="--resume auto"):
        base_train.main(["--config", str(tiny_run / "base" / "config.toml")])
    assert base_train.main(["--config", str(tiny_run / "base" / "config.toml"), "--resume=auto"]) == 0


def test_two_long_names_are_one_setting() -> None:
    parser = SettingsParser("A test.")
    parser.add_argument("--new-name", "--old-name", dest="name")
    assert 'new_name = "x"' in parser.parse_args(["--old-name=x"]).to_toml({"name": "x"})


def test_help_says_each_default_once_and_only_if_it_means_something() -> None:
    parser = SettingsParser("A test.")
    shown = {"--plain": (5, "text", "text (default: 5)"), "--large": (10**6, "text", "text (default: 1,000,000)"),
             "--bracket": (5, "text (0: all)", "text (0: all; default: 5)"), "--own": (5, "default: all", "default: all"),
             "--none": (None, "text", "text"), "--open": (-1, "text", "text"), "--off": (False, "text", "text")}  # fmt: skip
    for flag, (default, text, _) in shown.items():
        parser.add_argument(flag, default=default, help=text)
    lines = [line.split(maxsplit=2) for line in parser.format_help().splitlines()]
    assert {words[0]: words[2] for words in lines if words and words[0] in shown} == {
        flag: expected for flag, (_, _, expected) in shown.items()
    }


def test_a_flag_of_many_values_is_a_list_in_a_file(tmp_path: Path) -> None:
    parser = SettingsParser("A test.")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.0])
    (tmp_path / "some.toml").write_text("sizes = [24, 80.5]", encoding="utf-8")
    found = parser.parse_args([f"--config={tmp_path / 'some.toml'}"])
    assert found.sizes == [24.0, 80.5] and found.to_toml(vars(found)).endswith(
        "[options]\nsizes = [\n    24.0,\n    80.5,\n]\n"
    )

"""The documentation says what is so: its programs run, its commands parse, its links lead somewhere, its errors exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanochat import cli, memory
from nanochat.common import NanochatError
from nanochat.engine import Engine
from nanochat.server import create_app
from nanochat.settings import SettingsParser
from tasks import TASKS
from tests.helpers import serve
from tests.nursery import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
SLOW_LESSONS = {"06-pretraining", "07-generation", "08-conversations", "10-reinforcement"}
PROGRAMS = [*sorted((DOCS / "course").glob("[0-9]*.md")), DOCS / "developer-guide.md"]
ELLIPSIS = "…"


def _load_runner():
    specification = importlib.util.spec_from_file_location("course_run", DOCS / "course" / "run.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


runner = _load_runner()


# ----------------------------------------------------------------------------- programs


def _without_numbers(text: str) -> str:
    """What a page's output must have in common with a run on any machine."""
    return " ".join(re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "#", text).split())


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in SLOW_LESSONS)) for p in PROGRAMS]
)
def test_programs_of_pages_run_and_print_what_is_shown(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of their asserts hold; numbers may differ by machine, and an output whose title says so by its words as well."""
    monkeypatch.chdir(tmp_path)
    outputs = iter(runner.run_page(path))
    page = path.read_text(encoding="utf-8")
    blocks = runner.read_blocks(page)
    for i, block in enumerate(blocks):
        if block.language == "python":
            printed, shown = next(outputs), runner.output_block(page, blocks, i)
            if path.parent.name == "course":
                assert bool(printed.strip()) == (shown is not None), f"renew them: docs/course/run.py {path} --write"
            if shown is not None and "differ" not in shown.info:
                assert _without_numbers(printed) == _without_numbers(shown.text)
    for picture in tmp_path.glob("*.png"):
        assert (path.parent / "images" / picture.name).is_file()


def test_the_example_of_the_sandbox_runs() -> None:
    try:
        runner.run_page(DOCS / "measuring.md")
    except NanochatError as error:
        pytest.skip(f"programs cannot be isolated here: {error}")


def test_the_example_of_a_client_runs(engine: Engine) -> None:
    """With the port that a server here has, and with one choice of few tokens."""
    pytest.importorskip("openai", reason="the client comes with the extra dev")
    blocks = runner.read_blocks((DOCS / "serving.md").read_text(encoding="utf-8"))
    code = next(block.text for block in blocks if block.language == "python")
    with serve(create_app([engine], "tiny")) as port:
        names: dict[str, object] = {}
        exec(code.replace(":8000", f":{port}"), names)
    assert names["reply"].choices[0].finish_reason in ("stop", "length")


def test_the_example_of_the_library_runs(tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    blocks = runner.read_blocks((DOCS / "user-guide.md").read_text(encoding="utf-8"))
    (code,) = (block.text for block in blocks if block.language == "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["answer"].finish_reason in ("stop", "length") and names["answer"].text in capsys.readouterr().out
    assert names["model"](names["x"], names["y"]).item() != names["loss"].item() > 0  # the weights have changed


def test_outputs_are_put_behind_their_blocks() -> None:
    page = (
        "a\n\n```python\nprint(1)\n```\n\nb\n\n```python\nx = 2\n```\n\n"
        '```python\nprint(x)\n```\n\n```text title="T"\nold\n```\n\nc\n'
    )
    written = runner.with_outputs(page, ["1\n", "", "2\n"])
    assert '```\n\n```text title="Output"\n1\n```\n\nb' in written
    assert '```text title="T"\n2\n```\n\nc\n' in written
    assert "x = 2\n```\n\n```python" in written and "old" not in written
    assert runner.with_outputs(written, ["1\n", "", "2\n"]) == written


def test_lessons_are_all_listed_and_end_with_exercises() -> None:
    lessons = PROGRAMS[:-1]
    assert [path.name[:2] for path in lessons] == [f"{n:02d}" for n in range(1, 11)]
    index = (DOCS / "course" / "index.md").read_text(encoding="utf-8")
    for path in lessons:
        assert f"({path.name})" in index
        exercises = path.read_text(encoding="utf-8").split("## Exercises\n")[1]
        assert 2 <= len(re.findall(r"^\d\. ", exercises, re.MULTILINE)) <= 3


# ----------------------------------------------------------------------------- commands


def _commands() -> Iterator[tuple[str, str]]:
    """(where, command line) of every line of a bash block, and of every `python -m ...` and the like within a line."""
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for block in runner.read_blocks(page):
            if block.language == "bash":
                for line in block.text.replace("\\\n", " ").splitlines():
                    if line.strip():
                        yield path.name, line
        programs = "python|torchrun|bash|pytest|pip|sbatch|nanochat(?! NAME)"
        inline = re.findall(rf"`((?:[A-Z_]+=\S+ )*(?:{programs}) [^`]+)`", runner.FENCE.sub("", page))
        yield from ((path.name, command) for command in inline)


class _Parsed(Exception):
    pass


def _parse(module_name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command's own parser read its arguments, and nothing more; it exits where they are wrong."""
    if module_name == "nanochat.lm_eval_adapter":
        pytest.importorskip("lm_eval", reason="the harness's parser comes with the extra eval")
    module = importlib.import_module(module_name)
    parser_class = SettingsParser if hasattr(module, "SettingsParser") else argparse.ArgumentParser
    real = parser_class.parse_known_args
    handed_on: list[str] = []

    def parse_known_args(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace=None):
        parsed, rest = real(parser, args, namespace)
        named = [getattr(parsed, name, None) or "" for name in ("task", "task_name", "tasks")]
        if module_name.startswith("scripts.chat"):
            tasks = [part.split("*")[0].split(":")[0] for part in re.split(r"[,|]", ",".join(named)) if part]
            assert all(task in TASKS or task.endswith(".jsonl") for task in tasks)
        handed_on.extend(rest)
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(parser_class, "parse_known_args", parse_known_args)
        patch.setattr(SettingsParser, "_read", lambda parser, path: {})  # a file for --config is the reader's
        patch.setattr(sys, "argv", [module_name, *arguments])
        with pytest.raises(_Parsed):
            module.main(arguments)
    if handed_on:
        assert module_name.startswith("benchmarks."), f"unknown: {handed_on}"
        _parse("scripts.base_train", handed_on, monkeypatch)


def _of_module(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, its arguments) of `python -m module ...`, `torchrun ... -m module ...` or `nanochat NAME ...`."""
    if words[0] in ("python", "torchrun") and "-m" in words:
        at = words.index("-m") + 1
        return words[at], words[at + 1 :]
    if words[0] == "nanochat":
        return cli.COMMANDS[words[1]][0], words[2:]
    return None


OTHER_PROGRAMS = {"cd", "docker", "export", "git", "lm_eval", "source", "torchrun"}  # of which nothing is looked at
COMMANDS = sorted({(where, command) for where, command in _commands()})


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[f"{where}:{command[:60]}" for where, command in COMMANDS])
def test_commands_of_pages_parse(where: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words:
        return
    if (found := _of_module(words)) and found[0].split(".")[0] in ("scripts", "nanochat", "benchmarks", "dev"):
        _parse(*found, monkeypatch)
    elif words[0] in ("python", "bash", "pytest", "sbatch"):
        files = [word for word in words[1:] if word.endswith((".py", ".sh", ".md")) or "/" in word]
        assert all((ROOT / name).exists() for name in files if not name.startswith(".venv"))
    elif words[0] == "pip":
        extras = re.findall(r"(?:nanochat|\.)\[([\w,]+)\]", command)
        declared = re.findall(r'^(\w+) = \["', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        assert all(extra in declared for names in extras for extra in names.split(","))
    else:
        assert words[0] in OTHER_PROGRAMS


def test_enough_commands_were_found() -> None:
    modules = {found[0] for _, command in COMMANDS if (found := _of_module(shlex.split(command, comments=True)))}
    scripts = {f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("[a-z]*.py")}
    assert scripts <= modules, "every script is shown somewhere"


# ----------------------------------------------------------------------------- links and the site


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", runner.FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = runner.FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name) if name else path
        assert other.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in _anchors(other), f"{path.name}: {target}"


class _Loader(yaml.SafeLoader):
    """YAML as MkDocs reads it, Python names left alone."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)


def test_the_site_has_every_page() -> None:
    configuration = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)

    def names(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            entry = list(entry.values())
        if isinstance(entry, list):
            for part in entry:
                yield from names(part)

    listed = list(names(configuration["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(package, reason="the site needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    lesson = (tmp_path / "course" / "02-loss-and-counting" / "index.html").read_text(encoding="utf-8")
    assert "<math" in lesson and "arithmatex" not in lesson  # formulas need no script
    assert "MuonAdamW" in (tmp_path / "api" / "model" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in lesson


def test_the_reference_names_modules_that_exist() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    named = re.findall(r"^::: (\S+)", pages, re.MULTILINE)
    assert len(named) > 20
    assert all(importlib.util.find_spec(name) for name in named)


def test_the_architecture_names_every_module() -> None:
    named = set(re.findall(r"\b\w+\.py\b", (DOCS / "architecture.md").read_text(encoding="utf-8")))
    assert {path.name for path in (ROOT / "nanochat").glob("[a-z]*.py")} <= named


@pytest.mark.slow
def test_the_table_of_what_fits_is_what_the_command_says(capsys: pytest.CaptureFixture) -> None:
    memory.main(["--gb", "24", "80", "141"])
    said = {re.split(r"  +", line)[0]: re.findall(r"d\d+ \([^)]+\)", line) for line in capsys.readouterr().out.splitlines()}
    rows = re.findall(r"^\| (\d devices?.*?) \|(.*)", (DOCS / "cluster.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 4
    for label, cells in rows:
        assert re.findall(r"d\d+ \([^)]+\)", cells) == said[label.replace("`", "")]


# ----------------------------------------------------------------------------- errors


def _said_by_the_code() -> list[str]:
    """All literal texts of the code, an ellipsis for what is filled in, and the lines of its shell scripts."""
    texts = [line for path in (ROOT / "runs").glob("*.sh") for line in path.read_text(encoding="utf-8").splitlines()]
    for folder in ("nanochat", "scripts", "tasks"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                said = [part.value if isinstance(part, ast.Constant) else ELLIPSIS for part in parts]
                texts += ["".join(said)] if all(isinstance(part, str) for part in said) else []
    return texts


def test_messages_explained_are_messages_of_the_code() -> None:
    said = _said_by_the_code()
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("\n## Coming from")[0]
    rows = re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 40
    for message in messages:
        # What is filled in may be more than the page shows, and the page leaves out what is of no use.
        pattern = re.compile(".*".join(re.escape(piece.strip()) for piece in message.split(ELLIPSIS)), re.DOTALL)
        assert any(pattern.search(text) for text in said), message


@pytest.mark.skipif(sys.platform == "win32", reason="the npm in its place is a shell script")
def test_mermaid_becomes_part_of_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("latex2mathml")
    specification = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert specification and specification.loader
    hooks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    npm, script = tmp_path / "npm", tmp_path / "docs" / "mermaid.min.js"
    make = "mkdir -p package/dist && printf drawn > package/dist/mermaid.min.js && tar czf mermaid.tgz package"
    for content, had in (("exit 1", False), (make, True)):
        npm.write_text(f"#!/bin/sh\n{content}\n", encoding="utf-8")
        npm.chmod(0o755)
        monkeypatch.setattr(hooks.shutil, "which", lambda name: str(npm))
        assert hooks.fetch_mermaid(script) is had
        assert script.exists() is had
    assert script.read_text(encoding="utf-8") == "drawn"

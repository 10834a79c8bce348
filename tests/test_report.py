"""The report of a run, and the numbers and the progress that lead to it."""

from __future__ import annotations

import io
import json
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nanochat import report
from nanochat.common import NanochatError
from nanochat.eval_results import merge_eval, read_eval
from nanochat.files import append_json_lines
from nanochat.metrics import read_metrics, series, smooth
from nanochat.plots import Bar, Curve, Panel, draw_bars, draw_panel, draw_shares, save_png, to_svg
from nanochat.progress import Progress, _Console, format_seconds
from nanochat.quantities import describe_line, quantity
from nanochat.report import count_parts, evaluation_table, make_panels, settings_table, write_report
from scripts import chat_rl
from tests.helpers import logged, make_model


class _Page(HTMLParser):
    """The text of a page, and what it would load from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.links, self.ids = "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        loaded = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.links += [value for value in loaded if not value.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_holds_what_the_run_left_behind(tiny_run: Path) -> None:
    assert report.main(["tiny"]) == 0
    markdown = (tiny_run / "report.md").read_text(encoding="utf-8")
    page = _Page((tiny_run / "report.html").read_text(encoding="utf-8"))
    settings = json.loads((tiny_run / "base" / "settings.json").read_text(encoding="utf-8"))
    losses = logged(tiny_run / "base")
    for text in (markdown, page.text):
        assert "Pretraining" in text
        assert "Supervised fine-tuning" in text
        assert f"{settings['num_params']:,}" in text
        assert f"{smooth(losses)[-1]:.4f}" in text
        for part in ("pairs of tokens", "value embeddings", "MLP matrices", "attention itself", "head"):
            assert part in text
    assert page.links == []  # one file that needs no other
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))  # the pictures do not paint each other's parts
    pictures = re.findall(r"\]\((plots/[^)]+)\)", markdown)
    assert {"plots/base_train_loss.png", "plots/sft_train_tok_per_s.png", "plots/model.png"} <= set(pictures)
    assert page.tags.count("svg") == len(pictures) == len(set(pictures))
    for picture in pictures:
        assert (tiny_run / picture).read_bytes().startswith(b"\x89PNG")


def test_the_overview_says_what_each_stage_logged(quick_pictures: None, tiny_run: Path) -> None:
    """Totals, the loss in its last updates, the middle speed, the most memory, bits per byte of the newest evaluation."""
    metrics = tiny_run / "base" / "metrics.jsonl"
    metrics.write_text('{"step": 0, "time_s": 0, "val/bpb": 9.0}\n' + metrics.read_text(encoding="utf-8"), encoding="utf-8")
    markdown, html = write_report(tiny_run)
    lines, page = markdown.read_text(encoding="utf-8").splitlines(), _Page(html.read_text(encoding="utf-8"))
    assert (
        "| stage | steps | time | tokens | loss, smoothed | val bpb | tokens/s, median | MFU, median | most memory |" in lines
    )
    for stage, title in (("base", "Pretraining"), ("sft", "Supervised fine-tuning")):
        rows = read_metrics(tiny_run / stage / "metrics.jsonl")
        train = [row for row in rows if "train/loss" in row]
        last, bpb = train[-1], [row["val/bpb"] for row in rows if "val/bpb" in row][-1]
        loss = smooth([row["train/loss"] for row in train])[-1]
        speed = statistics.median(row["train/tok_per_s"] for row in train)
        mfu = statistics.median(row["train/mfu"] for row in train if "train/mfu" in row)  # not of the first step
        cells = [title, str(last["step"]), format_seconds(last["time_s"]), f"{last['train/tokens']:,}",
                 f"{loss:.4f}", f"{bpb:.4f}", f"{speed:,.0f}", f"{100 * mfu:.1f}%",
                 f"{max(row['train/peak_memory_mb'] for row in train) / 1000:.2f} GB"]  # fmt: skip
        assert f"| {' | '.join(cells)} |" in lines
        assert "".join(cells) in page.text


def test_a_run_that_diverged_has_a_report(quick_pictures: None, tiny_run: Path) -> None:
    """Its evaluations, which are no numbers, are passed over: those before tell, if there were any."""
    metrics = tiny_run / "base" / "metrics.jsonl"
    diverged = json.dumps({"step": 6, "time_s": 9, "val/bpb": None}) + "\n"
    rows = [row for row in metrics.read_text(encoding="utf-8").splitlines(True) if "val/bpb" not in row]
    for before, shown in (("", "-"), (json.dumps({"step": 6, "val/bpb": 2.5}) + "\n", "2.5000")):
        metrics.write_text("".join(rows) + before + diverged, encoding="utf-8")
        markdown, _ = write_report(tiny_run)
        (row,) = [line for line in markdown.read_text(encoding="utf-8").splitlines() if line.startswith("| Pretraining |")]
        assert row.split(" | ")[5] == shown


def test_what_a_model_writes_cannot_break_the_page(tiny_run: Path) -> None:
    nasty = "<script>alert(1)</script> | a \n b"
    results = {"samples": [{"prompt": nasty, "text": nasty}], "bpb": {"val": 1.5}}
    merge_eval(tiny_run / "base", 6, results)
    markdown, html = write_report(tiny_run)
    page = _Page(html.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "alert(1)" in page.text
    assert "1.5000" in markdown.read_text(encoding="utf-8")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_sample_is_one_line_of_the_report(quick_pictures: None, tiny_run: Path, end: str) -> None:
    merge_eval(tiny_run / "base", 6, {"samples": [{"prompt": f"a{end}b", "text": f"c{end}# d"}]})
    markdown, _ = write_report(tiny_run)
    assert b"\n- **a b** c # d\n" in markdown.read_bytes()


def test_evaluations_of_one_step_are_gathered_and_of_another_dropped(tmp_path: Path) -> None:
    merge_eval(tmp_path, 5, {"tasks": {"A": {"accuracy": 0.5}}, "bpb": {"val": 2.0}})
    merge_eval(tmp_path, 5, {"tasks": {"B": {"accuracy": 0.1}}})
    merged = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert set(merged["tasks"]) == {"A", "B"}
    assert merged["bpb"] == {"val": 2.0}
    merge_eval(tmp_path, 6, {"bpb": {"val": 1.0}})
    assert json.loads((tmp_path / "eval.json").read_text(encoding="utf-8")) == {"step": 6, "bpb": {"val": 1.0}}


def test_results_of_an_earlier_step_say_so(quick_pictures: None, tiny_run: Path) -> None:
    """A run goes on after it was measured: its numbers at the top are the newest."""
    core = {"name": "core_partial", "value": 0.1, "low": 0.0, "high": 0.2, "tasks": {}, "missing": [], "max_per_task": 2}
    merge_eval(tiny_run / "base", 6, {"bpb": {"val": 1.2345}, "core": core})
    page = _Page(write_report(tiny_run)[1].read_text(encoding="utf-8")).text
    assert "1.2345" in page and "at step" not in page
    metrics = tiny_run / "base" / "metrics.jsonl"
    memory = max(series(read_metrics(metrics), "train/peak_memory_mb")[1])
    update = {"train/loss": 2.0, "train/peak_memory_mb": 1.0}
    append_json_lines(metrics, [{"step": 7, "time_s": 9.0, **numbers} for numbers in (update, {"val/bpb": 1.1})])
    page = _Page(write_report(tiny_run)[1].read_text(encoding="utf-8")).text
    assert "validation bits per byte1.1000" in re.sub(r"\s*\n\s*", "", page)
    assert "CORE, 0 tasks, at most 2 questions of each task at step 6" in page and "Pretraining: evaluation at step 6" in page
    assert quantity("train/peak_memory_mb").show(memory) in page


def test_evaluations_are_of_the_weights_that_are_there(tiny_run: Path) -> None:
    """Not of an earlier step, nor of others that were once at this one; CORE's mean is of the tasks beside it."""
    stage_dir = tiny_run / "base"
    merge_eval(stage_dir, 6, {"bpb": {"val": 1.0}, "core": {"name": "core_metric", "value": 0.2, "tasks": {"A": {}}}})
    merge_eval(stage_dir, 3, {"bpb": {"val": 2.0}})
    core = {"name": "core_partial", "value": 0.1, "tasks": {"B": {}}}
    merge_eval(stage_dir, 6, {"core": core})
    results = read_eval(stage_dir)
    assert results["bpb"] == {"val": 1.0}
    assert results["core"] == core
    (stage_dir / "eval.json").write_text(json.dumps({**results, "weights": "of another run"}), encoding="utf-8")
    assert read_eval(stage_dir) == {}
    merge_eval(stage_dir, 6, {"bpb": {"train": 1.1}})
    assert read_eval(stage_dir)["bpb"] == {"train": 1.1}


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"step": "6"}'])
def test_a_damaged_evaluation_is_set_aside_for_the_next(tiny_run: Path, damage: str, capsys: pytest.CaptureFixture) -> None:
    stage_dir = tiny_run / "base"
    for step, name in ((6, "eval.json"), (3, "eval_step_000003.json")):
        (stage_dir / name).write_text(damage, encoding="utf-8")
        merge_eval(stage_dir, step, {"bpb": {"val": 1.5}})
        assert json.loads((stage_dir / name).read_text(encoding="utf-8"))["bpb"] == {"val": 1.5}
        assert (stage_dir / f"{name}.damaged").read_text(encoding="utf-8") == damage
        assert f"{name} is damaged: it is now {name}.damaged" in capsys.readouterr().err
    assert read_eval(stage_dir)["step"] == 6


@pytest.mark.parametrize("name", ["eval.json", "settings.json", "step_000006/meta.json"])
@pytest.mark.parametrize("damage", ["", "[]", '{"model_config": {"n_layer": 2.5}}'])
def test_a_damaged_file_is_named(quick_pictures: None, tiny_run: Path, name: str, damage: str) -> None:
    (tiny_run / "base" / name).write_text(damage, encoding="utf-8")
    if damage.startswith("{") and name != "step_000006/meta.json":
        write_report(tiny_run)  # JSON that says nothing of it
        return
    reason = "n_layer 2.5 is not" if damage.startswith("{") else f"{Path(name).name} cannot be read .*: restore or remove it"
    with pytest.raises(NanochatError, match=reason):
        write_report(tiny_run)


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = [1, 2, 3, 4, 3, 4, 5]  # killed after step 4, resumed from step 2
    lines = [json.dumps({"step": step, "train/loss": i}) for i, step in enumerate(steps)]
    path.write_text("\n".join(lines) + '\n{"step": 6, "train/lo', encoding="utf-8")
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["train/loss"] for row in rows] == [0, 1, 4, 5, 6]


def test_what_is_evaluated_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    """The newest of what says the same of the same step; all samples stay, and what the run has not done again goes."""
    path = tmp_path / "metrics.jsonl"

    def sitting(first: int, last: int, note: int) -> list[dict]:
        rows = []
        for step in range(first, last + 1):
            rows += [{"step": step, "train/loss": note}] if step > first else []
            rows += [{"step": step, "val/bpb": note}, {"step": step, "val/core": note}]
            rows += [{"step": step, "sample/prompt": prompt, "sample/text": str(note)} for prompt in ("a", "b", "c")]
        return rows

    def read(*sittings: list[dict]) -> list[dict]:
        path.write_text("".join(json.dumps(row) + "\n" for rows in sittings for row in rows), encoding="utf-8")
        return read_metrics(path)

    whole, updates = sitting(0, 6, 1), sitting(0, 2, 1)[-6:-5]
    assert read(whole) == whole
    # Killed after step 4 and gone on from step 2, whose update alone is not done again.
    expected = [*sitting(0, 1, 1), *updates, *sitting(2, 6, 2)]
    assert read(sitting(0, 4, 1), sitting(2, 6, 2)) == expected
    assert read(sitting(0, 4, 1), sitting(2, 2, 3), sitting(2, 6, 2)) == expected
    assert read(sitting(0, 4, 1), sitting(2, 2, 2)) == expected[: -4 * 6]


def test_a_run_is_named_in_any_way(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Path] = []
    monkeypatch.setattr(report, "write_report", lambda run_dir: reported.append(run_dir.resolve()) or [])
    for flags in ([], ["tiny"], [str(tiny_run)], ["-g", "tiny"], ["generate"], ["generate", "--model-tag=tiny"]):
        assert report.main(flags) == 0
    assert reported == [tiny_run.resolve()] * 6


def test_a_run_without_stages_is_an_error(base_dir: Path) -> None:
    with pytest.raises(NanochatError, match="base_train"):
        report.main([])
    with pytest.raises(NanochatError, match="no run 'nothing' in .*; there is none yet"):
        report.main(["--model-tag=nothing"])
    (base_dir / "runs" / "nothings" / "base").mkdir(parents=True)
    (base_dir / "runs" / "nothings" / "base" / "settings.json").write_text("{}", encoding="utf-8")
    with pytest.raises(NanochatError, match=r"did you mean nothings\?"):
        report.main(["--model-tag=nothing"])


def test_the_parts_of_a_model_are_all_of_it() -> None:
    for config in ({}, {"bigrams": 0, "n_layer": 4, "window_pattern": "L"}, {"n_kv_head": 1, "sequence_len": 128}):
        model = make_model(**config)
        params, flops = (sum(column) for column in zip(*count_parts(model).values(), strict=True))
        assert params == model.num_scaling_params()["total"]
        assert flops == model.estimate_flops()


def test_chat_scores_are_drawn_with_their_intervals(tiny_run: Path) -> None:
    scores = {"accuracy": 0.4, "low": 0.3, "high": 0.5, "n": 80, "baseline": 0.25, "unfinished": 7}
    answer = {"question": "2+2?", "answer": "<|python_start|>2+2<|python_end|> 4", "correct": True}
    merge_eval(tiny_run / "sft", 4, {"tasks": {"Sums": scores}, "examples": {"Sums": [answer] * 9}})
    _, html = write_report(tiny_run)
    text = html.read_text(encoding="utf-8")
    assert "30.0% to 50.0%" in text and "7 answers reached the limit of tokens or the end of the context" in text
    assert 'aria-label="Supervised fine-tuning: right answers by task"' in text
    assert text.count("<code>python_start</code>2+2") == 3  # of nine
    assert text.count("Sums, right") == 3


def test_means_of_other_settings_are_told_apart() -> None:
    mean = {"name": "chatcore_metric", "value": 0.25, "low": 0.2, "high": 0.3, "tasks": 6}
    table = evaluation_table({"chatcore": mean, "chatcore, at most 64 tokens": {**mean, "value": 0.125}})
    assert [row[:2] for row in table] == [
        ["chatcore_metric, over 6 tasks", "0.2500"], ["chatcore_metric, at most 64 tokens, over 6 tasks", "0.1250"],
    ]  # fmt: skip


def test_every_number_of_a_run_has_a_panel() -> None:
    """Measured once or never other than 0, it has one too; MFU is an axis of the speed."""
    more = {"train/lrm": 1.0, "train/mfu": 0.5, "rl/unfinished": 0, "rl/own": 7}
    rows = [{"step": s, "time_s": s, "train/loss": 1.0, "rl/reward": 0.1 * s, **more} for s in range(1, 4)]
    rows += [{"step": s, "val/pass@1": 0.1, "val/pass@8": 0.4} for s in (0, 3)] + [{"step": 3, "val/bpb": 1.0}]
    panels = make_panels(rows)
    assert list(panels) == ["rl/reward", "train/loss", "val/bpb", "val/pass@*", "train/lrm", "rl/unfinished", "rl/own"]
    assert panels["rl/own"].title == "rl/own"
    assert [curve.label for curve in panels["val/pass@*"].curves] == ["pass@1 0.100", "pass@8 0.400"]


def test_no_picture_takes_the_place_of_another(quick_pictures: None, tiny_run: Path) -> None:
    names = ["val/top1", "val/top5", "val/ARC", "val/arc", "val/top-1", "val/top1_2", "val/top 1*"]
    with open(tiny_run / "base" / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step in (5, 6):
            file.write(json.dumps({"step": step, "time_s": 1.0, **dict.fromkeys(names, 0.5)}) + "\n")
    report, _ = write_report(tiny_run)
    shown = re.findall(r"plots/(base_val_(?:top|arc).*)\.png", report.read_text(encoding="utf-8"))
    assert len(shown) == len({name.lower() for name in shown}) == len(names)
    assert not any(name.endswith("_") for name in shown)
    assert all((tiny_run / "plots" / f"{name}.png").exists() for name in shown)


@pytest.mark.parametrize("values", [[-2.0, -1.0], [-1.0, 3.0], [0.0, 0.0], [1.0, 2.0]])
def test_a_panel_from_zero_shows_all_values_and_zero(values: list[float]) -> None:
    axis = draw_panel(Panel("reward", [Curve("reward", [1, 2], values)], from_zero=True)).axes[0]
    low, high = axis.get_ylim()
    assert low < high and low <= min(0, *values) and high >= max(0, *values)


@pytest.mark.parametrize("name", ["_hidden", "cost in $ or \\$", "$x$", "a$b$c", r"$\badcommand$"])
def test_names_are_shown_as_they_are(name: str, tmp_path: Path) -> None:
    """Matplotlib leaves names with _ out of legends, and reads what stands between two $ as a formula."""
    for figure in (
        draw_panel(Panel(name, [Curve(name, [1, 2], [3.0, 4.0]), Curve("two", [1, 2], [4.0, 3.0])], x_label=name)),
        draw_bars(name, [Bar(name, 0.5, 0.4, 0.6)], names=[name, "two"]),
        draw_shares(name, {name: {name: 1.0, "two": 3.0}}),
    ):
        save_png(figure, tmp_path / "picture.png")
        shown = [
            text.text for text in ElementTree.fromstring(to_svg(figure, "picture")).iter("{http://www.w3.org/2000/svg}text")
        ]
        assert shown.count(name) == 3 and "two" in shown  # title, axis and legend


def test_a_picture_takes_the_colors_of_its_page_and_no_name_twice() -> None:
    panel = Panel('a < b & "c"', [Curve("one", [1, 2], [3.0, 4.0], dots=True), Curve("two", [1, 2], [4.0, 3.0])])
    svg = to_svg(draw_panel(panel), panel.title)
    ElementTree.fromstring(svg)  # well-formed
    for variable in ("text", "soft", "line", "c0", "c1"):
        assert f"var(--{variable}, #" in svg
    assert svg == to_svg(draw_panel(panel), panel.title)
    assert not set(re.findall(r'id="([^"]+)"', svg)) & set(re.findall(r'id="([^"]+)"', to_svg(draw_panel(panel), "other")))


# ----------------------------------------------------------------------------- progress


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3675, "1:01:15")])
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_progress_says_stage_numbers_and_time_left(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_STAGE", "2/6")
    with Progress("pretraining", total=10, start=4) as progress:
        for step in range(5, 11):
            progress.update(step, *describe_line({"step": step, "train/tok_per_s": 12345.6, "train/loss": 2.5}))
        progress.print("[bold]not markup[/bold]")
    first, *_, last, said = capsys.readouterr().out.splitlines()
    assert first == "[2/6] pretraining: step 5/10  loss 2.5000  tok/s 12,346"  # the first step says nothing of the others
    assert last.startswith("[2/6] pretraining: step 10/10")
    assert said == "[bold]not markup[/bold]"


def test_progress_time_left_counts_what_the_steps_to_come_take(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 9.0, 20.0])
    monkeypatch.setattr("nanochat.progress.time.perf_counter", lambda: next(clock))
    with Progress("pretraining", total=10, work=lambda steps: steps + 10 * max(0, steps - 8)) as progress:
        progress.update(1)
        progress.update(2)  # eleven seconds for a short step: six more are to come, and two that take eleven times as long
    assert capsys.readouterr().out.splitlines()[-1] == "pretraining: step 2/10  5:08 left"


def test_progress_time_left_forgets_a_slow_beginning(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of compiling in the second of 100 steps: the others take a second each."""
    now = [0.0]
    monkeypatch.setattr("nanochat.progress.time.perf_counter", lambda: now[0])
    with Progress("pretraining", total=100) as progress:
        for step in range(1, 21):
            now[0] += 61.0 if step == 2 else 1.0
            progress.update(step)
    assert capsys.readouterr().out.splitlines()[-1] == "pretraining: step 16/100  1:24 left"


def test_progress_that_begins_with_what_was_done_before_tells_the_time_left(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an evaluation does that goes on: its work will never double."""
    now = [0.0]
    monkeypatch.setattr("nanochat.progress.time.perf_counter", lambda: now[0])
    with Progress("evaluating", total=1300) as progress:
        for step in (900, 1000):
            now[0] += 20.0
            progress.update(step)
    assert capsys.readouterr().out.splitlines()[-1] == "evaluating: step 1000/1300  1:00 left"


def test_progress_is_one_live_line_on_a_terminal() -> None:
    screen = io.StringIO()
    progress = Progress("pretraining", total=3)
    progress._console = _Console(file=screen, force_terminal=True, width=100)
    with progress:
        for step in (1, 2, 3):
            progress.update(step, "loss 1.0000")
    assert "3/3" in screen.getvalue()
    assert "loss 1.0000" in screen.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_a_narrow_terminal_shows_step_and_time_whole(width: int) -> None:
    """What has no room is left out from the end; the total and the time left are never cut."""
    screen = io.StringIO()
    progress = Progress("pretraining", total=21400)
    progress._console = _Console(file=screen, force_terminal=True, width=width, color_system=None)
    with progress:
        progress.update(21400, "loss 2.5000", "tok/s 183,100", "MFU 65%", "bpb 0.7512")
    last = [line for line in screen.getvalue().splitlines() if "pretraining" in line][-1]
    assert "21400/21400" in last and last.rstrip().endswith("0:00") and "\u2026" not in last
    assert ("bpb" in last) == (width == 100) and ("loss" in last) == (width >= 60)


def test_progress_of_what_has_no_known_end_shows_what_was_done() -> None:
    screen = io.StringIO()
    progress = Progress("reading text", total=None, unit="document")
    progress._console = _Console(file=screen, force_terminal=True, width=100)
    with progress:
        assert list(progress.watch("abc")) == ["a", "b", "c"]
    assert "3 documents" in screen.getvalue()


def test_progress_without_an_end_is_quiet_in_a_pipe(capsys: pytest.CaptureFixture) -> None:
    with Progress("reading text", total=None) as progress:
        for step in range(1000):
            progress.update(step)
    assert capsys.readouterr().out == ""


def test_progress_is_silent_but_on_rank_0(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with Progress("pretraining", total=2) as progress:
        progress.update(1)
        progress.print("hello")
    assert capsys.readouterr().out == ""


def test_two_commands_may_store_results_at_once(tmp_path: Path) -> None:
    names = [f"task {i}" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: merge_eval(tmp_path, 5, {"tasks": {name: {"accuracy": 0.5}}}), names))
    assert read_eval(tmp_path)["tasks"].keys() == set(names)


def test_a_report_shows_the_newest_numbers_and_samples(quick_pictures: None, tiny_run: Path) -> None:
    rows = [{"step": s, "time_s": 1.0 * s, "train/loss": 1.0, "train/tok_per_s": 100.0, "train/mfu": 0.25} for s in (1, 2)]
    rows += [{"step": 1, "time_s": 1.0, "val/bpb": 0.5}, {"step": 2, "time_s": 1.0, "val/bpb": 0.7}]
    share = make_panels(rows)["train/tok_per_s"].share
    assert share is not None and share[0] == 400  # tokens/s at 100% MFU
    rows += [{"step": s, "sample/prompt": "a prompt", "sample/text": text} for s, text in ((1, "old words"), (2, "new words"))]
    lines = [json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["step"])]
    (tiny_run / "base" / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    markdown, _ = write_report(tiny_run)
    text = markdown.read_text(encoding="utf-8")
    assert "| Pretraining | 2 | 0:02 | - | 1.0000 | 0.7000 | 100 | 25.0% | - |" in text
    assert "new words" in text and "old words" not in text


@pytest.mark.parametrize(
    "flag",
    ["--objective=grpo", "--examples-per-step=3", "--num-samples=5", "--max-new-tokens=9", "--temperature=0.7", "--top-k=4",
     "--kl-weight=0.1", "--init-lr-frac=0.3"],
)  # fmt: skip
def test_the_settings_of_reinforcement_tell_its_runs_apart(flag: str) -> None:
    """Also how its learning rates are scaled: without that, the table would show other rates than were used."""
    usual, changed = (settings_table(vars(chat_rl.parse_arguments(flags))) for flags in ([], [flag]))
    assert usual != changed


def test_there_is_nothing_to_reset(base_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """The public nanochat's recipes begin with it; here it needs no run, and removes none."""
    assert report.main(["reset"]) == 0
    assert capsys.readouterr().out == "nothing to reset: every run has its own report\n"

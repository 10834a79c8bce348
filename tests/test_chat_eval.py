"""Chat evaluation: tries and intervals, answers that depend on their problem alone, going on after a stop."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import chat_eval as chat_eval_module
from nanochat.chat_eval import CHATCORE_TASKS, Answering, chatcore, evaluate_task
from nanochat.common import NanochatError
from nanochat.engine import Engine
from nanochat.files import append_json_lines, read_json_lines
from nanochat.samples import sample_answers
from nanochat.scores import centered_mean, pass_at_k, wilson_interval
from nanochat.tokenizer import Tokenizer
from scripts import chat_eval
from tasks.common import Conversation, Task, TaskMixture, multiple_choice
from tests.helpers import make_document, make_engine
from tests.many_ranks import Ranks


class LongAnswers(Task):
    """Judged by the length of the answer, so that a model that knows nothing is right now and then."""

    def num_examples(self) -> int:
        return 9

    def get_example(self, index: int) -> Conversation:
        question = make_document(index, 1 + index % 4)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return len(completion) % 2 == 0


class Letters(LongAnswers):
    eval_type = "categorical"
    baseline = 0.25

    def get_example(self, index: int) -> Conversation:
        return multiple_choice(make_document(index, 2), ["one", "two", "three", "four"], index % 4)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    return make_engine(tokenizer, 256, max_rows=8)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_mean_best_of_all_draws(n: int, data: st.DataObject) -> None:
    """For scores of 0 and 1, the share of draws that hold a right one."""
    score, k = data.draw(st.sampled_from([st.integers(0, 1), st.floats(0, 1)])), data.draw(st.integers(1, n))
    scores = data.draw(st.lists(score, min_size=n, max_size=n))
    draws = list(itertools.combinations(scores, k))
    assert pass_at_k(scores, k) == pytest.approx(sum(map(max, draws)) / len(draws))


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda *_: 100, "LongAnswers.evaluate gave 100: a score must be from 0 to 1"),
        (lambda *_: float("nan"), "gave nan for an answer"),
        (lambda *_: {}["x"], r"failed on an answer \(KeyError: 'x'\): mend it"),
    ],
)
def test_a_judge_that_fails_is_named(
    engine: Engine, judge: Callable[..., float], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers take long: those that it could not judge are kept for a better one."""
    how, path = Answering(max_tokens=4), tmp_path / "rows.jsonl"
    whole = evaluate_task(engine, LongAnswers(), 2, 8, how)
    with monkeypatch.context() as patch:
        patch.setattr(LongAnswers, "evaluate", judge)
        for _ in range(2):  # the second time it fails on answers that were kept
            with pytest.raises(NanochatError, match=message):
                evaluate_task(engine, LongAnswers(), 2, 8, how, path)
    monkeypatch.setattr(engine, "run", None)
    assert evaluate_task(engine, LongAnswers(), 2, 8, how, path) == whole


def test_intervals_hold_their_share_and_shrink() -> None:
    for n in (0, 1, 5, 400):
        for right in {0, n // 2, n}:
            low, high = wilson_interval(right / max(1, n), n)
            assert 0 <= low <= right / max(1, n) <= high <= 1 and low < high
    task = {"accuracy": 0.25, "low": 0.2, "high": 0.3, "baseline": 0.25}
    mean, low, high = centered_mean([task])
    assert mean == 0 and high - low == pytest.approx(0.1 / 0.75)
    _, low, high = centered_mean([task] * 4)
    assert high - low == pytest.approx(0.1 / 0.75 / 2)


@pytest.mark.parametrize("task", [LongAnswers(), Letters()])
def test_outcomes_do_not_depend_on_the_batch(engine: Engine, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    answering = Answering(num_samples=2, max_tokens=6, temperature=1.0)
    whole = evaluate_task(engine, task, -1, 8, answering)
    monkeypatch.setattr(chat_eval_module, "CHUNK_BATCHES", 1)
    assert evaluate_task(engine, task, -1, 2, answering) == whole
    assert whole.n == 9 and whole.low <= whole.accuracy <= whole.high and whole.baseline == task.baseline
    few = evaluate_task(engine, task, 3, 8, answering)
    assert few.n == 3 and few.examples == whole.examples[:3]


def test_the_likeliest_letter_is_the_answer(engine: Engine) -> None:
    """By the plain model's logits of the token that follows the prompt, whatever else is in the batch."""
    answers = [example["answer"] for example in evaluate_task(engine, Letters(), 8, 3).examples]
    for index, answer in enumerate(answers):
        problem = Letters()[index]
        prompt = engine.tokenizer.render_for_completion(problem)
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt]))[0, -1]
        assert answer == max(problem["letters"], key=lambda letter: logits[engine.tokenizer.encode(letter)[0]])
    assert len(answers) == 8 and len(set(answers)) > 1


def test_a_stopped_evaluation_goes_on(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a kill in the middle of a line, only what is missing is answered again, and the result is the same."""
    task, answering, path = LongAnswers(), Answering(2, 6, 1.0), tmp_path / "eval" / "rows.jsonl"
    whole = evaluate_task(engine, task, -1, 8, answering, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:20], encoding="utf-8")
    answered: list[int] = []
    generate = chat_eval_module._generate

    def watched(engine: Engine, prompts: list[list[int]], numbers: list[int], answering: Answering) -> list[list[str]]:
        answered.extend(numbers)
        return generate(engine, prompts, numbers, answering)

    monkeypatch.setattr(chat_eval_module, "_generate", watched)
    assert evaluate_task(engine, task, -1, 8, answering, path) == whole
    assert sorted(answered) == sorted(json.loads(line)["index"] for line in lines[5:])
    answered.clear()
    capsys.readouterr()
    assert evaluate_task(engine, task, -1, 8, answering, path) == whole and not answered
    assert capsys.readouterr().out == f"9 of 9 answers are an earlier run's: remove {path} to answer them again\n"


@pytest.mark.parametrize("samples", [1, 4, 99])
def test_it_saves_after_as_many_answers_however_they_are_shared(engine: Engine, tmp_path: Path, samples: int) -> None:
    """Eight batches of them, or one problem's, if it has more."""
    done: list[int] = []
    evaluate_task(engine, LongAnswers(), -1, 1, Answering(samples, 1, 1.0), tmp_path / "rows.jsonl", done.append)
    assert done == {1: [0, 8, 9], 4: [0, 2, 4, 6, 8, 9], 99: list(range(10))}[samples]


def test_answers_to_other_problems_are_not_used(engine: Engine, tmp_path: Path) -> None:
    """Number 2 is asked otherwise, as with another --task-data: it alone is answered again, and both are kept."""

    class Changed(LongAnswers):
        def get_example(self, index: int) -> Conversation:
            return super().get_example(20 if index == 2 else index)

    answering, path = Answering(2, 6, 1.0), tmp_path / "rows.jsonl"
    for task, rows in ((LongAnswers(), 9), (Changed(), 10), (LongAnswers(), 10), (Changed(), 10)):
        assert evaluate_task(engine, task, -1, 8, answering, path) == evaluate_task(engine, task, -1, 8, answering)
        assert len(read_json_lines(path)) == rows


@pytest.mark.parametrize("task", [LongAnswers(), Letters()])
def test_lines_that_are_no_outcomes_are_passed_over(engine: Engine, task: Task, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    whole = evaluate_task(engine, task, 3, path=path)
    rows = read_json_lines(path)
    foreign = [7, [1], {"index": "x"}, {"index": 1}, {**rows[0], "index": -1}, {**rows[0], "index": 1}]
    foreign += [{**rows[1], name: value} for name in ("answers", "truncated", "problem") for value in (None, [], [1], {})]
    append_json_lines(path, foreign)
    assert evaluate_task(engine, task, 3, path=path) == whole


WITH_ITS_OWN_FOLDER = """
import os, sys
os.environ["NANOCHAT_BASE_DIR"] += os.environ["RANK"]
from nanochat.common import run_command
from scripts import chat_eval
sys.exit(run_command(chat_eval.main))
"""


@pytest.mark.slow
def test_outcomes_are_read_by_one_rank(many_ranks: Ranks, tiny_run: Path, base_dir: Path, tmp_path: Path) -> None:
    """Where machines have folders of their own, the others see none, and all go on with those of rank 0."""
    flags = ["--model-tag=tiny", "-a", "Arithmetic", "-m", "4", "--device-type=cpu"]
    for rank, problems in enumerate((4, 2)):
        assert chat_eval.main([*flags, "-x", str(problems)]) == 0
        shutil.move(shutil.copytree(base_dir, tmp_path / "copy"), f"{base_dir}{rank}")
        shutil.rmtree(tiny_run / "sft" / "chat_eval")
    (tmp_path / "ranks.py").write_text(WITH_ITS_OWN_FOLDER, encoding="utf-8")
    assert "4 of 6 answers are an earlier run's" in many_ranks.run(2, str(tmp_path / "ranks.py"), *flags, "-x", "6")


def test_pass_at_k_grows_and_starts_at_the_accuracy(engine: Engine) -> None:
    result = evaluate_task(engine, LongAnswers(), -1, 8, Answering(6, 8, 1.0))
    assert list(result.pass_at) == [1, 2, 4, 6]
    assert result.pass_at[1] == pytest.approx(result.accuracy)
    values = list(result.pass_at.values())
    assert values == sorted(values) and values[0] < values[-1]


def test_long_prompts_lose_their_beginning_and_are_counted(engine: Engine) -> None:
    class Long(LongAnswers):
        def get_example(self, index: int) -> Conversation:
            content = "word " * (500 if index == 2 else 5)
            return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": ""}]}

    result = evaluate_task(engine, Long(), -1, 8, Answering(max_tokens=4))
    assert (result.truncated, result.n) == (1, 9)


@pytest.mark.parametrize(("base", "truncated"), [(LongAnswers, 1), (Letters, 0)])
def test_only_answers_of_more_than_a_letter_take_room(engine: Engine, base: type[LongAnswers], truncated: int) -> None:
    class Long(base):
        def get_example(self, index: int) -> Conversation:
            problem = super().get_example(index)
            beginning = problem["messages"][0]["content"]
            while len(engine.tokenizer.render_for_completion(problem)) < 240:
                beginning = f"word {beginning}"
                problem["messages"][0]["content"] = beginning
            return problem

    assert evaluate_task(engine, Long(), 1, 8, Answering(max_tokens=32)).truncated == truncated


def test_a_task_without_problems_tells_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LongAnswers, "num_examples", lambda task: 0)
    result = evaluate_task(engine, LongAnswers())
    assert (result.n, result.accuracy, result.low, result.high, result.pass_at) == (0, 0, 0, 1, {1: 0})


def test_a_model_that_never_stops_ends_at_its_limit(engine: Engine) -> None:
    engine.scheduler.stop_ids = set(range(engine.model.config.vocab_size))
    assert evaluate_task(engine, LongAnswers(), 2, 8, Answering(max_tokens=7)).unfinished == 0
    engine.scheduler.stop_ids = set()
    result = evaluate_task(engine, LongAnswers(), 2, 8, Answering(2, max_tokens=7, temperature=1.0))
    assert result.unfinished == 2 * 2  # samples of each problem
    assert all(0 < len(engine.tokenizer.encode(e["answer"])) <= 3 * 7 for e in result.examples)
    assert evaluate_task(engine, LongAnswers(), 2, 8, Answering(max_tokens=1000)).unfinished == 2  # by the end of the context
    assert engine.scheduler.is_idle


def test_chatcore_is_the_centred_mean_and_says_over_how_many() -> None:
    result = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "baseline": 0.25}
    assert chatcore({"MMLU": result, "Arithmetic": result}) is None
    partial = chatcore({"MMLU": result, "Arithmetic": result, "ARC-Easy": result})
    assert partial["name"] == "chatcore_partial" and partial["tasks"] == 2 and partial["value"] == pytest.approx(1 / 3)
    assert partial["low"] < partial["value"] < partial["high"]
    assert chatcore(dict.fromkeys(CHATCORE_TASKS, result))["name"] == "chatcore_metric"


def test_the_command_on_real_tasks(tiny_run: Path, real_data: Path, capsys: pytest.CaptureFixture) -> None:
    """Answers of other settings have results and outcomes of their own; of drawn ones there is no mean."""
    flags = ["--model-tag=tiny", "-a", "ARC-Easy|MMLU,GSM8K", "-x", "4", "-m", "4", "--device-type=cpu"]
    flags.append(f"--task-data={real_data / 'tasks'}")
    labels = {"ARC-Easy", "MMLU", "GSM8K, 2 drawn at 1, at most 4 tokens"}
    for more, expected in ((["-n", "2", "-t", "1"], labels), ([], labels | {"GSM8K, at most 4 tokens"})):
        assert chat_eval.main([*flags, *more]) == 0
        out = capsys.readouterr().out
        assert ("chatcore_partial" in out) == ("3 of 6 tasks" in out) == (not more)
        saved = json.loads((tiny_run / "sft" / "eval.json").read_text(encoding="utf-8"))
        assert set(saved["tasks"]) == expected and ("chatcore, at most 4 tokens" in saved) == (not more)
    assert saved["chatcore, at most 4 tokens"]["tasks"] == 3 and "chatcore" not in saved
    (folder,) = (tiny_run / "sft" / "chat_eval").iterdir()
    assert {path.stem for path in folder.iterdir()} == expected


def test_a_quick_look_leaves_what_was_measured_on_more(tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--model-tag=tiny", "-a", "Arithmetic", "-m", "4", "--device-type=cpu"]
    for problems, kept in ((4, 4), (2, 4), (6, 6)):
        assert chat_eval.main([*flags, "-x", str(problems)]) == 0
        saved = json.loads((tiny_run / "sft" / "eval.json").read_text(encoding="utf-8"))
        ((task,), (examples,)) = saved["tasks"].values(), saved["examples"].values()
        assert task["n"] == len(examples) == kept
        assert ("eval.json and the report keep the result over 4 problems" in capsys.readouterr().out) == (problems == 2)


def test_the_stored_mean_is_that_of_the_stored_results(tiny_run: Path, real_data: Path) -> None:
    """Also after some of its tasks were measured on more problems, one by one or with other settings."""
    flags = ["--model-tag=tiny", "--device-type=cpu", f"--task-data={real_data / 'tasks'}"]
    for names, most, *more in (
        ("MMLU|GSM8K", 2), ("MMLU", 9), ("GSM8K|ARC-Easy", 5), ("MMLU|ARC-Easy", 12, "-n", "2", "-t", "1"),
    ):  # fmt: skip
        assert chat_eval.main([*flags, "-a", names, "-x", str(most), "-m", "4", *more]) == 0
        saved = json.loads((tiny_run / "sft" / "eval.json").read_text(encoding="utf-8"))
        greedy = {label.partition(",")[0]: scores for label, scores in saved["tasks"].items() if "drawn" not in label}
        assert saved["chatcore, at most 4 tokens"] == chatcore(greedy)
    assert {name: scores["n"] for name, scores in greedy.items()} == {"MMLU": 12, "GSM8K": 5, "ARC-Easy": 12}


def test_tasks_count_in_whatever_case_they_are_named(tiny_run: Path, real_data: Path) -> None:
    flags = ["--model-tag=tiny", "-a", "gsm8k|arc-easy,GSM8K", "-x", "2", "-m", "4", "--device-type=cpu"]
    assert chat_eval.main([*flags, f"--task-data={real_data / 'tasks'}"]) == 0
    saved = json.loads((tiny_run / "sft" / "eval.json").read_text(encoding="utf-8"))
    assert set(saved["tasks"]) == {"ARC-Easy", "GSM8K, at most 4 tokens"}
    assert saved["chatcore, at most 4 tokens"]["tasks"] == 2


def test_without_any_data_the_tasks_are_named(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "tasks").mkdir()
    flags = ["--model-tag=tiny", "-x", "2", "-m", "4", f"--task-data={tmp_path / 'tasks'}", "--device-type=cpu"]
    assert chat_eval.main(flags) == 0  # SpellingBee is made, not read
    out = " ".join(capsys.readouterr().out.split())
    assert "left out: GSM8K" in out and "SpellingBee" in out and "chatcore" not in out


@pytest.mark.parametrize(
    ("answering", "label"),
    [
        (Answering(), "Sums"),
        (Answering(top_k=5), "Sums"),  # the likeliest token is always among them
        (Answering(8, 256, 0.8), "Sums, 8 drawn at 0.8"),
        (Answering(8, 256, 0.8, 5), "Sums, 8 drawn at 0.8 from the 5 likeliest"),
        (Answering(8, 64, 0.8, 0), "Sums, 8 drawn at 0.8 from all tokens, at most 64 tokens"),
        (Answering(max_tokens=512), "Sums, at most 512 tokens"),
    ],
)
def test_results_of_other_settings_have_another_label(answering: Answering, label: str) -> None:
    """Those of the usual settings keep the task's name, under which older results are stored."""
    assert answering.label(LongAnswers(), "Sums") == label
    assert answering.label(Letters(), "Choices") == "Choices"


def test_kept_answers_are_judged_anew_and_counted_up_to_the_limit(engine: Engine, tmp_path: Path) -> None:
    class Kinder(LongAnswers):
        def evaluate(self, conversation: Conversation, completion: str) -> bool:
            return True

    evaluate_task(engine, LongAnswers(), path=tmp_path / "rows.jsonl")
    assert evaluate_task(engine, Kinder(), path=tmp_path / "rows.jsonl").accuracy == 1
    assert evaluate_task(engine, Kinder(), 3, path=tmp_path / "rows.jsonl").n == 3


def test_samples_are_as_many_as_a_small_mixture_has(engine: Engine) -> None:
    mixture = TaskMixture([LongAnswers(stop=1), LongAnswers(stop=2)])
    assert len(sample_answers(engine, mixture, 4, 4)) == 3


def test_questions_in_parts_are_shown_as_text(engine: Engine) -> None:
    class InParts(LongAnswers):
        def get_example(self, index: int) -> Conversation:
            parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
            return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Me."}]}

    assert sample_answers(engine, InParts(), 1, 4)[0]["prompt"] == "Who are you?"
    assert evaluate_task(engine, InParts(), 1, answering=Answering(max_tokens=2)).examples[0]["question"] == "Who are you?"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-a", "Arithmetic", "-n", "8"], "at temperature 0 .*: give --temperature"),
        (["-a", "DocQA"], "only teaches"),
        (["-a", "SmolTalk"], "only teaches"),  # and nothing is fetched to find that out
        (["-a", "absent.jsonl"], "only teaches"),
        (["-a", ""], "--task-name names no task: give at least one"),
        (["-a", "|,"], "--task-name names no task: give at least one"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(flags: list[str], message: str, tiny_run: Path) -> None:
    with pytest.raises(NanochatError, match=message):
        chat_eval.main(["--model-tag=tiny", "--device-type=cpu", *flags])

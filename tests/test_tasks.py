"""Tasks: slicing, mixing, rendering, judging; data from folders and its faults; nothing of the test is trained on."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import NanochatError
from nanochat.tokenizer import Tokenizer
from nanochat.tools import use_calculator
from tasks import TASKS, build_mixture, build_task, judged_tasks, task_name
from tasks.arithmetic import Arithmetic
from tasks.common import ArrowRows, LetterTask, Task, TaskMixture, TaskSequence, load_rows, multiple_choice, render_mc
from tasks.customjson import CustomJSON
from tasks.gsm8k import extract_answer
from tasks.humaneval import build_program
from tasks.identity import Identity
from tasks.spellingbee import get_words
from tests.hub_server import ask_hub, serve_folder


class Count(Task):
    """Conversation i says i."""

    def __init__(self, n: int, name: str = "", **slicing: int | None) -> None:
        super().__init__(**slicing)
        self.n, self.name = n, name

    def num_examples(self) -> int:
        return self.n

    def get_example(self, index: int) -> dict:
        return {"messages": [], "index": index, "name": self.name}


@pytest.mark.parametrize(("start", "stop", "step"), [(0, None, 1), (2, 9, 3), (5, 100, 1), (7, 7, 1), (12, None, 1)])
def test_slices_are_those_of_range(start: int, stop: int | None, step: int) -> None:
    task = Count(10, start=start, stop=stop, step=step)
    expected = list(range(10))[start:stop:step]
    assert [task[i]["index"] for i in range(len(task))] == expected
    with pytest.raises(IndexError):
        task[len(expected)]


def test_bad_slices_are_refused() -> None:
    for bad in ({"start": -1}, {"step": 0}, {"start": 5, "stop": 3}):
        with pytest.raises(NanochatError, match="is not valid: 0 <= start <= stop and step >= 1"):
            Count(10, **bad)


def test_a_sequence_and_a_mixture_hold_everything_once() -> None:
    parts = [Count(5, "a"), Count(20, "b", start=3), Count(1, "c")]
    everything = Counter((part.name, part[i]["index"]) for part in parts for i in range(len(part)))
    for whole in (TaskSequence(parts), TaskMixture(parts)):
        found = [(whole[i]["name"], whole[i]["index"]) for i in range(len(whole))]
        assert Counter(found) == everything
    assert [name for name, _ in found].count("b") == 17
    first_half = Counter(TaskMixture(parts)[i]["name"] for i in range(len(whole) // 2))
    assert 1 <= first_half["a"] <= 4  # spread, not in a lump
    assert [TaskSequence(parts)[i]["name"] for i in range(6)] == ["a"] * 5 + ["b"]
    twice = TaskMixture([parts[0], parts[0]])
    assert len(twice) == 10


def test_multiple_choice_is_rendered_with_the_letter_last() -> None:
    text = render_mc("Which?", "AB", ["one", "two"])
    assert text.splitlines()[0].endswith("Which?")
    assert "- one=A" in text
    assert "- two=B" in text


# ----------------------------------------------------------------------------- made tasks


def test_arithmetic_is_right_and_complete() -> None:
    numbers: dict[str, set[int]] = {"train": set(), "test": set()}
    for split in numbers:
        task = Arithmetic(split, size=3000)
        for i in range(3000):
            conversation = task[i]
            call, output, text = conversation["messages"][-1]["content"]
            assert use_calculator(call["text"]) == output["text"] == conversation["answer"]
            assert task.evaluate(conversation, text["text"])
            assert not task.evaluate(conversation, "The answer is 7777777.")
            assert not task.evaluate(conversation, "")
            numbers[split].update(map(int, re.findall(r"\d+", call["text"])))
    assert numbers["train"] >= set(range(10, 100)) >= numbers["test"]


@pytest.mark.parametrize("name", ["Arithmetic", "Identity"])
def test_made_conversations_are_stable_and_varied(name: str, tokenizer: Tokenizer) -> None:
    task = build_task(name, "train")
    assert task[17] == build_task(name, "train")[17]
    assert len({json.dumps(task[i]) for i in range(300)}) > 250
    for i in range(100):
        ids, mask = tokenizer.render_conversation(task[i])
        assert sum(mask) > 3


def test_a_split_that_is_missing_is_named() -> None:
    class WithoutVal(Arithmetic):
        SIZES = {"train": 8, "test": 2}

    assert [len(WithoutVal(split)) for split in ("train", "test")] == [8, 2]
    with pytest.raises(NanochatError, match="WithoutVal has no val split, only train, test: add it to its SIZES"):
        WithoutVal("val")


def test_identity_says_its_name() -> None:
    task = Identity("train")
    answers = [m["content"] for i in range(200) for m in task[i]["messages"] if m["role"] == "assistant"]
    assert sum("nanochat" in answer for answer in answers) > 60
    assert all(answer[-1] in ".!?" for answer in answers)
    conversation = task[0]
    assert task.evaluate(conversation, conversation["messages"][-1]["content"])
    assert not task.evaluate(conversation, "I am a teapot.")


def test_words_to_repeat_come_from_documents() -> None:
    """The question holds what is to be said again; what is learned from and what is tested on differ."""
    asked = {}
    for split in ("train", "test"):
        task = build_task("Repeat", split)
        asked[split] = set()
        for i in range(100):
            question, answer = (message["content"] for message in task[i]["messages"])
            text = answer.removeprefix("You said ")
            assert text and text in question
            assert task.evaluate(task[i], answer) and not task.evaluate(task[i], answer + ".")
            asked[split].add(text)
    assert len(asked["train"] & asked["test"]) < 10  # single words, by chance


def _numbered(word: str, letter: str) -> list[str]:
    return [f"{c}({word[: i + 1].count(c)})" if c == letter else c for i, c in enumerate(word)]


@pytest.mark.slow
def test_lessons_hold_more_words_with_letters_twice_in_a_row_than_the_text() -> None:
    """As in banana, which a model that seldom saw such words never ends."""

    def share(words: list[str]) -> float:
        return sum(bool(re.search(r"(..+)\1", word)) for word in words) / len(words)

    lessons = build_task("SimpleSpelling", "train")
    words = [word for i in range(500) for word in re.findall("The word (.*):", lessons[i]["messages"][-1]["content"])]
    assert share(words) > 2 * share(get_words())


def test_spelling_counts_and_splits() -> None:
    bee, spelling = build_task("SpellingBee", "train"), build_task("SimpleSpelling", "test")
    words = set()
    for i in range(200):
        conversation = bee[i]
        parts = conversation["messages"][-1]["content"]
        assert use_calculator(parts[1]["text"]) == conversation["answer"]
        assert bee.evaluate(conversation, parts[-1]["text"])
        word = parts[1]["text"].split("'")[1]
        assert word.startswith(" ") and word in parts[0]["text"]
        assert word.strip() in conversation["messages"][0]["content"]
        words.add(word)
        letter, count = parts[1]["text"].split("'")[3], int(conversation["answer"])
        assert parts[0]["text"] == f"The word{word}: {' '.join(_numbered(word.strip(), letter))}\n"
        assert parts[0]["text"].count("(") == count
        answer = spelling[i]["messages"][-1]["content"]
        assert spelling.evaluate(spelling[i], answer)
    assert 0.2 < len({word.strip() for word in words} - set(get_words())) / 200 < 0.4  # words that there are not
    tested = {spelling[i]["messages"][-1]["content"].split(":")[0].removeprefix("The word") for i in range(256)}
    assert all(word.startswith(" ") for word in tested) and not words & tested
    lessons = build_task("SimpleSpelling", "train")
    for i in range(100):
        question, answer = (message["content"] for message in lessons[i]["messages"])
        spelled = [re.fullmatch(r"The word (\w+): ([a-z ]+)", line) for line in answer.split("\n")]
        assert all(match[1] == match[2].replace(" ", "") and match[1] in question for match in spelled)
    docs = build_task("DocQA", "train")
    assert len(docs) > 20
    assert docs[0]["messages"][-1]["content"].endswith(".")


# ----------------------------------------------------------------------------- tasks from files


def test_real_tasks_from_the_local_layout(real_data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.humaneval.choose_launcher", lambda: None)  # no program is run
    folder = real_data / "tasks"
    sizes = {("GSM8K", "train"): 7000, ("GSM8K", "val"): 473, ("GSM8K", "test"): 1319, ("MMLU", "test"): 14042}
    sizes |= {("HumanEval", "test"): 164, ("ARC-Easy", "test"): None, ("ARC-Challenge", "test"): None, ("MMLU", "train"): 257}
    for (name, split), size in sizes.items():
        task = build_task(name, split, folder)
        assert size is None or len(task) == size
        conversation = task[0]
        ids, mask = tokenizer.render_conversation(conversation, max_tokens=100_000)
        assert sum(mask)
        if name != "HumanEval":
            reference = conversation["messages"][-1]["content"]
            text = reference if isinstance(reference, str) else "".join(part["text"] for part in reference)
            assert task.evaluate(conversation, text)
            assert not task.evaluate(conversation, "junk")


def test_real_gsm8k_calls_are_what_the_calculator_says(real_data: Path) -> None:
    task = build_task("GSM8K", "train", real_data / "tasks")
    total = 0
    for i in range(300):
        parts = task[i]["messages"][-1]["content"]
        for call, output in zip(parts, parts[1:], strict=False):
            if call["type"] == "python":
                assert output == {"type": "python_output", "text": use_calculator(call["text"])}
                total += 1
    assert total > 500


def test_no_training_task_reads_a_test_file(real_data: Path) -> None:
    folder = real_data / "tasks"
    task = build_task("GSM8K", "train", folder)
    train = {json.dumps(task[i]["messages"][0]) for i in range(len(task))}
    for split in ("val", "test"):
        task = build_task("GSM8K", split, folder)
        assert not train & {json.dumps(task[i]["messages"][0]) for i in range(len(task))}
    learned, watched = (build_task("MMLU", split, folder) for split in ("train", "val"))  # one file is there for both
    questions = {json.dumps(learned[i]) for i in range(len(learned))}
    assert len(watched) and not questions & {json.dumps(watched[i]) for i in range(len(watched))}
    with pytest.raises(NanochatError, match="no training split"):
        build_task("HumanEval", "train", folder)


def test_no_operands_are_in_two_splits() -> None:
    asked = {}
    for split, count in (("train", 5000), ("val", 200), ("test", 1000)):
        task = build_task("Arithmetic", split)
        calls = [task[i]["messages"][-1]["content"][0]["text"] for i in range(count)]
        asked[split] = {(re.sub(r"\d", "", call), *sorted(re.findall(r"\d+", call))) for call in calls if "-" not in call}
    assert not asked["train"] & (asked["val"] | asked["test"]) and not asked["val"] & asked["test"]


def test_what_the_calculator_says_is_no_answer_yet() -> None:
    task = build_task("Arithmetic", "test")
    problem = task[0]
    said, call = problem["answer"], problem["messages"][-1]["content"][0]["text"]
    shown = f"<|python_start|>{call}<|python_end|><|output_start|>{said}<|output_end|>"
    assert not task.evaluate(problem, shown)
    assert task.evaluate(problem, f"{shown}The answer is {said}.")


def test_a_letter_is_no_word_that_begins_with_it() -> None:
    class Quiz(LetterTask):
        rows = ({},)

        @staticmethod
        def convert(row: dict) -> dict:
            return multiple_choice("Which?", ["this", "that"], 1)

    quiz = Quiz()
    right, wrong = ("B", " B\n", "B.", "B) that"), ("Because I think so", "A", "", "b", "the answer is B")
    assert all(quiz.evaluate(quiz[0], said) for said in right)
    assert not any(quiz.evaluate(quiz[0], said) for said in wrong)


@pytest.mark.parametrize("fence", ["```", "```python", "```py", "```Python", "``` python3", "```python\r"])
def test_programs_are_found_in_fences(fence: str) -> None:
    problem = {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}
    program = build_program(problem, f"Here it is:\n{fence}\ndef f():\n    return 7\n```\nThis works.")
    assert "return 7" in program and "```" not in program and "This works" not in program


def test_a_mark_at_the_beginning_of_a_file_is_no_text(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "mine.jsonl").write_text("\n".join([json.dumps(talk)] * 30), encoding="utf-8-sig")
    assert CustomJSON(tmp_path / "mine.jsonl")[0]["messages"] == talk


@pytest.mark.parametrize(
    ("text", "answer"),
    [("#### 1,234", "1234"), ("so 5\n#### 7", "7"), ("#### $3.50", "3.5"), ("#### -2", "-2"), ("7", None), ("####", None),
     ("#### 1\n#### 2", "1"), ("####\nso #### 1", "1")],
)  # fmt: skip
def test_gsm8k_answers(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_missing_task_data_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match=r"gsm8k/train\.jsonl"):
        build_task("GSM8K", "train", tmp_path)
    with pytest.raises(NanochatError, match="choose from ARC-Easy"):
        build_task("Nope", "train")
    for spec in ("", "Arithmetic*x", "Arithmetic:y"):
        with pytest.raises(NanochatError):
            build_mixture(spec, "train")


def test_tasks_that_only_teach_are_known() -> None:
    """The help of chat_eval leaves them out."""
    assert set(TASKS) - set(judged_tasks()) == {"DocQA", "SmolTalk"}


def test_a_task_gets_the_arguments_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads no files need not take their folder; one that cannot be made is named."""

    class Plain(Arithmetic):
        def __init__(self, size: int = 10, split: str = "train", **slicing: int) -> None:
            super().__init__(split, size, **slicing)

    class Odd(Arithmetic):
        def __init__(self, *, level: int) -> None:
            super().__init__("train")

    for task in (Plain, Odd):
        monkeypatch.setitem(TASKS, task.__name__, ("common", task.__name__, {}))
        monkeypatch.setattr(f"tasks.common.{task.__name__}", task, raising=False)
    assert len(build_mixture("plain*2:3", "train")) == 6
    with pytest.raises(NanochatError, match=r"^task Odd takes other arguments than TASKS gives it \("):
        build_task("odd", "train")


def test_a_task_has_one_name() -> None:
    assert [task_name(name) for name in ("gsm8k", "ARC-EASY", "My.jsonl")] == ["GSM8K", "ARC-Easy", "My.jsonl"]
    with pytest.raises(NanochatError, match="unknown task 'gsm'"):
        task_name("gsm")


def test_mixture_spec() -> None:
    assert len(build_mixture("Arithmetic:40, identity*3:10", "train")) == 70
    with pytest.raises(NanochatError, match=r"C:.chats.jsonl"):  # looked for there: the drive's colon begins no number
        build_mixture(r"C:\chats.jsonl*2:10", "train")
    for too_large in ("Arithmetic*" + "9" * 20, "Arithmetic:" + "9" * 5000):
        with pytest.raises(NanochatError, match=r"is not an entry of a mixture: .* with TIMES below 1000"):
            build_mixture(too_large, "train")
    for nothing in ("Identity*0", "Identity:0", "Identity*2:00"):
        with pytest.raises(NanochatError, match=r"'Identity[*:0-9]+' takes nothing of Identity: leave it out"):
            build_mixture(f"Arithmetic:40,{nothing}", "val")
    assert len(build_mixture("Arithmetic:40,Identity*3:20", "val")) == 3  # a twentieth of each, once


def test_a_home_folder_is_found_behind_a_comma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "mine.jsonl").write_text(json.dumps(talk), encoding="utf-8")
    assert len(build_mixture("Arithmetic:5,~/mine.jsonl", "train")) == 6
    with pytest.raises(NanochatError, match=r"~nobody.here.mine\.jsonl cannot be read"):
        build_mixture("Arithmetic:5,~nobody.here/mine.jsonl", "train")


def test_half_a_surrogate_pair_is_no_character(tmp_path: Path) -> None:
    line = r'[{"role": "user", "content": "\ud800 hi \ud83d\ude42 \\ud800"}, {"role": "assistant", "content": "\uDC00"}]'
    (tmp_path / "mine.jsonl").write_text(line, encoding="utf-8")
    talk = CustomJSON(tmp_path / "mine.jsonl")[0]["messages"]
    assert [message["content"] for message in talk] == ["\ufffd hi 🙂 \\ud800", "\ufffd"]


def test_custom_conversations(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text("\n".join([json.dumps(talk), json.dumps({"messages": talk})] * 30), encoding="utf-8")
    train, val = CustomJSON(path), CustomJSON(path, "val")
    assert (len(train), len(val)) == (57, 3)
    assert train[0] == {"messages": talk}
    assert len(build_mixture(f"{path}*2", "train")) == 114
    if os.name != "nt":  # whose paths hold neither
        path = path.rename(tmp_path / "our*2:7 chats.jsonl")
        assert len(build_mixture(f"{path}*2:8", "train")) == 16


def test_conversations_in_the_form_of_sharegpt(tmp_path: Path) -> None:
    said = [("system", "Be brief."), ("human", "q"), ("gpt", "a")]
    row = {"id": "1", "conversations": [{"from": who, "value": text} for who, text in said]}
    (tmp_path / "shared.jsonl").write_text(json.dumps(row), encoding="utf-8")
    talk = CustomJSON(tmp_path / "shared.jsonl")[0]["messages"]
    assert [(message["role"], message["content"]) for message in talk] == [
        ("system", "Be brief."), ("user", "q"), ("assistant", "a")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2, is not JSON"), ("{}", "conversation 2 is not a list"),
     ('{"conversations": [5, {"from": "tool"}]}', "has message 1 without role and content"),
     ('{"conversations": [{"from": "tool"}]}', "has message 1 without role and content"),
     ('[{"role": "user"}, {}]', "without role and content"),
     ('[{"role": "assistant", "content": ""}, {"role": "user", "content": ""}]', "message 1 is from 'assistant'"),
     (json.dumps([{"role": r, "content": ""} for r in ("system", "user", "user")]), "message 3 is from 'user'"),
     ('[{"role": "system", "content": ""}, {"role": "user", "content": ""}]', "conversation 2 has no answer of the assistant"),
     ("[" * 100_000, "line 2, is not a row of this task")],
)  # fmt: skip
def test_malformed_conversations_are_named(tmp_path: Path, line: str, message: str) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "bad.jsonl").write_text(json.dumps(talk) + "\n" + line, encoding="utf-8")
    with pytest.raises(NanochatError, match=message):
        CustomJSON(tmp_path / "bad.jsonl")


def test_dolly_is_a_custom_task(real_data: Path) -> None:
    assert len(CustomJSON(real_data / "tasks" / "dolly.jsonl")) == 950


@pytest.mark.parametrize(
    ("name", "file", "line"),
    [
        ("GSM8K", "gsm8k/test.jsonl", '{"question": "q", "answer": "no number"}'),
        ("GSM8K", "gsm8k/test.jsonl", '{"question": "q"}'),
        ("GSM8K", "gsm8k/test.jsonl", "[1, 2]"),
        ("MMLU", "mmlu/test.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": 2, "subject": "s"}'),
        ("MMLU", "mmlu/test.jsonl", '{"question": "q", "choices": 7, "answer": 0, "subject": "s"}'),
        ("ARC-Easy", "arc/ARC-Easy/test.jsonl",
         '{"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}'),
        ("SmolTalk", "smoltalk/test.jsonl", '{"messages": [{"role": "user"}]}'),
    ],
)  # fmt: skip
def test_malformed_rows_are_named_by_file_and_line(tmp_path: Path, name: str, file: str, line: str) -> None:
    good = {
        "GSM8K": {"question": "q", "answer": "1 #### 1"},
        "MMLU": {"question": "q", "choices": ["a", "b"], "answer": 1, "subject": "s"},
        "ARC-Easy": {"query": "q", "choices": ["a", "b"], "gold": 1},
        "SmolTalk": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    }[name]
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(good) + "\n\n" + line, encoding="utf-8")
    with pytest.raises(NanochatError, match=rf"{path.name}, line 3, is not a row of this task"):
        build_task(name, "val" if name == "SmolTalk" else "test", tmp_path)


@pytest.mark.parametrize("part", [["x"], [{"type": "text"}], [{"type": "image", "text": "x"}]])
def test_malformed_parts_of_a_conversation_are_named_by_file_and_line(tmp_path: Path, part: list) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    bad = [talk[0], {"role": "assistant", "content": part}]
    (tmp_path / "bad.jsonl").write_text(json.dumps(talk) + "\n\n" + json.dumps(bad), encoding="utf-8")
    with pytest.raises(NanochatError, match=r"bad\.jsonl, line 3: conversation 2 is damaged in message 2 .* fix or"):
        CustomJSON(tmp_path / "bad.jsonl")


def test_tasks_of_the_hub_are_there_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once they were fetched; what was not is named, and so is a split that there is not."""
    (tmp_path / "main").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(pa.table({"question": [name]}), tmp_path / "main" / f"{name}.parquet")

    def load(split: str) -> list[str]:
        return [row["question"] for row in load_rows(None, [], "someone/texts", "main", split, lambda row: None)]

    with serve_folder(tmp_path) as server:
        ask_hub(monkeypatch, server.address)
        assert load("train") == ["train-00000-of-00002", "train-00001-of-00002"]
        with pytest.raises(NanochatError, match=r"has no main/validation-\*"):
            load("validation")
    ask_hub(monkeypatch, "http://127.0.0.1:1")
    assert load("train") == ["train-00000-of-00002", "train-00001-of-00002"]
    with pytest.raises(NanochatError, match="could not be fetched.*--task-data"):
        load("test")


def test_the_last_number_of_an_answer_counts() -> None:
    assert Arithmetic("test").evaluate({"answer": "81"}, "23 + 58 is 81.")
    assert build_task("SpellingBee", "test").evaluate({"answer": "2"}, "#### 1\n#### 2")


def test_docs_of_train_and_val_are_of_other_functions() -> None:
    train, val = ({pair[0] for pair in build_task("DocQA", split).pairs} for split in ("train", "val"))
    assert train and val and not train & val


def test_rows_of_the_hub_are_not_loaded_into_memory(tmp_path: Path) -> None:
    """They may be more than there is; what is read of them is theirs, across files and again."""
    talks = [[{"role": "user", "content": f"{i} " * 2000}, {"role": "assistant", "content": str(i)}] for i in range(600)]
    paths = [tmp_path / f"train-{n:05d}-of-00002.parquet" for n in range(2)]
    for path, part in zip(paths, (talks[:400], talks[400:]), strict=True):
        pq.write_table(pa.table({"messages": part}), path)
    for _ in range(2):
        before = pa.total_allocated_bytes()
        rows = ArrowRows(paths)
        assert pa.total_allocated_bytes() - before < 100_000 and len(rows) == 600
        assert [rows[i]["messages"] for i in (0, 399, 400, 599)] == [talks[i] for i in (0, 399, 400, 599)]


def test_a_part_of_a_split_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "train-00000-of-00002.parquet").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(NanochatError, match="only 1"):
        load_rows(None, [], "a/b", "main", "train", lambda row: row)

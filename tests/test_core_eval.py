"""CORE: prompts as published, shared beginnings and batches that change nothing, what is missing or malformed."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import io
import json
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import report
from nanochat.common import NanochatError
from nanochat.core_bundle import CoreTask, find_bundle, read_items, read_tasks
from nanochat.core_eval import NanochatScorer, Question, Row, build_question, evaluate_core, render
from nanochat.files import read_json_lines
from nanochat.hf_scorer import HuggingFaceScorer
from nanochat.metrics import read_metrics
from nanochat.scores import wilson_interval
from nanochat.tokenizer import Tokenizer
from scripts import base_eval, base_train
from tests.conftest import TINY_TRAINING
from tests.helpers import make_document, make_model
from tests.hub_server import ModelHub, ask_hub, serve_folder
from tests.many_ranks import Ranks

CHOICES = [{"query": f"Question {i}: which", "choices": [f"the cat {i}", f"a small dog {i}", "her brother"], "gold": i % 3}
           for i in range(12)]  # fmt: skip
SCHEMA = [{"context_options": [f"the cat {i} sees the king and the cat", f"the cat {i} sees the king and the king"],
           "continuation": "follows the river.", "gold": i % 2} for i in range(8)]  # fmt: skip
TEXTS = [{"context": make_document(i, 3) + " ", "continuation": "the cat"} for i in range(9)]
BUNDLE = {
    "arc_easy": ("multiple_choice", CHOICES, 3, "\nAnswer: "),
    "winograd": ("schema", SCHEMA, 2, None),
    "lambada_openai": ("language_modeling", TEXTS, 0, None),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "eval_data").mkdir(parents=True)
    lines = ["icl_tasks:"]
    for label, (kind, items, shots, delimiter) in {**BUNDLE, "squad": ("language_modeling", None, 10, None)}.items():
        lines += [
            f"- label: {label}",
            f"  dataset_uri: {label}.jsonl",
            f"  num_fewshot: [{shots}]",
            f"  icl_task_type: {kind}",
        ]
        if delimiter is not None:
            lines.append(f"  continuation_delimiter: {json.dumps(delimiter)}")
        if items is not None:
            (folder / "eval_data" / f"{label}.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    (folder / "core.yaml").write_text("\n".join(lines), encoding="utf-8")
    rows = ["Eval Task,Random baseline", "arc_easy,25", "winograd,50", "lambada_openai,0", "squad,0"]
    (folder / "eval_meta_data.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def scorer(tokenizer: Tokenizer) -> NanochatScorer:
    return NanochatScorer(make_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=256), tokenizer)


def test_prompts_are_rendered_as_published() -> None:
    task = CoreTask("x", "multiple_choice", Path(), 1, "\nAnswer: ", 0.25)
    texts, _ = render(task, CHOICES[1], [CHOICES[0]])
    assert texts[1] == "Question 0: which\nAnswer: the cat 0\n\nQuestion 1: which\nAnswer: a small dog 1"
    task = CoreTask("x", "schema", Path(), 1, " ", 0.5)
    texts, _ = render(task, SCHEMA[0], [SCHEMA[1]])
    assert texts[0].startswith("the cat 1 sees the king and the king follows the river.\n\nthe cat 0")
    assert texts[0].endswith("and the cat follows the river.")
    task = CoreTask("x", "language_modeling", Path(), 0, " ", 0.0)
    (text,), before = render(task, {"context": " one two ", "continuation": "three"}, [])
    assert text == "one two three" and before == "one two"


def test_what_is_judged_is_the_answer(scorer: NanochatScorer, bundle: Path) -> None:
    decode = scorer.tokenizer.decode
    for task in read_tasks(bundle)[:3]:
        items = read_items(task)
        for index in (0, 5):
            question = build_question(task, items, index, scorer)
            judged = [decode(c.tokens[c.start :]) for c in question.candidates]
            if task.kind == "schema":
                assert len(set(judged)) == 1 and "follows the river." in judged[0]
            elif task.kind == "language_modeling":
                assert judged[0].strip() == "the cat"
            else:
                assert len(set(judged)) == 3
                for text, choice in zip(judged, items[index]["choices"], strict=True):
                    assert choice.endswith(text.strip())


def test_the_examples_are_all_questions_but_the_one_that_is_asked(scorer: NanochatScorer, bundle: Path) -> None:
    """However many are wanted: each text of the file is there once, and that of the question last."""
    scorer.context = 10_000
    for task in read_tasks(bundle)[:3]:
        items = read_items(task)
        names = [(item.get("query") or item.get("context") or item["context_options"][item["gold"]]).strip() for item in items]
        for index, item in enumerate(items):
            question = build_question(dataclasses.replace(task, num_fewshot=len(items)), items, index, scorer)
            text = scorer.tokenizer.decode(question.candidates[item.get("gold", 0)].tokens)
            assert [text.count(name) for name in names] == [1] * len(items)
            assert max(names, key=text.index) == names[index]


@pytest.mark.parametrize("most", [-1, 6])
def test_the_examples_are_those_of_published_numbers(tokenizer: Tokenizer, bundle: Path, most: int) -> None:
    """Items are shuffled and cut to those that are asked; each then draws its examples by its own place among them."""
    texts: list[str] = []

    class Listener:
        context = 10_000

        def encode(self, text: str) -> list[int]:
            texts.append(text)
            return tokenizer.encode(text, prepend="<|bos|>")

        def score(self, questions: list[Question]) -> list[list[tuple[float, bool]]]:
            return [[(0.0, True) for _ in question.candidates] for question in questions]

    evaluate_core(Listener(), bundle, max_per_task=most)
    for task in read_tasks(bundle)[:2]:
        items = read_items(task)
        random.Random(1337).shuffle(items)
        items = items[:most] if most > 0 else items
        for place, item in enumerate(items):
            drawn = random.Random(1234 + place).sample([i for i in range(len(items)) if i != place], task.num_fewshot)
            assert set(render(task, item, [items[i] for i in drawn])[0]) <= set(texts)


@pytest.mark.parametrize("knows", [True, False])
def test_the_likeliest_candidate_is_the_answer(tokenizer: Tokenizer, bundle: Path, knows: bool) -> None:
    """Whose answer is likelier than all others is always right; whose answer is less likely than another, never."""

    class Hand:
        context = 256

        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text, prepend="<|bos|>")

        def score(self, questions: list[Question]) -> list[list[tuple[float, bool]]]:
            return [[(-1.0 if (i == q.gold) == knows else -2.0, knows) for i, _ in enumerate(q.candidates)] for q in questions]

    tasks = evaluate_core(Hand(), bundle)["tasks"]
    assert {label: task["accuracy"] for label, task in tasks.items()} == dict.fromkeys(BUNDLE, float(knows))


def test_batches_and_shared_beginnings_change_nothing(scorer: NanochatScorer, bundle: Path) -> None:
    """Against the plain model, one text at a time; long prompts that lose their beginning included."""

    class Plain(NanochatScorer):
        def _rows(self, question: Question) -> list[Row]:
            return [Row.of([candidate], 0) for candidate in question.candidates]

    plain = Plain(scorer.model, scorer.tokenizer, batch_tokens=1)
    for context in (256, 40):
        scorer.context = plain.context = context
        for task in read_tasks(bundle)[:3]:
            items = read_items(task)
            questions = [build_question(task, items, index, scorer) for index in range(len(items))]
            assert any(q.truncated for q in questions) == (context == 40) or task.kind != "multiple_choice"
            if task.kind != "language_modeling" and context == 256:
                assert max(q.num_shared for q in questions) > 16
            for together, alone in zip(scorer.score(questions), plain.score(questions), strict=True):
                for (mean, greedy), (expected, greedy_alone) in zip(together, alone, strict=True):
                    assert mean == pytest.approx(expected, abs=2e-4)
                    assert greedy == greedy_alone
    candidate = questions[0].candidates[0]
    with torch.no_grad():
        logprobs = scorer.model(torch.tensor([candidate.tokens]))[0].log_softmax(-1)
    places = range(candidate.start, len(candidate.tokens))
    expected = sum(logprobs[i - 1, candidate.tokens[i]].item() for i in places) / len(places)
    assert plain.score(questions[:1])[0][0][0] == pytest.approx(expected, abs=2e-4)


def test_the_metric_is_centred_and_says_what_is_missing(scorer: NanochatScorer, bundle: Path, tmp_path: Path) -> None:
    results = evaluate_core(scorer, bundle, folder=tmp_path / "out")
    assert results["missing"] == ["squad"] and results["name"] == "core_partial"
    for label, baseline in (("arc_easy", 0.25), ("winograd", 0.5), ("lambada_openai", 0.0)):
        task = results["tasks"][label]
        assert task["centered"] == pytest.approx((task["accuracy"] - baseline) / (1 - baseline))
        (path,) = (tmp_path / "out").glob(f"{label}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == task["n"] == len(BUNDLE[label][1])
        assert sum(row["correct"] for row in rows) / len(rows) == task["accuracy"]
    mean = sum(task["centered"] for task in results["tasks"].values()) / 3
    assert results["low"] < results["value"] < results["high"] and results["value"] == pytest.approx(mean)
    for most in (1, 4):
        assert {task["n"] for task in evaluate_core(scorer, bundle, max_per_task=most)["tasks"].values()} == {most}


def evaluate_watched(scorer: NanochatScorer, bundle: Path, folder: Path) -> tuple[dict[str, Any], set[str]]:
    """(results, labels of the tasks that were computed)."""
    computed: set[str] = set()
    return evaluate_core(scorer, bundle, folder=folder, report=lambda label, *_: computed.add(label)), computed


def test_finished_tasks_are_not_computed_again(
    scorer: NanochatScorer, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate_core(scorer, bundle, folder=tmp_path / "out")
    next((tmp_path / "out").glob("winograd_*")).unlink()
    assert not capsys.readouterr().out
    assert evaluate_watched(scorer, bundle, tmp_path / "out") == (first, {"winograd"})
    assert capsys.readouterr().out == f"2 of 3 tasks are an earlier run's: remove {tmp_path / 'out'} to measure them again\n"


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"correct": "yes", "truncated": false}', "\udcff"])
def test_outcomes_that_cannot_be_read_are_computed_again(
    content: str, scorer: NanochatScorer, bundle: Path, tmp_path: Path
) -> None:
    first = evaluate_core(scorer, bundle, folder=tmp_path / "out")
    path = next((tmp_path / "out").glob("winograd_*"))
    whole = path.read_bytes()
    path.write_bytes(whole + content.encode("utf-8", "surrogateescape") if content else b"")
    assert evaluate_watched(scorer, bundle, tmp_path / "out") == (first, {"winograd"})
    assert path.read_bytes() == whole


def test_outcomes_of_other_questions_are_not_used(scorer: NanochatScorer, bundle: Path, tmp_path: Path) -> None:
    first = evaluate_core(scorer, bundle, folder=tmp_path / "out")
    path, tasks = bundle / "eval_data" / "arc_easy.jsonl", bundle / "core.yaml"
    before = path.read_text(encoding="utf-8"), tasks.read_text(encoding="utf-8")
    path.write_text("\n".join(map(json.dumps, CHOICES[:5])), encoding="utf-8")
    other, computed = evaluate_watched(scorer, bundle, tmp_path / "out")
    assert other["tasks"]["arc_easy"]["n"] == 5 and computed == {"arc_easy"}
    path.write_text(before[0], encoding="utf-8")
    assert evaluate_watched(scorer, bundle, tmp_path / "out") == (first, set())
    tasks.write_text(before[1].replace("num_fewshot: [2]", "num_fewshot: [1]"), encoding="utf-8")  # of winograd
    assert evaluate_watched(scorer, bundle, tmp_path / "out")[1] == {"winograd"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "arc_easy.jsonl, line 2, is not JSON .*: restore the bundle"),
        ('{"query": "x"}', "no 'gold'"),
        ('{"query": "x", "choices": ["a"], "gold": 3}', "gold 3"),
        ('{"query": "x", "choices": ["a"], "gold": 0.0}', "'gold' is '0.0'"),
        ('{"query": "x", "choices": ["a"], "gold": "0"}', "'gold' is '0'"),
        ('{"query": "x", "choices": [], "gold": 0}', "gold 0"),
        ('{"query": "x", "choices": ["a", null], "gold": 0}', "texts"),
        ('{"query": 5, "choices": ["a"], "gold": 0}', "'query' is '5'"),
        ("7", "line 2, is not a multiple_choice question"),
    ],
)
def test_malformed_lines_are_named(scorer: NanochatScorer, bundle: Path, line: str, words: str) -> None:
    path = bundle / "eval_data" / "arc_easy.jsonl"
    path.write_text(json.dumps(CHOICES[0]) + "\n" + line, encoding="utf-8")
    with pytest.raises(NanochatError, match=words):
        evaluate_core(scorer, bundle)


def test_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NanochatError, match=r"no core\.yaml"):
        find_bundle(tmp_path)
    monkeypatch.setattr("nanochat.core_bundle.BUNDLE_URL", (tmp_path / "absent.zip").as_uri())
    with pytest.raises(NanochatError, match="give a folder with --eval-bundle"):
        find_bundle(None)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_download_leaves_no_bundle(
    damage: str, bundle: Path, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.make_archive(str(tmp_path / "bundle"), "zip", bundle))
    content = bytearray(path.read_bytes())
    monkeypatch.setattr("nanochat.core_bundle.BUNDLE_SHA256", hashlib.sha256(content).hexdigest())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.compress_size)
    content[largest.header_offset + 30 + len(largest.filename) + largest.compress_size // 2] ^= 0xFF

    class Response(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if damage == "cut":
                raise http.client.IncompleteRead(b"PK", 98)
            return bytes(content)

    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: Response())
    reason = "cannot be downloaded" if damage == "cut" else r"eval_bundle\.zip is damaged or has changed \(its sha256 is"
    with pytest.raises(NanochatError, match=f"{reason}.*give a folder with --eval-bundle"):
        find_bundle(None)
    assert not (base_dir / "eval_bundle").exists()


def test_a_bundle_is_downloaded_once(bundle: Path, tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", bundle.parent, bundle.name)
    monkeypatch.setattr("nanochat.core_bundle.BUNDLE_URL", Path(archive).as_uri())
    monkeypatch.setattr("nanochat.core_bundle.BUNDLE_SHA256", hashlib.sha256(Path(archive).read_bytes()).hexdigest())
    folder = find_bundle(None)
    assert folder == base_dir / "eval_bundle" and len(read_tasks(folder)) == 4
    Path(archive).unlink()
    assert find_bundle(None) == folder


def test_the_command(tiny_run: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--eval=core", f"--eval-bundle={bundle}", "--model-tag=tiny", "--max-per-task=3", "--device-type=cpu"]
    assert base_eval.main(flags) == 0
    output = capsys.readouterr().out
    assert "core_partial" in output and "3 of 22 tasks" in output and "without data: squad" in output
    saved = json.loads((tiny_run / "base" / "eval.json").read_text())
    assert set(saved["core"]["tasks"]) == set(BUNDLE)


def test_core_is_measured_where_its_data_is(
    tiny_run: Path, bundle: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model-tag=tiny", "--split-tokens=512", "--device-type=cpu", "--no-compile"]
    assert base_eval.main(flags) == 0
    assert "--eval core fetches it" in capsys.readouterr().out
    assert set(json.loads((tiny_run / "base" / "eval.json").read_text())) == {"step", "weights", "bpb", "samples"}
    assert base_eval.default_kinds(base_eval.parse_arguments(["--max-per-task=3"])) == list(base_eval.KINDS)
    assert base_eval.default_kinds(base_eval.parse_arguments([f"--eval-bundle={bundle}"])) == list(base_eval.KINDS)
    shutil.copytree(bundle, base_dir / "eval_bundle")
    assert base_eval.main(flags) == 0
    assert "core_partial" in (out := capsys.readouterr().out) and "bits per byte" in out and "left out" not in out


def save_llama(folder: Path, seed: int = 0) -> None:
    """A small Llama with its tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: bash runs/setup.sh eval")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>"])
    inner.train_from_iterator((make_document(seed) for seed in range(100)), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(vocab_size=400, max_position_embeddings=64, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.slow
def test_a_hugging_face_model(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small Llama from a folder, against its own logits; and a path that holds none."""
    save_llama(tmp_path / "llama")
    scorer = HuggingFaceScorer(str(tmp_path / "llama"), torch.device("cpu"))
    assert scorer.context == 64
    task = read_tasks(bundle)[0]
    items = read_items(task)
    questions = [build_question(task, items, index, scorer) for index in range(5)]
    for question, scores in zip(questions, scorer.score(questions), strict=True):
        for candidate, (mean, _) in zip(question.candidates, scores, strict=True):
            with torch.no_grad():
                logprobs = scorer.model(torch.tensor([candidate.tokens])).logits[0].float().log_softmax(-1)
            places = range(candidate.start, len(candidate.tokens))
            expected = sum(logprobs[i - 1, candidate.tokens[i]].item() for i in places) / len(places)
            assert mean == pytest.approx(expected, abs=0.02)
    flags = ["--eval=core", f"--eval-bundle={bundle}", "--device-type=cpu"]
    assert base_eval.main([*flags, f"--hf-path={tmp_path / 'llama'}"]) == 0
    assert "3 of 22 tasks" in capsys.readouterr().out
    with pytest.raises(NanochatError, match="transformers can load"):
        HuggingFaceScorer(str(tmp_path), torch.device("cpu"))


@pytest.mark.slow
def test_outcomes_of_another_hugging_face_model_are_not_used(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved again into the same folder, or under the same name elsewhere."""
    flags = ["--eval=core", f"--eval-bundle={bundle}", "--device-type=cpu", "--hf-path=llama"]
    for place, seed, known in (("a", 0, False), ("a", None, True), ("a", 1, False), ("b", 0, False), ("a", None, True)):
        if seed is not None:
            save_llama(tmp_path / place / "llama", seed)
        monkeypatch.chdir(tmp_path / place)
        assert base_eval.main(flags) == 0
        assert ("3 of 3 tasks are an earlier run's" in capsys.readouterr().out) == known


@pytest.mark.slow
def test_another_commit_of_the_hub_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub(ModelHub):
        commit = "1" * 40

        def _answer(self) -> None:
            self.path = self.path.replace(self.commit, "0" * 40)
            super()._answer()

        def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            headers = {name: value.replace("0" * 40, self.commit) for name, value in (headers or {}).items()}
            super()._send(body.replace(b"0" * 40, self.commit.encode()), status, headers)

    save_llama(tmp_path / "llama")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve_folder(tmp_path / "llama", Hub) as hub:
        ask_hub(monkeypatch, hub.address)
        first, again = (HuggingFaceScorer("someone/model", torch.device("cpu")) for _ in range(2))
        save_llama(tmp_path / "llama", 1)
        hub.commit = "2" * 40
        other = HuggingFaceScorer("someone/model", torch.device("cpu"))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    weights = [scorer.model.lm_head.weight for scorer in (first, other)]
    assert not torch.equal(*weights)


@pytest.mark.slow
def test_the_real_bundle(real_data: Path, tiny_run: Path, tokenizer: Tokenizer, scorer: NanochatScorer) -> None:
    results = evaluate_core(scorer, real_data / "eval_bundle", max_per_task=2)
    assert len(results["tasks"]) == 18
    assert set(results["missing"]) == {"hellaswag_zeroshot", "hellaswag", "squad", "coqa"}


@pytest.mark.usefixtures("tokenizer_in_place")
def test_core_while_training_and_in_the_report(
    corpus: Path, bundle: Path, base_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric has a period of its own, is the same as measured afterwards, and is made up for where it was cut off."""
    flags = [*TINY_TRAINING, "--data", str(corpus), "--model-tag=core", f"--eval-bundle={bundle}", "--eval-every=4"]
    flags += ["--core-metric-every=3", "--core-metric-max-per-task=4", "--save-every=3", "--resume=auto"]
    calls = []

    def end_the_second(*args: Any) -> dict[str, Any]:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate_core(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(base_train, "evaluate_core", end_the_second)
        base_train.main(flags)
    assert base_train.main(flags) == 0  # all is trained, but not all measured
    rows = read_metrics(base_dir / "runs" / "core" / "base" / "metrics.jsonl")
    measured = {row["step"]: row["val/core_partial"] for row in rows if "val/core_partial" in row}
    assert list(measured) == [3, 6]
    assert [row["step"] for row in rows if "val/bpb" in row] == [4, 6]
    flags = ["--eval=core", f"--eval-bundle={bundle}", "--model-tag=core", "--max-per-task=4", "--device-type=cpu"]
    assert base_eval.main(flags) == 0
    assert f"core_partial: {measured[6]:.4f}" in capsys.readouterr().out
    report.main(["--model-tag=core"])
    folder = base_dir / "runs" / "core"
    assert "core_partial, over 3 tasks" in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "plots" / "core.png").stat().st_size > 1000
    assert "arc_easy" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_ranks_find_what_one_does(many_ranks: Ranks, tiny_run: Path, bundle: Path) -> None:
    found = []
    for ranks in (1, 2):
        flags = ["--eval=core", f"--eval-bundle={bundle}", "--model-tag=tiny", "--no-compile", "--device-type=cpu"]
        said = many_ranks.run(ranks, "-m", "scripts.base_eval", *flags)
        assert all(f"{label}: {len(items)} questions" in said for label, (_, items, *_) in BUNDLE.items())
        (folder,) = (tiny_run / "base" / "core").iterdir()
        rows = {path.name: read_json_lines(path) for path in folder.iterdir()}
        found.append({name: [(row["index"], row["correct"]) for row in part] for name, part in rows.items()})
        shutil.rmtree(folder)
    assert found[0] == found[1]
    assert {len(part) for part in found[0].values()} == {len(items) for _, items, *_ in BUNDLE.values()}


def test_a_limit_takes_questions_from_everywhere(scorer: NanochatScorer, bundle: Path, tmp_path: Path) -> None:
    results = evaluate_core(scorer, bundle, 3, tmp_path / "rows")
    rows = [row for path in (tmp_path / "rows").glob("arc_easy*") for row in read_json_lines(path)]
    assert [row["index"] for row in rows] != [0, 1, 2]
    for task in results["tasks"].values():
        assert (task["low"], task["high"]) == wilson_interval(task["accuracy"], task["n"])


def test_a_choice_that_another_begins_with_is_judged_from_the_same_place(scorer: NanochatScorer) -> None:
    items = [{"query": "Say", "choices": ["the cat", "the cat sees"], "gold": 0}]
    first, second = build_question(CoreTask("x", "multiple_choice", Path(), 0, " ", 0.5), items, 0, scorer).candidates
    assert first.start == second.start


def test_an_answer_longer_than_the_context_keeps_something_to_judge(scorer: NanochatScorer) -> None:
    scorer.context = 4
    items = [{"context": "the cat", "continuation": "sees the river and likes some bread"}]
    question = build_question(CoreTask("x", "language_modeling", Path(), 0, " ", 0.0), items, 0, scorer)
    assert all(1 <= candidate.start < len(candidate.tokens) for candidate in question.candidates)
    scorer.score([question])


def test_delimiters_are_those_of_the_bundle(bundle: Path) -> None:
    assert [task.delimiter for task in read_tasks(bundle)][:3] == ["\nAnswer: ", " ", " "]


def test_of_a_hugging_face_model_core_alone_is_measured() -> None:
    with pytest.raises(NanochatError, match="--eval bpb: only CORE"):
        base_eval.main(["--hf-path=somewhere", "--eval=bpb", "--device-type=cpu"])
    for flag in ("--model-tag=d4", "--step=5", "--data=builtin", "--split-tokens=512", "--device-batch-size=1"):
        with pytest.raises(NanochatError, match=f"--hf-path somewhere is no run: leave out {flag.partition('=')[0]}, or"):
            base_eval.main(["--hf-path=somewhere", flag, "--device-type=cpu"])

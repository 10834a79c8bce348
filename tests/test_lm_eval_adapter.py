"""lm-evaluation-harness with our checkpoints: it finds what our own evaluation finds, and keeps to its own conventions."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import NanochatError
from nanochat.core_bundle import CoreTask, read_items
from nanochat.core_eval import NanochatScorer, build_question
from nanochat.engine import Engine
from nanochat.runs import get_run_dir, get_stage_dir
from nanochat.sampling import SamplingParams
from nanochat.tokenizer import Tokenizer
from tests.helpers import make_document, make_model

NAME = "nanochat.lm_eval_adapter"
CONTEXT = 512
ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
QUESTIONS = 40
TASKS = {  # kind, file, text between question and answer
    "arc_easy": ("multiple_choice", "world_knowledge/arc_easy.jsonl", "\nAnswer: "),
    "piqa": ("multiple_choice", "commonsense_reasoning/piqa.jsonl", "\nAnswer: "),
    "copa": ("multiple_choice", "commonsense_reasoning/copa.jsonl", " "),
    "lambada": ("language_modeling", "language_understanding/lambada_openai.jsonl", " "),
    "operators": ("language_modeling", "symbolic_problem_solving/bigbench_operators.jsonl", " "),
}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: bash runs/setup.sh eval")
    importlib.import_module("huggingface_hub.constants")  # now: it reads the next variable once, and for all later tests
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return importlib.import_module(NAME)


@pytest.fixture
def run(base_dir: Path, tokenizer: Tokenizer) -> Path:
    """A run "random" with base and sft, of a model whose every matrix matters."""
    for stage, seed in (("base", 0), ("sft", 1)):
        model = make_model(seed, vocab_size=tokenizer.get_vocab_size(), sequence_len=CONTEXT)
        meta = {"model_config": asdict(model.config), "tokenizer": tokenizer.fingerprint()}
        save_checkpoint(get_stage_dir("random", stage), 7, model.state_dict(), None, meta)
    tokenizer.save(get_run_dir("random"))
    return get_run_dir("random")


@pytest.fixture
def lm(adapter: ModuleType, run: Path) -> Any:
    return adapter.NanochatLM(model_tag="random", device="cpu")


def request(*arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


def plain_logprobs(lm: Any, tokens: list[int]) -> torch.Tensor:
    """(T - 1,): of each token but the first, from the whole text at once."""
    with torch.no_grad():
        logprobs = lm.scorer.model(torch.tensor([tokens]))[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def write_task(folder: Path, name: str, data: Path, **settings: Any) -> None:
    """A task of the harness, on a file of JSON lines."""
    task = {"task": name, "dataset_path": "json", "test_split": "train", "metric_list": [ACCURACY],
            "dataset_kwargs": {"data_files": str(data), "cache_dir": str(folder / "cache")}, **settings}  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def evaluate(folder: Path, name: str, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, samples in order) of a task in the folder."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        "nanochat", tasks=[name], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0, **settings,
    )  # fmt: skip
    return results["results"][name], results["samples"][name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_it_agrees_with_our_own_evaluation(
    adapter: ModuleType, run: Path, real_data: Path, tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    kind, file, delimiter = TASKS[name]
    data = real_data / "eval_bundle" / "eval_data" / file
    between = delimiter.rstrip(" ")
    if kind == "multiple_choice":
        texts = {"doc_to_text": "{{query}}" + between, "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
        write_task(tmp_path, name, data, output_type="multiple_choice", **texts)
    else:
        texts = {"doc_to_text": "{{context.strip()}}", "doc_to_target": " {{continuation}}"}
        write_task(tmp_path, name, data, output_type="loglikelihood", **texts)
    arguments = {"model_tag": "random", "batch_tokens": 4096}
    metrics, samples = evaluate(tmp_path, name, model_args=arguments, device="cpu", limit=QUESTIONS)

    scorer = NanochatScorer(adapter.NanochatLM(model_tag="random", device="cpu").scorer.model, tokenizer)
    task = CoreTask(name, kind, data, 0, delimiter, 0.0)
    items = read_items(task)
    questions = [build_question(task, items, sample["doc_id"], scorer) for sample in samples]
    right = odd = 0
    for sample, question, scores in zip(samples, questions, scorer.score(questions), strict=True):
        assert not question.truncated
        theirs = [logprob for logprob, _ in sample["filtered_resps"]]
        ours = [mean * (len(c.tokens) - c.start) for c, (mean, _) in zip(question.candidates, scores, strict=True)]
        if kind == "language_modeling":
            correct = scores[0][1]
            assert theirs == pytest.approx(ours, abs=1e-3)
        else:
            correct = max(range(len(ours)), key=lambda i: ours[i]) == question.gold
            # CORE judges from where the candidates part, the harness the whole of each: what they share is added to
            # all, but where one candidate begins another.
            if len({c.start for c in question.candidates}) > 1:
                odd += 1
            else:
                shared = theirs[0] - ours[0]
                assert theirs == pytest.approx([value + shared for value in ours], abs=1e-3)
        assert correct == bool(sample["acc"])
        right += correct
    assert metrics["acc,none"] == pytest.approx(right / QUESTIONS)
    assert len(samples) == QUESTIONS and odd <= 2


def test_sums_are_those_of_the_plain_model(lm: Any) -> None:
    """No context, a space at its end, one token over the border, and several continuations of one context."""
    context = make_document(1, 4)
    pairs = [("", "the cat"), (context + " ", "sees"), (context, " the river 7."), (context, " two stones"), ("Why.", ".")]
    results = lm.loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (logprob, greedy) in zip(pairs, results, strict=True):
        tokens = lm.scorer.encode(context + continuation)
        start = min(len(lm.scorer.encode(context.rstrip())), len(tokens) - 1)
        assert logprob == pytest.approx(plain_logprobs(lm, tokens)[start - 1 :].sum().item(), abs=1e-3)
        with torch.no_grad():
            likeliest = lm.scorer.model(torch.tensor([tokens]))[0].argmax(-1)[start - 1 : -1].tolist()
        assert greedy == (likeliest == tokens[start:])


def test_a_continuation_must_be_there_and_fit(lm: Any) -> None:
    with pytest.raises(NanochatError, match="empty continuation"):
        lm.loglikelihood([request("the cat", "")])
    with pytest.raises(NanochatError, match=f"does not fit a context of {CONTEXT}"):
        lm.loglikelihood([request("the cat", " sees" * CONTEXT)])


def test_contexts_that_are_too_long_are_cut_on_the_left_and_counted(lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nanochat")
    long, bos = " ".join(make_document(seed, 20) for seed in range(6)), lm.eot_token_id
    tokens = lm.scorer.encode(long + " the cat")
    assert len(tokens) > 2 * CONTEXT
    judged = len(tokens) - len(lm.scorer.encode(long))
    results = lm.loglikelihood([request(long, " the cat"), request("my old friend", " the cat")])
    expected = plain_logprobs(lm, [bos, *tokens[-CONTEXT + 1 :]])[-judged:].sum().item()
    assert results[0][0] == pytest.approx(expected, abs=1e-3)
    assert [record.getMessage() for record in caplog.records] == ["1 of 2 requests were cut on the left to fit 512 tokens"]
    caplog.clear()
    assert len(lm.loglikelihood([request("my old friend", " the cat")])) == 1 and not caplog.records
    for most, room in ((100, 100), (1000, CONTEXT // 2)):  # a long answer leaves the prompt half of the context
        sequence = lm._sequence(long, {"until": [], "max_gen_toks": most}, 0)
        assert sequence.prompt == [bos, *lm.scorer.encode(long)[-(CONTEXT - room) + 1 :]]
    lm.trimmed = 0
    lm.generate_until([request(text, {"until": ["."], "max_gen_toks": 4}) for text in (long, "my old friend", long)])
    assert "2 of 3 requests were cut" in caplog.text


def test_rolling_judges_each_token_once(lm: Any) -> None:
    texts = ["", "the cat", make_document(3, 10), " ".join(make_document(seed, 25) for seed in range(6))]
    results = lm.loglikelihood_rolling([request(text) for text in texts])
    for text, result in zip(texts, results, strict=True):
        tokens, expected, judged = lm.scorer.encode(text), 0.0, 1
        while judged < len(tokens):
            end = min(judged + CONTEXT - 1, len(tokens))
            window = tokens[max(0, end - CONTEXT) : end]
            expected += plain_logprobs(lm, window)[judged - end :].sum().item()
            judged = end
        assert result == pytest.approx(expected, abs=1e-3)
    assert len(tokens) > 2 * CONTEXT


def test_answers_end_where_they_should(lm: Any) -> None:
    contexts = [make_document(seed, 2) for seed in range(6)]
    engine = Engine(lm.scorer.model, lm.scorer.tokenizer)
    greedy = engine.complete([lm.scorer.encode(context) for context in contexts], SamplingParams(0, max_tokens=24))
    settings = {"until": [], "max_gen_toks": 24}
    texts = lm.generate_until([request(context, settings) for context in contexts])
    assert texts == ["".join(text for text, part in row.pieces if part == "text") for row in greedy]
    assert lm.generate_until([request(contexts[0], {**settings, "do_sample": True, "top_k": 1})]) == texts[:1]
    long = max(range(6), key=lambda i: len(texts[i]))
    stop = texts[long][len(texts[long]) // 2 :][:3]
    stopped = lm.generate_until([request(contexts[long], {**settings, "until": ["nowhere", stop]})])[0]
    assert stopped == texts[long][: texts[long].index(stop)]
    # A request that is repeated is answered anew each time, and in the order of the requests.
    sampled = {**settings, "do_sample": True, "temperature": 2.0, "top_p": 0.99}
    answers = lm.generate_until([request(contexts[0], sampled)] * 8)
    assert len(set(answers)) == 8 and answers == lm.generate_until([request(contexts[0], sampled)] * 8)
    sequence = lm._sequence("the cat", {**sampled, "top_k": 5, "until": "x"}, 3)
    params = sequence.params
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens, params.stop) == (2.0, 5, 0.99, 24, ("x",))


def test_a_conversation_has_the_tokens_it_was_trained_with(lm: Any) -> None:
    tokenizer = lm.scorer.tokenizer
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": 'the "cat"\n<|assistant_end|> é'},
        {"role": "assistant", "content": "a house"}, {"role": "user", "content": "the king"},
    ]  # fmt: skip
    context = lm.apply_chat_template(messages)
    prompt = tokenizer.render_for_completion({"messages": messages})
    assert isinstance(context, str) and json.loads(json.dumps(context)) == context
    assert lm._sequence(context, {"until": []}, 0).prompt == prompt
    whole, _ = tokenizer.render_conversation({"messages": [*messages, {"role": "assistant", "content": "two stones"}]})
    before, judged = lm._encode_pair(context, "two stones")
    assert before == prompt and before + judged == whole[:-1]
    begun = lm.apply_chat_template([*messages, {"role": "assistant", "content": "two "}], add_generation_prompt=False)
    before, judged = lm._encode_pair(begun, "stones")
    assert before + judged == whole[:-1] and before == prompt + tokenizer.encode("two")
    assert tokenizer.special_ids["<|user_start|>"] not in lm.tok_encode("<|user_start|> the cat")


@pytest.mark.slow
def test_the_command_with_a_chat_model(
    adapter: ModuleType, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few-shot turns and the template; asked again, all comes from the harness's cache."""
    from functools import partial

    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    items = [{"question": f"{i} + 1 =", "choices": [f"{i + 1}", f"{i}"], "gold": 0} for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    texts = {"doc_to_text": "{{question}}", "num_fewshot": 2, "fewshot_config": {"sampler": "first_n"}}
    write_task(tmp_path, "choose", tmp_path / "sums.jsonl", output_type="multiple_choice",
               doc_to_choice="{{choices}}", doc_to_target="{{gold}}", **texts)  # fmt: skip
    write_task(tmp_path, "say", tmp_path / "sums.jsonl", output_type="generate_until", doc_to_target="{{choices[0]}}",
               generation_kwargs={"until": ["\n"], "max_gen_toks": 6},
               **texts | {"metric_list": [{"metric": "exact_match"}]})  # fmt: skip
    flags = ["--model_args", "source=sft,model_tag=tiny,device=cpu", "--include_path", str(tmp_path), "--tasks", "choose,say",
             "--apply_chat_template", "--log_samples", "--use_cache", str(tmp_path / "answers")]  # fmt: skip
    assert adapter.main([*flags, "--output_path", str(tmp_path / "first")]) == 0
    assert "choose" in capsys.readouterr().out
    monkeypatch.setattr(adapter.NanochatLM, "_loglikelihood_tokens", None)
    monkeypatch.setattr(adapter.NanochatLM, "_sequence", None)
    assert adapter.main([*flags, "--output_path", str(tmp_path / "second")]) == 0

    def read(folder: str, name: str) -> list[dict[str, Any]]:
        path = next((tmp_path / folder).rglob(f"samples_{name}_*.jsonl"))
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    for name in ("choose", "say"):
        first, second = read("first", name), read("second", name)
        assert [row["resps"] for row in first] == [row["resps"] for row in second] and len(first) == 6
        context = first[3]["arguments"]["gen_args_0"]["arg_0"]
        turns = json.loads(context.removeprefix(adapter.CHAT_MARK))
        assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
        assert turns[-1]["content"] == "3 + 1 ="
    results = json.loads(next((tmp_path / "first").rglob("results_*.json")).read_text(encoding="utf-8"))
    assert (results["config"]["model_stage"], results["config"]["model_step"]) == ("sft", 4)


def test_mistakes_are_named(adapter: ModuleType, run: Path) -> None:
    make = adapter.NanochatLM.create_from_arg_string
    for arguments, words in {
        "checkpoint=7": "unknown argument 'checkpoint' .* choose from source",
        "source=pretrained": "source=pretrained .* base, sft, rl",
        "step=last": "step=last .* whole number",
        "model_tag=absent": "run 'absent' has no base checkpoint",
        "model_tag=random,step=9": "no checkpoint of step 9",
        "source=rl": "no rl checkpoint",
        "device=tpu": "unknown device type 'tpu'",
    }.items():
        with pytest.raises(NanochatError, match=words):
            make(arguments, {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"})
    assert make("model_tag=random,step=7", {"batch_size": 8, "device": "cpu"}).device.type == "cpu"
    assert make("source=sft,device=cpu", {"device": "cuda:0"}).meta["stage"] == "sft"


@pytest.mark.parametrize("tag", ["007", "1e3", "1_0", "None", "true", "random"])
def test_a_tag_is_no_number(adapter: ModuleType, run: Path, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run.rename(run.with_name(tag))
    make, asked = adapter.NanochatLM.create_from_arg_string, {"device": "cpu"}
    assert make(f"source=sft,model_tag={tag}", asked).meta["tag"] == make(f"model_tag='{tag}'", asked).meta["tag"] == tag
    from lm_eval._cli.harness import HarnessCLI

    seen: list[Any] = []
    monkeypatch.setattr(adapter, "cli_evaluate", lambda: seen.append(HarnessCLI().parse_args().model_args))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    for flags in (["--model_args", f"source=sft,model_tag={tag}"], [f"--model_args=model_tag={tag}"]):
        adapter.main([*flags, "--tasks", "arc_easy"])
        assert seen.pop()["model_tag"] == tag


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config", "mine.toml", "--tasks", "x"], "mine.toml"),
        (["--config", "other.yaml", "--tasks", "x"], "unexpected keyword argument 'depth'"),
        (["--tasks", "absent"], "Tasks not found: absent"),
        (["--model_args", "source=base"], "No tasks"),
    ],
)
def test_what_the_harness_refuses_is_no_mistake_of_ours(
    adapter: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    from functools import partial

    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text("[training]\ndepth = 12\n", encoding="utf-8")
    Path("other.yaml").write_text("depth: 12\n", encoding="utf-8")
    with pytest.raises(NanochatError, match=rf"does not take this \(.*{words}.*its --config is YAML"):
        adapter.main(flags)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(NanochatError, match="bash runs/setup.sh eval"):
        importlib.import_module(NAME)


def test_help_names_what_is_ours(adapter: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit):
        adapter.main(["--help"])
    first = capsys.readouterr().out.splitlines()[0]
    assert "nanochat's checkpoint" in first and all(name in first for name in adapter.ARGUMENTS)

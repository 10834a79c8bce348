"""How much faster CORE is than one question at a time: python -m benchmarks.core_eval [--questions 50]

A model of depth 4, width 192, context 512 and vocabulary 4,096 with random weights, on the tasks of NANOCHAT_TEST_DATA.
One question at a time is the obvious way: all candidates of a question in one batch, with all their logits. The two take
turns, task by task, so that other load on the machine affects both.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
import time

import torch

from benchmarks.common import describe_machine, print_result, random_model, real_data
from nanochat.common import run_command
from nanochat.core_bundle import read_items, read_tasks
from nanochat.core_eval import NanochatScorer, Question, build_question
from nanochat.devices import compute_init
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer


@torch.inference_mode()
def score_one_by_one(model: GPT, questions: list[Question]) -> list[list[float]]:
    """The mean log-probability of each candidate's judged tokens."""
    results = []
    for question in questions:
        longest = max(len(c.tokens) for c in question.candidates)
        padded = [c.tokens + [0] * (longest - len(c.tokens)) for c in question.candidates]
        ids = torch.tensor(padded, device=model.get_device())
        logprobs = model(ids).log_softmax(-1)
        results.append([
            logprobs[row, c.start - 1 : len(c.tokens) - 1].gather(1, ids[row, c.start : len(c.tokens), None]).mean().item()
            for row, c in enumerate(question.candidates)
        ])  # fmt: skip
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare CORE with one question at a time.")
    parser.add_argument("--questions", type=int, default=50, help="of each task")
    args = parser.parse_args(argv)
    *_, device = compute_init()
    config = GPTConfig(sequence_len=512, vocab_size=4096, n_layer=4, n_head=3, n_kv_head=3, n_embd=192)
    model = random_model(device, config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.05)  # a new model's is so small that all texts are about equally likely
    scorer = NanochatScorer(model, Tokenizer.train(iter(pydoc_data.topics.topics.values()), 4096))
    started = time.perf_counter()
    scorer.compile()
    compile_s = time.perf_counter() - started
    seconds = {"one_by_one": 0.0, "together": 0.0}
    largest_difference, count = 0.0, 0
    for task in read_tasks(real_data("eval_bundle")):
        if not task.path.exists():
            continue
        items = read_items(task)
        questions = [build_question(task, items, i, scorer) for i in range(min(args.questions, len(items)))]
        started = time.perf_counter()
        alone = score_one_by_one(model, questions)
        alone_s = time.perf_counter() - started
        started = time.perf_counter()
        together = scorer.score(questions)
        together_s = time.perf_counter() - started
        seconds["one_by_one"] += alone_s
        seconds["together"] += together_s
        count += len(questions)
        differences = [abs(a - b) for x, y in zip(alone, together, strict=True) for a, (b, _) in zip(x, y, strict=True)]
        largest_difference = max(largest_difference, *differences)
        print(f"{task.label:>36}  {alone_s:6.2f} s  {together_s:6.2f} s  {alone_s / together_s:5.1f}x")
    print_result({
        **describe_machine(device), "questions": count, "compile_s": round(compile_s, 1),
        **{f"{name}_s": round(value, 2) for name, value in seconds.items()},
        "times_faster": round(seconds["one_by_one"] / seconds["together"], 2),
        "largest_difference": round(largest_difference, 5),
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

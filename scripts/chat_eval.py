"""Measure a chat model on tasks: python -m scripts.chat_eval -a "ARC-Easy|GSM8K".

Without -a, the six tasks of ChatCORE. If it is stopped and run again, it continues where it was.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from nanochat.chat_eval import CHATCORE_TASKS, Answering, TaskResult, chatcore, evaluate_task
from nanochat.chosen_model import add_checkpoint_arguments, load_chosen_model
from nanochat.common import NanochatError, run_command
from nanochat.devices import compute_init
from nanochat.engine import Engine
from nanochat.eval_results import merge_eval
from nanochat.progress import Progress
from nanochat.ranks import from_rank0
from nanochat.runs import get_stage_dir
from nanochat.sampling import SamplingParams
from nanochat.scores import describe_interval, describe_mean, describe_pass_at
from nanochat.settings import Arguments, SettingsParser, add_device_argument, add_sampling_arguments
from nanochat.tables import print_table
from tasks import build_judged_task, judged_tasks, task_class, task_name
from tasks.common import Task


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Measure a chat model on tasks.",
        examples=["%(prog)s --model-tag d12", '%(prog)s -i rl -a "GSM8K|HumanEval" -n 8 -t 0.8'],
    )
    model = parser.add_argument_group("model")
    add_checkpoint_arguments(model)
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("-a", "--task-name", default=None, metavar="NAME|...",
                       help=f"any of {', '.join(judged_tasks())} (default: those of ChatCORE that are available)")  # fmt: skip
    tasks.add_argument("-x", "--max-problems", type=int, default=-1, help="problems of each task (-1: all)")
    tasks.add_argument("--task-data", type=Path, default=None, metavar="DIR", help="read tasks from here, not from the hub")
    tasks.add_argument("--unsafe-execution", action="store_true", help="run the model's programs without isolation")
    answers, usual = parser.add_argument_group("answers"), Answering()
    answers.add_argument("-n", "--num-samples", type=int, default=usual.num_samples, help="answers to a problem, for pass@k")
    answers.add_argument("-m", "--max-new-tokens", type=int, default=usual.max_tokens, help="most tokens in an answer")
    add_sampling_arguments(answers, usual.temperature, usual.top_k)
    machine = parser.add_argument_group("machine")
    machine.add_argument("-b", "--batch-size", type=int, default=32, help="problems at a time")
    add_device_argument(machine)
    args = parser.parse_args(argv)
    args.require_positive("num_samples", "max_new_tokens", "batch_size")
    SamplingParams(args.temperature, args.top_k)  # raises for what cannot be meant, also where only letters are chosen
    if args.num_samples > 1 and args.temperature == 0:
        n = args.num_samples
        raise NanochatError(
            f"--num-samples {n} at temperature 0 gives the same answer {n} times: give --temperature, such as 0.8"
        )
    args.require_some("max_problems")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.unsafe_execution:
        os.environ["NANOCHAT_UNSAFE_EXECUTION"] = "1"
    _, rank, _, _, device = compute_init(args.device_type)
    model, tokenizer, meta = load_chosen_model(args, device)
    tasks, missing = collect_tasks(args.task_name, args.task_data)
    engine = Engine(model, tokenizer, max_rows=args.batch_size)
    answering = Answering(args.num_samples, args.max_new_tokens, args.temperature, args.top_k)
    stage_dir = get_stage_dir(meta["tag"], args.source)
    folder = stage_dir / "chat_eval" / f"step_{meta['step']:06d}_{meta['weights'][:8]}"
    results: dict[str, TaskResult] = {}
    merged: dict[str, Any] = {}  # all that eval.json holds
    for name, task in tasks.items():
        total = len(task) if args.max_problems < 0 else min(args.max_problems, len(task))
        path = folder / f"{answering.label(task, name)}.jsonl"
        with Progress(f"evaluating {name}", total, unit="problem") as progress:
            results[name] = evaluate_task(
                engine, task, args.max_problems, args.batch_size, answering, path, progress.update
            )  # fmt: skip
        if rank == 0:
            label, scores, examples = answering.label(task, name), results[name].as_dict(), results[name].examples
            merged = merge_eval(stage_dir, meta["step"], {"tasks": {label: scores}, "examples": {label: examples}})
            kept = merged["tasks"][label]["n"]  # an earlier result may be over more problems
            if kept > results[name].n:
                print(f"{name}: eval.json and the report keep the result over {kept:,} problems")
    if rank == 0:
        merge_eval(stage_dir, meta["step"], means_of(merged, answering))
        has_mean = answering.temperature == 0  # as in eval.json
        mean = chatcore({name: result.as_dict() for name, result in results.items()}) if has_mean else None
        show(results, mean, missing)
    return 0


def means_of(stored: dict[str, Any], answering: Answering) -> dict[str, dict[str, Any]]:
    """ChatCORE of all results that eval.json holds, for these settings and for others that it has a mean of.

    By the keys of eval.json. Results of letters belong to all settings, so they change all means.
    """
    settings = {key.removeprefix("chatcore") for key in stored if key.startswith("chatcore")}
    if answering.temperature == 0:  # answers that were drawn have no mean
        settings.add(answering.described())
    means, tasks = {}, stored.get("tasks", {})
    for described in settings:
        labels = {name: name if task_class(name).eval_type == "categorical" else name + described for name in CHATCORE_TASKS}
        mean = chatcore({name: tasks[label] for name, label in labels.items() if label in tasks})
        if mean is not None:
            means[f"chatcore{described}"] = mean
    return means


def collect_tasks(names: str | None, data_dir: Path | None) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks by name, and ChatCORE tasks that are not available with the reason. Requested tasks must be available."""
    if names is not None:
        asked = [task_name(name) for name in re.split(r"[|,]", names) if name]
        if not asked:
            raise NanochatError("--task-name names no task: give at least one, or leave it out for those of ChatCORE")
        return {name: build_judged_task(name, "test", data_dir) for name in asked}, {}
    tasks, missing = {}, {}
    for name in CHATCORE_TASKS:
        try:
            tasks[name] = build_judged_task(name, "test", data_dir)
        except NanochatError as error:
            missing[name] = str(error)
    agreed = from_rank0(list(tasks))  # all ranks must measure the same tasks, even if a slow machine's sandbox fails
    for name in agreed:
        if name in missing:
            raise NanochatError(f"{name} can be measured on rank 0, but not here: {missing[name]}")
    return {name: tasks[name] for name in agreed}, missing


def show(results: dict[str, TaskResult], mean: dict | None, missing: dict[str, str]) -> None:
    columns = ["task", "accuracy", "95% interval", "problems", "pass@k", "prompts shortened", "answers cut"]
    rows = []
    for name, result in results.items():
        interval, passed = describe_interval(result.as_dict()), describe_pass_at(result.pass_at)
        rows.append([name, f"{result.accuracy:.1%}", interval, f"{result.n:,}", passed,
                     f"{result.truncated or ''}", f"{result.unfinished or ''}"])  # fmt: skip
    print_table(columns, rows)
    if any(result.unfinished for result in results.values()):
        print("answers cut: they reached --max-new-tokens or the end of the context, and were judged as far as they went")
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    if mean is not None:
        over = f"the mean over {mean['tasks']} of {len(CHATCORE_TASKS)} tasks, each 0 for guessing"
        value, interval = describe_mean(mean)
        print(f"{mean['name']}: {value} ({interval}), {over}")


if __name__ == "__main__":
    sys.exit(run_command(main))

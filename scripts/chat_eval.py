"""Measure a chat model on tasks: python -m scripts.chat_eval -a Arithmetic,ARC-Easy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanochat.chat_eval import evaluate_task
from nanochat.checkpoint_manager import get_stage_dir, load_model
from nanochat.common import compute_init, run_command
from nanochat.engine import Engine
from nanochat.progress import Progress
from nanochat.report import merge_eval
from tasks import TASKS, build_task


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a chat model on tasks.")
    parser.add_argument("-i", "--source", default="sft", choices=("base", "sft", "rl"), help="stage of the model")
    parser.add_argument("-a", "--task-name", default="ARC-Easy,ARC-Challenge,MMLU,GSM8K,SpellingBee", metavar="NAME,...",
                        help=f"of {', '.join(TASKS)}")  # fmt: skip
    parser.add_argument("-g", "--model-tag", default=None, help="run (default: the newest with that stage)")
    parser.add_argument("-s", "--step", type=int, default=None, help="checkpoint (default: the newest)")
    parser.add_argument("-x", "--max-problems", type=int, default=-1, help="of each task (-1: all)")
    parser.add_argument("-n", "--num-samples", type=int, default=1, help="answers to a problem; one right counts")
    parser.add_argument("-m", "--max-new-tokens", type=int, default=256)
    parser.add_argument("-t", "--temperature", type=float, default=0.0)
    parser.add_argument("-k", "--top-k", type=int, default=50)
    parser.add_argument("-b", "--batch-size", type=int, default=16, help="problems at a time")
    parser.add_argument("--task-data", type=Path, default=None, metavar="DIR", help="local folder instead of the hub")
    parser.add_argument("--device-type", default="", metavar="cuda|mps|cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    *_, device = compute_init(args.device_type)
    tasks = {name: build_task(name, "test", args.task_data) for name in args.task_name.split(",")}
    model, tokenizer, meta = load_model(args.source, device, "eval", args.model_tag, args.step)
    engine = Engine(model, tokenizer)
    stage_dir = get_stage_dir(meta["tag"], args.source)
    table = Table("task", "accuracy", "95% interval", "problems")
    for name, task in tasks.items():
        total = len(task) if args.max_problems < 0 else min(args.max_problems, len(task))
        with Progress(f"evaluating {name}", total, unit="problem") as progress:
            result = evaluate_task(
                engine, task, args.max_problems, args.batch_size, args.num_samples, args.max_new_tokens,
                args.temperature, args.top_k, progress.update,
            )  # fmt: skip
        merge_eval(stage_dir, meta["step"], {"tasks": {name: result.as_dict()}, "examples": {name: result.examples}})
        interval = f"{result.low:.1%} to {result.high:.1%}"
        table.add_row(name, f"{result.accuracy:.1%}", interval, str(result.num_problems))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

"""One name for every command: `nanochat train --depth 4` is `python -m scripts.base_train --depth 4`.

This is only a table; a command's module, and PyTorch with it, is imported when the command runs.
"""

from __future__ import annotations

import difflib
import importlib
import sys

COMMANDS = {
    "doctor": ("nanochat.doctor", "what this machine has, what will be used, what to expect"),
    "data": ("nanochat.dataset", "download shards of ClimbMix or FineWeb-Edu"),
    "prep": ("scripts.data_prep", "shuffle, deduplicate and tokenize text at scale"),
    "tokenizer": ("scripts.tok_train", "train a tokenizer"),
    "tok-eval": ("scripts.tok_eval", "compare its compression with GPT-2's and GPT-4's"),
    "train": ("scripts.base_train", "pretrain a base model"),
    "eval": ("scripts.base_eval", "measure a base model: CORE, bits per byte, samples"),
    "sft": ("scripts.chat_sft", "fine-tune on conversations"),
    "rl": ("scripts.chat_rl", "reinforce a chat model on a task with rewards"),
    "chat-eval": ("scripts.chat_eval", "measure a chat model on tasks"),
    "lm-eval": ("nanochat.lm_eval_adapter", "lm-evaluation-harness on a checkpoint"),
    "chat": ("scripts.chat_cli", "talk to a model in the terminal"),
    "serve": ("scripts.chat_web", "serve a model: chat page, runs page, OpenAI's API"),
    "bench": ("scripts.infer_bench", "measure how fast a model answers"),
    "report": ("nanochat.report", "write the report of a run"),
    "metrics": ("nanochat.metrics", "send a run's numbers to a logger"),
    "compare": ("scripts.compare", "lay runs side by side"),
    "export": ("scripts.export_hf", "write a model in Hugging Face's format"),
    "memory": ("nanochat.memory", "what depth fits a device's memory"),
}


def main() -> int:
    """Run the command that sys.argv names; for an unknown name, suggest the nearest one and return exit code 2."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        try:
            print(overview(), flush=True)
        except BrokenPipeError:  # the reader (head, less) has seen enough
            sys.stderr.close()
        return 0
    if name in ("--version", "-V"):
        from importlib.metadata import version

        print(f"nanochat {version('nanochat')}")
        return 0
    if name not in COMMANDS:
        print(f"error: {unknown(name)}", file=sys.stderr)
        return 2
    sys.argv = [f"nanochat {name}", *rest]  # as if the module had been started by itself
    from nanochat.common import run_command

    return run_command(lambda argv: importlib.import_module(COMMANDS[name][0]).main(argv))


def overview() -> str:
    lines = [f"  {name:<10} {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        ["usage: nanochat COMMAND [flags]", "", "commands:", *lines, "", "nanochat COMMAND --help lists a command's flags."]
    )


def unknown(name: str) -> str:
    """One sentence for a name that is not a command; the name of a script counts as its command's name."""
    of_scripts = {module.rpartition(".")[2]: command for command, (module, _) in COMMANDS.items()}
    nearest = difflib.get_close_matches(name, [*COMMANDS, *of_scripts], 1)
    hint = f"did you mean {of_scripts.get(nearest[0], nearest[0])}?" if nearest else "nanochat --help lists them"
    return f"there is no command {name!r}; {hint}"


if __name__ == "__main__":
    sys.exit(main())

"""The model that a command's flags name: a checkpoint of a run, or a model from Hugging Face. Used by the scripts."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import NanochatError
from nanochat.gpt import GPT
from nanochat.hf.load import load_hf
from nanochat.runs import STAGES
from nanochat.settings import Arguments
from nanochat.tokenizer import Tokenizer


def add_checkpoint_arguments(group: argparse._ActionsContainer, from_hf: bool = False) -> None:
    """Add the flags that load_chosen_model reads. from_hf: also the one for a model from elsewhere."""
    group.add_argument("-i", "--source", default="sft", choices=STAGES, help="stage of the model")
    group.add_argument("-g", "--model-tag", default=None, metavar="TAG", help="run (default: the newest with that stage)")
    group.add_argument("-s", "--step", type=int, default=None, help="checkpoint (default: the newest)")
    if from_hf:
        group.add_argument("--from-hf", default=None, metavar="DIR|NAME", help="a Hugging Face model instead of a run's")


def load_chosen_model(args: Arguments, device: torch.device | str) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """(model, tokenizer, meta), to generate with. meta gains "origin", to show to the user. Raises NanochatError."""
    name = vars(args).get("from_hf")  # not every command has this flag
    if name is None:
        model, tokenizer, meta = load_model(args.source, device, "eval", args.model_tag, args.step)
        return model, tokenizer, {**meta, "origin": f"{args.source}, step {meta['step']}"}
    named = args.given & {"model_tag", "step"}
    if named or ("source" in args.given and args.source != "base"):  # with base, chat_cli continues a text
        raise NanochatError(
            f"--from-hf {name} is no checkpoint of a run: leave out --source, --model-tag and --step, or --from-hf"
        )
    model, tokenizer, meta = load_hf(name, device)
    return model, tokenizer, {**meta, "origin": f"from {name}"}

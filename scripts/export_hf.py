"""Write a model in a format that Hugging Face's libraries load: python -m scripts.export_hf --output my-model."""

from __future__ import annotations

import sys
from pathlib import Path

from nanochat.chosen_model import add_checkpoint_arguments, load_chosen_model
from nanochat.common import NanochatError, run_command
from nanochat.hf.export import FORMATS, check_output, export, push
from nanochat.settings import Arguments, SettingsParser


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Write a model in a format that Hugging Face's libraries load.",
        examples=["%(prog)s --output my-model", "%(prog)s -i rl -g d12 -o d12-hf --push-to-hub me/d12"],
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="new directory, or an older export")
    help_format = "nanochat: for transformers' own class; custom: with our code; auto: the first if it suffices"
    parser.add_argument("--format", default="auto", choices=FORMATS, help=help_format)
    parser.add_argument("--push-to-hub", default=None, metavar="USER/NAME", help="also upload it to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="create the hub repository as private")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.private and args.push_to_hub is None:
        raise NanochatError("--private is only for uploads to the hub: add --push-to-hub USER/NAME")
    check_output(args.output)  # before anything is loaded
    model, tokenizer, meta = load_chosen_model(args, "cpu")
    form = export(model, tokenizer, meta, args.output, args.format, args.push_to_hub)
    print(f"{meta['tag']} ({meta['origin']}) is in {args.output}, in the format {form!r}")
    if args.push_to_hub is not None:
        print(push(args.output, args.push_to_hub, args.private))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

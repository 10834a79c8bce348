"""Talk to a model in the terminal: python -m scripts.chat_cli, or one answer with -p "Who are you?"."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from nanochat.chosen_model import add_checkpoint_arguments, load_chosen_model
from nanochat.common import NanochatError, run_command
from nanochat.devices import compute_init
from nanochat.engine import Engine
from nanochat.runner import prepare_for_inference
from nanochat.sampling import SamplingParams
from nanochat.sequence import Sequence, joined_parts
from nanochat.settings import Arguments, SettingsParser, add_device_argument, add_sampling_arguments
from nanochat.trimming import prompt_room, trim_conversation

HELP = "Type a message; 'clear' starts a new conversation, 'quit' or Ctrl-D leaves, Ctrl-C stops an answer."
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# Control characters in a model's text must not reach the terminal: some can, for example, set the clipboard.
CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Talk to a model in the terminal.",
        examples=["%(prog)s", '%(prog)s -g demo -t 0 -p "What is 23 + 58?"'],
    )
    add_checkpoint_arguments(parser, from_hf=True)
    parser.add_argument("-p", "--prompt", default=None, metavar="TEXT", help="answer this and exit (-: what is piped in)")
    add_sampling_arguments(parser, 0.6, 50)
    parser.add_argument("-m", "--max-tokens", type=int, default=256, help="most tokens in an answer")
    parser.add_argument("--seed", type=int, default=42, help="seed of the sampling")
    add_device_argument(parser)
    args = parser.parse_args(argv)
    args.require_positive("max_tokens")
    SamplingParams(args.temperature, args.top_k)  # raises for what cannot be meant, before a model is loaded
    if args.prompt == "-":
        args.prompt = sys.stdin.read().rstrip("\r\n")
    if args.prompt is not None and not args.prompt.strip():
        raise NanochatError("--prompt is empty: give the text to answer, or leave --prompt out to talk")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    *_, device = compute_init(args.device_type, args.seed)
    model, tokenizer, meta = load_chosen_model(args, device)
    chat = Chat(Engine(prepare_for_inference(model), tokenizer), args)
    if args.prompt is not None:
        chat.answer(args.prompt)
        return 0
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # arrows and history for input(), and lines longer than a terminal's 4,095 bytes

        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
    print(f"nanochat {meta['tag']} ({meta['origin']}). {HELP}")
    interrupted = False
    while True:
        try:
            text = input("\nYou: ").strip()
            interrupted = False
            if text.lower() in ("quit", "exit", "/quit", "/exit", "/bye"):
                return 0
            chat.take(text)
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:  # drops a half-typed line, or came just after an answer ended
            if interrupted:
                print()
                return 0
            print("\n(Ctrl-C once more leaves, or Ctrl-D)", end="")
            interrupted = True


class Chat:
    """A conversation: what was said so far, and how to continue it."""

    def __init__(self, engine: Engine, args: Arguments) -> None:
        self.engine, self.args, self.tokenizer = engine, args, engine.tokenizer
        self.messages: list[dict[str, Any]] = []
        self.name = "nanochat: " if args.prompt is None else ""
        if os.name == "nt":
            os.system("")  # makes older Windows consoles understand colours
        has_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        dim, self.plain = (DIM, PLAIN) if has_color else ("", "")
        special = self.tokenizer.encode_special
        self.marks = {  # a call of the calculator reads [23+58][= 81]
            special("<|python_start|>"): dim + "[", special("<|python_end|>"): "]" + self.plain,
            special("<|output_start|>"): dim + "[= ", special("<|output_end|>"): "]" + self.plain + " ",
        }  # fmt: skip

    def take(self, text: str) -> None:
        """Process one input line."""
        command = text.lower().removeprefix("/")  # other programs write commands with a slash
        if command == "clear":
            self.messages.clear()
            print("A new conversation.")
        elif command in ("help", "?"):
            print(HELP)
        elif text:
            try:
                self.answer(text)
            except NanochatError as error:  # keep the conversation if a message is too long
                print(error)

    def answer(self, text: str) -> None:
        """Print the model's answer as it arrives, and remember both sides."""
        if self.args.source == "base":  # a base model knows no turns: it continues the text
            self._stream(self.tokenizer.encode(text, prepend="<|bos|>"))
            return
        room = prompt_room(self.engine.model.config.sequence_len, self.args.max_tokens)
        asked = [*self.messages, {"role": "user", "content": text}]
        conversation, dropped = trim_conversation({"messages": asked}, self.tokenizer, room)
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            print(f"(the conversation is long: its oldest {turns} forgotten)")
        parts = self._stream(self.tokenizer.render_for_completion(conversation))
        self.messages = [*conversation["messages"], {"role": "assistant", "content": parts}]

    def _stream(self, prompt: list[int]) -> list[dict[str, str]]:
        """Continue a prompt, printing whole characters; returns the parts of the answer."""
        args = self.args
        params = SamplingParams(args.temperature, args.top_k, seed=args.seed, max_tokens=args.max_tokens)
        sequence = Sequence(prompt, params)
        name = self.name  # shown with the first token, so that an earlier error does not follow the name
        shown = 0
        try:
            for _ in self.engine.steps([sequence]):
                for token, (text, _) in zip(sequence.tokens[shown:], sequence.pieces[shown:], strict=False):
                    # A piece comes before a mark: it is what is left of the part that the mark ends.
                    print(name + text.translate(CONTROLS) + self.marks.get(token, ""), end="", flush=True)
                    name = ""
                shown = len(sequence.tokens)
        except KeyboardInterrupt:
            print(" (stopped)" + self.plain, flush=True)
            if args.prompt is not None:
                raise
        else:
            rest, part = sequence.pieces[-1]
            print(name + rest.translate(CONTROLS) + (self.plain if part != "text" else ""), flush=True)
        return joined_parts(sequence.pieces)


if __name__ == "__main__":
    sys.exit(run_command(main))

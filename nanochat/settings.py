"""The flags of a command, on its command line and in a TOML file. scripts/ and nanochat/ parse with this.

`--config FILE` takes any flag by its long name, with _ or -: `depth = 12`, `no_compile = true`, `set = ["bigrams=8"]`.
Tables are only headings: they group keys, and their names mean nothing. The command line overrides the file, except that it
cannot switch off a flag without a value. Training saves its settings in this form (`config.toml` in its stage's folder), so
that it can be repeated.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tomli_w

from nanochat.common import NanochatError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_FILE = "config.toml"
NOT_IN_FILES = ("help", "config", "debug")
# Flags of the public nanochat that take another form here: what to do instead, where the nearest name would be wrong.
_DTYPE, _MIXTURE = "for another precision, set NANOCHAT_DTYPE=bfloat16", "write --tasks 'SmolTalk,MMLU*3,GSM8K*4'"
_AFTERWARDS, _BETAS = "measure with scripts.chat_eval afterwards", "base_train has --set 'adam_betas=(0.8, 0.95)'"
ELSEWHERE = {
    "warmup-ratio": "give --warmup-steps, a number of updates",
    "d": _DTYPE, "dtype": _DTYPE,
    "mmlu-epochs": _MIXTURE, "gsm8k-epochs": _MIXTURE,
    "chatcore-every": _AFTERWARDS, "chatcore-max-cat": _AFTERWARDS, "chatcore-max-sample": _AFTERWARDS,
    "adam-beta1": _BETAS, "adam-beta2": _BETAS,
    "fp8-recipe": "leave it out, since --fp8 has one scale for each tensor",
}  # fmt: skip
# By the type of a flag:
METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}
WANTED: dict[Any, str] = {int: "a whole number", float: "a number"}
EXAMPLES: dict[Any, Any] = {int: 12, float: 0.5}


class Arguments(argparse.Namespace):
    """The settings of a command, from flags and file together. `vars` gives only the values."""

    __slots__ = ("_parser", "defaults", "given", "typed")
    _parser: SettingsParser
    # By the names that `vars` has: each flag's default, the flags that were given at all, and those given on the command line.
    defaults: dict[str, Any]
    given: set[str]
    typed: set[str]

    def require_positive(self, *names: str) -> None:
        """Raise NanochatError if one of these numbers (named as in `vars`) is below 1; None passes."""
        for name in names:
            if (value := getattr(self, name)) is not None and value < 1:
                raise NanochatError(f"{flag_of(name)} {value} is too small: choose 1 or more")

    def require_some(self, *names: str) -> None:
        """Raise NanochatError if one of these counts, which may be -1, is 0."""
        for name in names:
            if getattr(self, name) == 0:
                raise NanochatError(f"{flag_of(name)} 0 asks for nothing: choose 1 or more, or leave it out")

    def typed_of(self, names: Iterable[str]) -> str:
        """The flags among these that the command line gives, to name them in a message; "" if there are none."""
        return " and ".join(flag_of(name) for name in names if name in self.typed)

    def forget(self, *names: str) -> None:
        """Treat these flags as not given."""
        for name in names:
            setattr(self, name, self.defaults[name])
            self.given.discard(name)

    def leave_open(self, *names: str) -> None:
        """For these numbers, 0 or less means not given: they become their defaults."""
        self.forget(*(name for name in names if getattr(self, name) <= 0))

    def prefer_typed(self, *names: str) -> None:
        """Of these numbers, of which one decides: forget the file's where the command line gives another one above 0."""
        if any(name in self.typed and getattr(self, name) > 0 for name in names):
            self.forget(*set(names) - self.typed)

    def adopt(self, values: dict[str, Any]) -> None:
        """Take from `values`, settings of a run, those flags that were not given."""
        paths = {action.dest for action in self._parser._actions if action.type is Path}
        for name in values.keys() - self.given:
            setattr(self, name, Path(values[name]) if name in paths and values[name] is not None else values[name])

    def require_between(self, low: float, high: float, *names: str) -> None:
        """Raise NanochatError if one of these numbers is not within low to high (math.inf: no upper limit)."""
        for name in names:
            if not low <= (value := getattr(self, name)) <= high:
                limits = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
                raise NanochatError(f"{flag_of(name)} {value:g} is out of range: choose {limits}")

    def to_toml(self, values: dict[str, Any], leave_out: Sequence[str] = ()) -> str:
        """A file for --config that gives the command these values (named as in `vars`), grouped as in --help."""
        tables: dict[str, dict[str, Any]] = {}
        for group in self._parser._action_groups:
            table = {}
            for action in group._group_actions:
                value = values.get(action.dest)
                name = _long_name(action)
                if name is None or value is None or name in NOT_IN_FILES or action.dest in leave_out:
                    continue
                if action.nargs == 0:
                    value = value == action.const
                table[name.replace("-", "_")] = str(value) if isinstance(value, Path) else value
            if table:
                tables[(group.title or "").partition(" (")[0]] = table
        return f"# {self._parser.prog} --config THIS_FILE\n\n" + tomli_w.dumps(tables)


class SettingsParser(argparse.ArgumentParser):
    """An ArgumentParser whose flags may also come from a file, with grouped help and one-sentence errors.

    examples: command lines for the end of the help; %(prog)s stands for the command.
    """

    def __init__(self, description: str, examples: Iterable[str] = ()) -> None:
        lines = "".join(f"\n  {example}" for example in examples)
        super().__init__(
            prog=_program(), description=description, epilog=lines and f"examples:{lines}", formatter_class=HelpFormatter,
            add_help=False,
        )  # fmt: skip
        for kind in (int, float):
            self.register("type", kind, functools.partial(_number, kind))
        common = self._common = self.add_argument_group("every command")
        common.add_argument("-h", "--help", action="help", help="show this")
        common.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS,
                            help="TOML file of flags by their long names; the command line overrides it")  # fmt: skip
        common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the trace of an error")

    def parse_args(self, args: Sequence[str] | None = None) -> Arguments:  # type: ignore[override] # no namespace but ours
        """The settings from a command line and from the file that it names.

        Raises NanochatError for unknown settings in the file; exits with code 2 for unknown flags.
        """
        args = self._with_dashes(sys.argv[1:] if args is None else args)
        finder = argparse.ArgumentParser(add_help=False)
        finder.error = self.error  # type: ignore[method-assign] # errors are reported by this parser
        finder.add_argument("--config")
        file = finder.parse_known_args(args)[0].config
        in_file = self._read(Path(os.path.expanduser(file))) if file is not None else {}
        for action in in_file:
            action.required = False
        defaults = {action.dest: action.default for action in self._actions if action.default is not argparse.SUPPRESS}
        not_given: list[Any] = []  # this very object; a flag that may be repeated adds to a copy of it
        arguments, unknown = self.parse_known_args(args, Arguments(**dict.fromkeys(defaults, not_given)))
        if unknown and not unknown[0].startswith("-"):
            self.error(f"{unknown[0]!r} belongs to no flag: quote a value that has spaces or *")
        if unknown:
            self.error(f"there is no {unknown[0]!r} here{_nearest(unknown[0].partition('=')[0], self._option_string_actions)}")
        values = {action.dest: value for action, value in in_file.items()}
        typed = {name: value for name, value in vars(arguments).items() if value is not not_given}
        values |= typed
        arguments = Arguments(**{**defaults, **values})
        arguments._parser, arguments.defaults, arguments.given = self, defaults, values.keys() & defaults
        arguments.typed = typed.keys() & defaults
        for action in self._actions:
            value = getattr(arguments, action.dest, None)
            if action.type is Path and isinstance(value, Path):
                setattr(arguments, action.dest, Path(os.path.expanduser(value)))  # shells do not expand --flag=~
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise NanochatError(f"--{_long_name(action)} {number} is not a finite number: give one")
        for name in ("config", "debug"):
            vars(arguments).pop(name, None)
        return arguments

    def _with_dashes(self, args: Sequence[str]) -> list[str]:
        """The command line with flags such as --max_seq_len, as in the public recipes, written with dashes."""
        if args[:1] == ["--"]:  # what torchrun takes before a script's flags, and a command without it keeps
            args = args[1:]
        flags = list(itertools.takewhile(lambda arg: arg != "--", args))  # after -- there are no flags
        for i, (name, *value) in enumerate(flag.split("=", 1) for flag in flags):
            dashed = name.replace("_", "-")
            if name.startswith("--") and dashed in self._option_string_actions:
                flags[i] = "=".join([dashed, *value])
        return [*flags, *args[len(flags) :]]

    def _read(self, path: Path) -> dict[argparse.Action, Any]:
        """The flags that a file gives, with their values. Raises NanochatError."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
        except OSError as error:
            raise NanochatError(f"--config {path} cannot be read ({error.strerror}): check the path") from error
        except (ValueError, RecursionError) as error:  # also for numbers with thousands of digits, or deep nesting
            raise NanochatError(f"--config {path} is not TOML ({error}): write lines such as depth = 12") from error
        known = {flag: action for action in self._actions if (flag := _long_name(action)) and flag not in NOT_IN_FILES}
        values: dict[argparse.Action, Any] = {}
        for key, value in _flatten(content):
            name = key.replace("_", "-")
            action = known.get(name)
            if action is None:
                nearest = _nearest(name, known)
                raise NanochatError(f"{path}: {self.prog} has no setting {key!r}{nearest or ': --help lists what there is'}")
            if action in values:
                raise NanochatError(f"{path} has {key} more than once, and tables are only headings: leave one")
            values[action] = _convert(action, f"{path}: {key} = {_as_toml(value)}", value)
        return values

    def error(self, message: str) -> NoReturn:
        """Exit with one sentence and code 2."""
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")

    def format_help(self) -> str:
        takes = [(action, self._get_formatter()._format_args(action, action.dest.upper())) for action in self._actions]
        required = [" ".join([*action.option_strings[-1:], what]) for action, what in takes if action.required]
        self.usage = " ".join(["%(prog)s", *required, "[flags]"])
        self._action_groups.sort(key=lambda group: group is self._common)  # the command's own flags come first
        return super().format_help()


def add_device_argument(group: argparse._ActionsContainer) -> None:
    """Add the flag that compute_init reads."""
    group.add_argument("--device-type", default="", metavar="cuda|mps|cpu", help="default: the best one available")


def add_sampling_arguments(group: argparse._ActionsContainer, temperature: float, top_k: int) -> None:
    """Add the flags that say how tokens are drawn, with these defaults."""
    group.add_argument("-t", "--temperature", type=float, default=temperature, help="0: always the likeliest token")
    group.add_argument("-k", "--top-k", type=int, default=top_k, help="sample from the k likeliest tokens (0: from all)")


def flag_of(name: str) -> str:
    """A flag on the command line, from its name in `vars`."""
    return "--" + name.replace("_", "-")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows flags with their values in one column, meanings and defaults in the other."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(action.type, action.dest.upper())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        takes = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {takes}"

    def _get_help_string(self, action: argparse.Action) -> str:
        """The help text with its default, unless that says nothing (off, none) or the text has it already."""
        text = action.help or ""
        says_nothing = action.default in (None, argparse.SUPPRESS, "", -1, []) or isinstance(action.default, bool)
        if says_nothing or "default:" in text:
            return text
        default = f"{action.default:,}" if isinstance(action.default, int) and action.default >= 10**6 else "%(default)s"
        if text.endswith(")"):
            return f"{text[:-1]}; default: {default})"
        return f"{text} (default: {default})"


def _number(kind: type, text: str) -> Any:
    """A number of this type from the command line. Raises ArgumentTypeError."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {WANTED[kind]}, such as {EXAMPLES[kind]}") from None


def _program() -> str | None:
    """How this command was called; None if only the name of the file is known."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None or spec.name == "nanochat.cli" else f"python -m {spec.name}"


def _long_name(action: argparse.Action) -> str | None:
    """The flag's name in a file; None if it has no long form."""
    return next((flag[2:] for flag in action.option_strings if flag.startswith("--")), None)


def _flatten(table: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value)
        else:
            yield key, value


def _nearest(name: str, known: Iterable[str]) -> str:
    if instead := ELSEWHERE.get(name.lstrip("-").replace("_", "-")):
        return f": {instead}"
    nearest = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _as_toml(value: Any) -> str:
    if isinstance(value, list):  # on one line
        return f"[{', '.join(map(_as_toml, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def _convert(action: argparse.Action, what: str, value: Any) -> Any:
    """A value from a file, as the command line would give it. Raises NanochatError, beginning with `what`."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise NanochatError(f"{what} is neither true nor false: choose one")
        return action.const if value else action.default
    if isinstance(action, argparse._AppendAction) or action.nargs == "+":
        if not isinstance(value, list):
            raise NanochatError(f"{what} is not a list: put it into [ ]")
        return [_convert_one(action, what, item) for item in value]
    return _convert_one(action, what, value)


def _convert_one(action: argparse.Action, what: str, value: Any) -> Any:
    wanted = WANTED.get(action.type, "text")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted == "text":
        fits = isinstance(value, str) or is_number  # a flag that takes text may be given a number, such as a step
    else:
        fits = is_number and (action.type is float or isinstance(value, int))
    if not fits:
        raise NanochatError(f"{what} is not {wanted}: write it like {_example(action)}")
    try:
        value = action.type(value if wanted != "text" else str(value)) if callable(action.type) else str(value)
    except (ValueError, TypeError, OverflowError, argparse.ArgumentTypeError) as error:
        raise NanochatError(f"{what} does not suit --{_long_name(action)} ({error}): see --help") from error
    if action.choices is not None and value not in action.choices:
        raise NanochatError(f"{what} is not among the choices: take one of {', '.join(map(str, action.choices))}")
    return value


def _example(action: argparse.Action) -> str:
    name = f"{_long_name(action)}".replace("-", "_")
    return f"{name} = {_as_toml(EXAMPLES.get(action.type, 'text'))}"

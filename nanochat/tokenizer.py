"""Text to token ids and back; conversations to ids and a loss mask. Trained with rustbpe, run with tiktoken.

A tokenizer is one file, tokenizer.json: the split pattern, the special tokens and the tokens in order of rank.
"""

from __future__ import annotations

import base64
import codecs
import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np
import tiktoken

from nanochat.common import NanochatError, get_base_dir
from nanochat.files import atomic_write
from nanochat.runs import get_run_dir

SPECIAL_TOKENS = [
    "<|bos|>",  # opens every document and every row
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator ...
    "<|python_end|>",
    "<|output_start|>",  # ... and gets what it printed
    "<|output_end|>",
]
# Words with one leading mark or space, at most two digits at a time (a small vocabulary has no room for a thousand numbers),
# runs of punctuation, and white space, whose last character goes to the word that follows.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
LONG_BLANK = 100_000  # characters; the pattern can match ten times as many at once
MOST_TOKENS = 1 << 24  # the largest vocabulary
PROBE = "Some text, 2 \u00e9\u6f22\n\n  !"  # characters of every kind that a pattern should match
FORMAT_VERSION = 1
FILE_NAME = "tokenizer.json"
PART_MARKERS = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


class Tokenizer:
    """A trained byte-pair encoding with nanochat's special tokens behind the ordinary ones."""

    def __init__(self, tokens: list[bytes], pattern: str = SPLIT_PATTERN) -> None:
        """tokens: the ordinary tokens in order of rank. Raises ValueError unless these and the pattern encode any text."""
        if missing := {bytes([value]) for value in range(256)}.difference(tokens):  # encoding such a byte would panic
            raise ValueError(f"it lacks the token of the byte 0x{min(missing).hex()}")
        if len(set(tokens)) < len(tokens):
            raise ValueError("it has a token twice")
        self.tokens, self.pattern = tokens, pattern
        self.special_ids = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "nanochat",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens=self.special_ids,
        )
        if not self._keeps_text():
            raise ValueError(f"its pattern {pattern[:100]!r} does not match all of a text")

    def _keeps_text(self) -> bool:
        try:
            return bool(self.pattern) and self.decode(self.encode(PROBE)) == PROBE
        except BaseException as error:  # a Rust panic (at a pattern with empty matches) is not an Exception
            if type(error).__name__ != "PanicException":
                raise
            return False

    # ------------------------------------------------------------------------- making, saving, loading

    @classmethod
    def train(cls, text_iterator: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` tokens, the special ones included, from texts.

        A short text gives fewer: as many as there are pairs to merge. Raises NanochatError if the size is too small for
        the 256 bytes, or above MOST_TOKENS.
        """
        import rustbpe

        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise NanochatError(f"--vocab-size {vocab_size} is too small: choose {smallest} or more")
        if vocab_size > MOST_TOKENS:
            raise NanochatError(f"--vocab-size {vocab_size} is too large: choose {MOST_TOKENS} or less")
        logging.getLogger("rustbpe").setLevel(logging.WARNING)  # it reports every percent
        trainer = rustbpe.Tokenizer()
        pieces = itertools.chain.from_iterable(map(cut_long_blanks, text_iterator))
        trainer.train_from_iterator(pieces, vocab_size - len(SPECIAL_TOKENS), pattern=pattern)
        tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])]
        return cls(tokens, pattern)

    def save(self, directory: Path | str) -> Path:
        """Write tokenizer.json into a directory and return its path."""
        content = {
            "version": FORMAT_VERSION,
            "pattern": self.pattern,
            "special_tokens": SPECIAL_TOKENS,
            "tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens],
        }
        path = Path(directory) / FILE_NAME
        atomic_write(path, json.dumps(content))
        return path

    @classmethod
    def load(cls, path: Path | str, way_out: str = "train one with python -m scripts.tok_train") -> Tokenizer:
        """Read a tokenizer from its file or the directory that holds it. Raises NanochatError if that is not possible."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise NanochatError(f"no tokenizer at {path}: {way_out}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] > FORMAT_VERSION or content["special_tokens"] != SPECIAL_TOKENS:
                raise ValueError("another version of the format")
            tokens = [base64.b64decode(token, validate=True) for token in content["tokens"]]
            return cls(tokens, content["pattern"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # the last: deep nesting
            raise NanochatError(f"{path} is not a nanochat tokenizer ({error}): {way_out}") from error

    @functools.cache  # noqa: B019 - tokenizers live as long as the process
    def fingerprint(self) -> str:
        """A hash of everything that decides the encoding; a checkpoint records it to recognize its tokenizer."""
        digest = hashlib.sha256(json.dumps([self.pattern, SPECIAL_TOKENS]).encode("utf-8"))
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    # ------------------------------------------------------------------------- text

    @overload
    def encode(self, text: str, prepend: int | str | None = ..., append: int | str | None = ...) -> list[int]: ...
    @overload
    def encode(
        self, text: list[str], prepend: int | str | None = ..., append: int | str | None = ..., num_threads: int = ...
    ) -> list[list[int]]: ...
    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or of each of a list of texts in parallel. Text that spells a special token is ordinary text.

        prepend, append: a special token, by id or by name, to put around each text.
        """
        if isinstance(text, str):
            rows = [self._encode(text)]
        elif isinstance(text, list):
            with ThreadPoolExecutor(num_threads) as pool:
                rows = list(pool.map(self._encode, text))
        else:
            raise TypeError(f"encode takes a str or a list of str, not {type(text).__name__}")
        if prepend is not None:
            first = self._as_id(prepend)
            for row in rows:
                row.insert(0, first)
        if append is not None:
            last = self._as_id(append)
            for row in rows:
                row.append(last)
        return rows[0] if isinstance(text, str) else rows

    __call__ = encode

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens spelled out; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))

    def encode_arrays(self, texts: list[str], num_threads: int = 2) -> list[np.ndarray]:
        """The ids of each text as (n,) int32: the same as `encode`, without the detour through Python ints."""
        size = -(-len(texts) // num_threads)
        parts = [texts[i : i + size] for i in range(0, len(texts), size)] if texts else []
        with ThreadPoolExecutor(num_threads) as pool:
            return [row for rows in pool.map(lambda part: [self._encode_array(text) for text in part], parts) for row in rows]

    def _encode(self, text: str) -> list[int]:
        return encode_ordinary(self._encoding, text)

    def _encode_array(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).view(np.int32)
        except ValueError:  # a lone surrogate, or see encode_ordinary
            return np.asarray(self._encode(text), dtype=np.int32)

    def encode_special(self, name: str) -> int:
        """The id of a special token. Raises KeyError."""
        return self.special_ids[name]

    def _as_id(self, token: int | str) -> int:
        return token if isinstance(token, int) else self.encode_special(token)

    def is_special(self, token_id: int) -> bool:
        return len(self.tokens) <= token_id < self.get_vocab_size()

    def id_to_token(self, token_id: int) -> str:
        return self.decode([token_id])

    def get_bos_token_id(self) -> int:
        return self.special_ids["<|bos|>"]

    def get_vocab_size(self) -> int:
        return len(self.tokens) + len(SPECIAL_TOKENS)

    def get_token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: the number of bytes of each token; 0 for special tokens, which stand for no text."""
        return np.array([len(token) for token in self.tokens] + [0] * len(SPECIAL_TOKENS), dtype=np.int32)

    # ------------------------------------------------------------------------- conversations

    def render_conversation(self, conversation: dict[str, Any], max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """(ids, mask) of a conversation, cut to max_tokens.

        The mask is 1 on what the model learns to say: the assistant's text, its calls of the calculator with their
        markers, and <|assistant_end|>; 0 on the user's text, on tool output and on <|assistant_start|>.
        Raises NanochatError if the messages are not a conversation.
        """
        ids, mask = [self.get_bos_token_id()], [0]

        def add(tokens: list[int], supervised: int) -> None:
            ids.extend(tokens)
            mask.extend([supervised] * len(tokens))

        for message in _turns(conversation):
            if message["role"] == "user":
                text = self.encode(as_text(message["content"]))
                add([self.special_ids["<|user_start|>"], *text, self.special_ids["<|user_end|>"]], 0)
                continue
            add([self.special_ids["<|assistant_start|>"]], 0)
            for part in as_parts(message["content"]):
                supervised = 0 if part["type"] == "python_output" else 1
                markers = [[self.special_ids[name]] for name in PART_MARKERS.get(part["type"], ())] or [[], []]
                add([*markers[0], *self.encode(part["text"]), *markers[1]], supervised)
            add([self.special_ids["<|assistant_end|>"]], 1)
            if len(ids) > max_tokens:
                break
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict[str, Any]) -> list[int]:
        """Ids for the assistant to continue: the conversation without a final answer, then <|assistant_start|>."""
        messages = list(conversation["messages"])
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        ids, _ = self.render_conversation({"messages": messages}, max_tokens=1 << 30)
        return [*ids, self.special_ids["<|assistant_start|>"]]

    def part_starts(self) -> dict[int, str]:
        """The type of each part of a message, by the special token that begins it."""
        return {self.special_ids[markers[0]]: kind for kind, markers in PART_MARKERS.items()}

    def visualize_tokenization(self, ids: list[int], mask: list[int], with_token_id: bool = False) -> str:
        """The tokens for a terminal, supervised ones in green and the others in red."""
        pieces = []
        for token_id, supervised in zip(ids, mask, strict=True):
            color = "\x1b[32m" if supervised else "\x1b[31m"
            label = self.id_to_token(token_id) + (f"\x1b[90m({token_id})" if with_token_id else "")
            pieces.append(f"{color}{label}\x1b[0m")
        return "|".join(pieces)


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages, if they are those of a conversation: user and assistant in turn, after a system message if there is one.

    Raises NanochatError with a sentence that still needs its subject, the conversation.
    """
    if not isinstance(messages, list) or not messages:
        raise NanochatError('is not a list of messages such as {"role": "user", "content": "Hi"}')
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str | list) or "role" not in message:
            raise NanochatError(f"has message {i} without role and content")
        try:
            as_parts(message["content"])
        except NanochatError as error:
            raise NanochatError(f"is damaged in message {i} ({error})") from error
    first = int(messages[0]["role"] == "system")
    if len(messages) == first:
        raise NanochatError("has only a system message")
    for i, message in enumerate(messages[first:]):
        expected = "assistant" if i % 2 else "user"
        if message["role"] != expected:
            raise NanochatError(f"is out of turn: message {first + i + 1} is from {message['role']!r}, not {expected!r}")
    return messages


def _turns(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of user and assistant; a system message becomes the beginning of the first one."""
    try:
        messages = check_messages(conversation.get("messages") if isinstance(conversation, dict) else None)
    except NanochatError as error:
        raise NanochatError(f"a conversation {error}") from error
    if messages[0]["role"] != "system":
        return messages
    text = f"{as_text(messages[0]['content'])}\n\n{as_text(messages[1]['content'])}"
    return [{"role": "user", "content": text}, *messages[2:]]


def encode_ordinary(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """The ids of a text in which special tokens are ordinary text, in any encoding of tiktoken's."""
    try:  # not its encode_ordinary, which panics instead of raising
        return encoding.encode(text, disallowed_special=())
    except ValueError:  # the pattern exhausts the stack on very long white space
        pieces = cut_long_blanks(text)
        if len(pieces) == 1:
            raise
        return [token for piece in pieces for token in encode_ordinary(encoding, piece)]


def cut_long_blanks(text: str) -> list[str]:
    """The text, cut within any white space longer than LONG_BLANK characters."""
    if len(text) <= LONG_BLANK:
        return [text]
    ends = (match.end() for match in re.finditer(rf"\s{{2,{LONG_BLANK}}}", text) if match.end() - match.start() == LONG_BLANK)
    cuts = [end for end in ends if text[end : end + 1].isspace()]
    return [text[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(text)])]


def as_parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """The content of a message as a list of parts. Raises NanochatError for a part that is not valid."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        known = isinstance(part, dict) and part.get("type") in ("text", *PART_MARKERS)
        if not known or not isinstance(part.get("text"), str):
            raise NanochatError(f"a part of a message must be text, python or python_output with a text, not {part!r}")
    return parts


def as_text(content: str | list[dict[str, str]]) -> str:
    """The text of all parts of a message's content. Raises NanochatError as `as_parts` does."""
    return "".join(part["text"] for part in as_parts(content))


class IncrementalDecoder:
    """Turns a stream of ids into whole characters: the bytes of a character split over tokens wait for the rest.

    `part` is the type of the part that the last token is in: "text", "python" or "python_output".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._kinds = tokenizer.part_starts()
        self.part = "text"

    def feed(self, token_id: int) -> str:
        """The characters that this token completes; one that begins another part returns what the previous part still held.

        Special tokens themselves are never shown.
        """
        if self._tokenizer.is_special(token_id):
            before, self.part = self.part, self._kinds.get(token_id, "text")
            return "" if self.part == before else self.flush()
        return self._decoder.decode(self._tokenizer.tokens[token_id])

    def flush(self) -> str:
        """What is left at the end of a part: U+FFFD if a character is incomplete."""
        return self._decoder.decode(b"", final=True)


def get_tokenizer_dir(name_or_path: str = "default") -> Path:
    """The directory of a tokenizer: a name below <base>/tokenizers, or a path.

    A name means a path only if no tokenizer has that name and the path holds one. "default" is never a path.
    Raises NanochatError for an empty name, which a variable that is not set leaves behind.
    """
    if not name_or_path.strip():
        raise NanochatError("--tokenizer is empty: give a name or a path, or leave it out")
    path = Path(os.path.expanduser(name_or_path))  # like a shell, leaves ~NOBODY as it is
    if len(path.parts) > 1 or {"/", os.sep} & {*name_or_path} or name_or_path in (".", ".."):
        return path
    named = get_base_dir() / "tokenizers" / name_or_path
    is_here = path.is_file() or (path / FILE_NAME).is_file()
    return path if is_here and name_or_path != "default" and not (named / FILE_NAME).exists() else named


def name_or_absolute_path(name_or_path: str) -> str:
    """A tokenizer's name as it is, a path made absolute: the next command may be given in another folder."""
    directory = get_tokenizer_dir(name_or_path)
    return name_or_path if directory == get_base_dir() / "tokenizers" / name_or_path else str(directory.absolute())


def get_tokenizer(name_or_path: str = "default") -> Tokenizer:
    return Tokenizer.load(get_tokenizer_dir(name_or_path))


def get_run_tokenizer(tag: str) -> Tokenizer:
    """The copy that a run keeps, since the one it was begun with may have been trained again."""
    return Tokenizer.load(get_run_dir(tag), "put it back, since no other fits the weights of this run")

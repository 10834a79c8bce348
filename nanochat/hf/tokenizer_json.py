"""Converts our tokenizer to and from the tokenizer.json of the `tokenizers` library. Used by export.py and load.py.

Both are byte-pair encodings. tiktoken merges the pair that makes the lowest-ranked token; `tokenizers` needs a list of
pairs, so we list all splits of a token into two others, in the order of the tokens that they make. It writes bytes as
printable characters, as GPT-2's vocabulary did.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanochat.common import NanochatError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

GUARD = "\ufdd0"  # a noncharacter, in chat_template.jinja: before "|", it keeps what spells a special token from being one
NORMALIZER = {"type": "Replace", "pattern": {"String": GUARD + "|"}, "content": "|"}


def _byte_characters() -> list[str]:
    """For each byte the character that stands for it: itself if it is printable in Latin-1, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


CHARACTERS = _byte_characters()
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


def to_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json. It puts <|bos|> first, unless it is told to add no special tokens."""
    spelled = ["".join(CHARACTERS[byte] for byte in token) for token in tokenizer.tokens]
    vocabulary = {token: rank for rank, token in enumerate(spelled)}
    merges = []
    for token in spelled:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
        merges += sorted(splits, key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in tokenizer.special_ids.items()],
        "normalizer": NORMALIZER,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [tokenizer.get_bos_token_id()], "tokens": ["<|bos|>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken too takes a whole word if it is a token, however it came about
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def from_tokenizer_json(path: Path) -> Tokenizer:
    """Our tokenizer from a tokenizer.json of ours or of a like kind. Raises NanochatError if it is of another kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, added = content["model"], {token["content"]: token["id"] for token in content["added_tokens"]}
        if model["type"] != "BPE" or model.get("byte_fallback"):
            raise ValueError(f"its model is {model['type']}, not a byte-level BPE")
        by_id = {i: token for token, i in model["vocab"].items() if token not in added}
        if sorted(by_id) != list(range(len(by_id))):
            raise ValueError("its ordinary tokens are not numbered from 0 on")
        if added != {name: len(by_id) + i for i, name in enumerate(SPECIAL_TOKENS)}:
            raise ValueError(f"its special tokens are not {' '.join(SPECIAL_TOKENS)}, behind the ordinary ones")
        tokens = [bytes(BYTES[character] for character in by_id[i]) for i in range(len(by_id))]
        _check_merges(model["merges"], model["vocab"])
        if content.get("normalizer") not in (None, NORMALIZER):
            raise ValueError("it changes text before it splits it (its normalizer)")
        return Tokenizer(tokens, _split_pattern(content["pre_tokenizer"]))
    except OSError as error:
        raise NanochatError(f"{path} cannot be read ({error.strerror}): a model needs its tokenizer.json") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise NanochatError(f"{path} is no tokenizer that nanochat can use: {reason}") from error


def _check_merges(merges: list[Any], vocabulary: dict[str, int]) -> None:
    """Raise ValueError if the order of the merges is not that of the tokens they make, by which tiktoken merges."""
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in merges)
    made = [vocabulary[first + second] for first, second in pairs]
    if made != sorted(made):
        raise ValueError("its merges are in another order than its tokens")


def _split_pattern(pre_tokenizer: dict[str, Any]) -> str:
    """The pattern of a Split before ByteLevel. Raises ValueError or KeyError if text is split in another way."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"] or steps[1]["add_prefix_space"] or steps[1]["use_regex"]:
        raise ValueError("it does not split text by one pattern and then into bytes")
    if steps[0]["behavior"] != "Isolated" or steps[0]["invert"]:
        raise ValueError("its pattern is for what lies between the pieces")
    return steps[0]["pattern"]["Regex"]

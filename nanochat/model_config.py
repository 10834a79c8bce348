"""Reads the shape of a model from a file, which may be damaged or written by another version.

Used by checkpoint_manager.py, stage.py, report.py and scripts/chat_sft.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nanochat.common import NanochatError
from nanochat.gpt import GPTConfig

# By annotation in GPTConfig: (accepted types, how to describe them).
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number above 0"),
    "float": ((int, float), "a number above 0"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
}
MOST = 1 << 31  # every number must be below this


def read_config(content: Any) -> GPTConfig:
    """The GPTConfig stored as a JSON object. Raises NanochatError if this version cannot compute such a model."""
    if not isinstance(content, dict):
        raise NanochatError("the model does not say what it is like (model_config): restore its file, or use another model")
    fields = {field.name: field for field in dataclasses.fields(GPTConfig)}
    if unknown := sorted(set(content) - set(fields)):
        raise NanochatError(f"the model is of another version: its model_config has {', '.join(unknown)}; update nanochat")
    for name, value in content.items():
        types, wanted = KINDS.get(fields[name].type, ((type(value),), "a value"))
        if value == fields[name].default and type(value) in types:
            continue  # a switch may be off at 0
        if type(value) not in types or (wanted.endswith("above 0") and not 0 < value < MOST):
            raise NanochatError(
                f"model_config says {name} {str(value)[:50]!r}, which is not {wanted}: restore the file, or use another "
                "model (for a new one, change --set)"
            )
    return GPTConfig(**content)

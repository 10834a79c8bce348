"""Reads models in Hugging Face's format, above all our own exports. Used by the scripts' --from-hf.

Nothing from them is executed: only weights, JSON and the text of the chat template are read.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nanochat.checkpoint_manager import build_model, load_checkpoint, lock_stage, read_meta, save_checkpoint
from nanochat.common import NanochatError, first_line, print0
from nanochat.files import read_json_object
from nanochat.gpt import GPT
from nanochat.hf import TEMPLATE_FILE, read_resource
from nanochat.hf.tokenizer_json import from_tokenizer_json
from nanochat.hf.weights import CUSTOM_TYPE, NATIVE_TYPE, from_custom, from_native
from nanochat.runs import get_run_dir, get_stage_dir, heirs, list_steps
from nanochat.tokenizer import Tokenizer

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
ROWS_IN_A_BATCH = 32  # for fine-tuning, unless --total-batch-size says otherwise


def load_hf(name: str, device: torch.device | str) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """(model, tokenizer, meta) from a directory or a hub repository, as checkpoint_manager.load_model returns them.

    Raises NanochatError, one sentence, if there is no model that nanochat can compute.
    """
    directory = find_directory(name)
    content = _read_config(directory, name)
    tokenizer = from_tokenizer_json(directory / "tokenizer.json")
    check_chat_template(directory)
    size = tokenizer.get_vocab_size()
    if content.get("vocab_size", size) < size:
        raise NanochatError(
            f"{name} has {content['vocab_size']} rows for a vocabulary of {size}: its files do not belong together"
        )
    content["vocab_size"] = size  # further rows are padding
    try:
        weights = _read_weights(directory)
        if (layers := content["num_hidden_layers"]) > len(weights):  # a billion of them would take long to make
            raise NanochatError(f"{name} has {layers} layers in config.json, but {len(weights)} tensors: export it again")
        convert = from_custom if content["model_type"] == CUSTOM_TYPE else from_native
        try:
            config, state = convert(content, weights)
        except NanochatError as error:
            raise NanochatError(f"{name}: {error}") from error
    except KeyError as error:
        raise NanochatError(f"{name} is incomplete: it has no {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise NanochatError(f"{name} is damaged ({first_line(error)}): fetch or export the model again") from error
    model = build_model(config, {key: tensor.float() for key, tensor in state.items()}, device)
    model.eval()
    tag = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name.rstrip("/\\")).resolve().name if Path(name).is_dir() else name)
    return model, tokenizer, {"tag": tag.strip("-._") or "model", "step": 0, "model_config": asdict(config)}


def find_directory(name: str) -> Path:
    """The directory of that name, or that of a hub repository, which is downloaded."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise NanochatError(f"--from-hf {name}: there is no such directory, and the hub's names look like user/model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as error:  # also for names that it does not allow, and when the network fails in mid-way
        reason = " ".join(str(error).split())[:200]
        raise NanochatError(f"--from-hf {name}: neither a directory nor available from the hub ({reason})") from error


def _read_config(directory: Path, name: str) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise NanochatError(f"--from-hf {name} is not a model: it has no config.json")
    content = read_json_object(path)
    if content.get("model_type") not in (CUSTOM_TYPE, NATIVE_TYPE):
        raise NanochatError(
            f"--from-hf {name} is a model of type {content.get('model_type')!r}: nanochat computes {CUSTOM_TYPE} and "
            f"{NATIVE_TYPE}"
        )
    for key in SIZES:
        value = content.get(key, 1)  # missing keys are reported where they are needed
        if type(value) is not int or value < 1:
            raise NanochatError(f"{path} has {key} {value!r}, not a whole number above 0: fetch or export the model again")
    return content


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    index = directory / "model.safetensors.index.json"
    names = sorted(set(read_json_object(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    state: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            state |= load_file(directory / name)
        except (OSError, SafetensorError) as error:
            raise NanochatError(f"{directory / name} cannot be read ({error}): fetch or export the model again") from error
    return state


# ----------------------------------------------------------------------------- chat template


def check_chat_template(directory: Path) -> None:
    """Report if the model's chat template differs from nanochat's. Templates are programs, so it is compared as text."""
    path = directory / TEMPLATE_FILE
    if path.is_file():
        template: Any = path.read_text(encoding="utf-8", errors="replace")
    else:
        path = directory / "tokenizer_config.json"
        template = read_json_object(path).get("chat_template") if path.is_file() else None
    if not isinstance(template, str):  # a base model may have none, and others several
        return
    if template.split() != read_resource("templates", TEMPLATE_FILE).split():
        print0(f"note: the chat template in {path} differs from nanochat's, which is used instead")


# ----------------------------------------------------------------------------- as a run


def import_run(name: str, tag: str | None) -> str:
    """Import a model as the base of a run, so that it can be fine-tuned; returns the run's tag. For one rank.

    A run made earlier from the same model is used again. Raises NanochatError if the tag belongs to another model, or to later
    stages whose base model is gone.
    """
    model, tokenizer, meta = load_hf(name, "cpu")
    tag, state = tag or meta["tag"], model.state_dict()
    stage_dir = get_stage_dir(tag, "base")
    with lock_stage(stage_dir):
        if steps := list_steps(stage_dir):
            old = load_checkpoint(stage_dir, steps[-1])[0] if "imported" in read_meta(stage_dir, steps[-1]) else {}
            if old.keys() != state.keys() or any(not torch.equal(old[key], state[key]) for key in old):
                raise NanochatError(f"run {tag!r} already has a base model, another than {name}: choose another --model-tag")
            return tag
        for later in (get_stage_dir(tag, stage) for stage in heirs(tag)):
            if read_meta(later, list_steps(later)[-1]).get("tokenizer") != tokenizer.fingerprint():
                raise NanochatError(
                    f"run {tag!r} has {later.name} checkpoints, whose tokenizer that of {name} would replace: choose another "
                    "--model-tag, or leave out --from-hf to go on with them"
                )
        tokenizer.save(get_run_dir(tag))
        about = {
            "model_config": meta["model_config"],
            "tokenizer": tokenizer.fingerprint(),
            "settings": {"total_batch_size": ROWS_IN_A_BATCH * model.config.sequence_len},
            "imported": {"from": name},
        }
        save_checkpoint(stage_dir, 0, state, None, about)
    return tag

"""Writes a checkpoint as a directory that Hugging Face's libraries load, and uploads it to their hub. Used by
scripts/export_hf.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import read_meta, save_tensors
from nanochat.common import NanochatError
from nanochat.eval_results import read_eval
from nanochat.files import read_json, replace_directory, share_mode
from nanochat.gpt import GPT
from nanochat.hf import TEMPLATE_FILE, read_resource
from nanochat.hf.tokenizer_json import to_tokenizer_json
from nanochat.hf.weights import native_obstacles, to_custom, to_native
from nanochat.metrics import METRICS_FILE, read_metrics, series
from nanochat.report import evaluation_table, fill, settings_table
from nanochat.runs import SETTINGS_FILE, STAGE_TITLES, get_stage_dir, list_steps
from nanochat.scores import core_label, describe_mean
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

FORMATS = ("auto", "nanochat", "custom")
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
CODE_FILES = ("configuration_nanochat.py", "modeling_nanochat.py")
OTHER_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md")
OUR_FILES = {WEIGHTS_FILE, CONFIG_FILE, TEMPLATE_FILE, *CODE_FILES, *OTHER_FILES}
ORIGIN_KEY = "nanochat_export"  # in config.json: which run, stage and step; also what tells an export of ours


def export(
    model: GPT, tokenizer: Tokenizer, meta: dict[str, Any], output: Path, form: str = "auto", repo: str | None = None
) -> str:
    """Write a model (from checkpoint_manager.load_model) into the directory `output`; returns its format.

    form: one of FORMATS; repo: the name on the hub for the model card. `output` appears as a whole or not at all.
    Raises NanochatError if the form cannot express the model or `output` is not one that `check_output` allows.
    """
    check_output(output)
    output = output.resolve()  # its own name, not that of a link or ".."
    if form == "auto":
        form = "custom" if native_obstacles(model) else "nanochat"
    config, state = (to_custom if form == "custom" else to_native)(model)
    special = tokenizer.special_ids
    ids = {
        "bos_token_id": special["<|bos|>"],
        "pad_token_id": special["<|bos|>"],
        "eos_token_id": special["<|assistant_end|>"],
    }
    origin = {"tag": meta["tag"], "stage": meta["stage"], "step": meta["step"], "weights": meta["weights"]}
    ends = [special["<|assistant_end|>"], special["<|bos|>"]]  # of an answer, of a document
    temporary = output.parent / f".{output.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_json(temporary / CONFIG_FILE, {**config, **ids, ORIGIN_KEY: origin})
        _write_json(temporary / "generation_config.json", {**ids, "eos_token_id": ends})
        _write_json(temporary / "tokenizer.json", to_tokenizer_json(tokenizer))
        _write_json(temporary / "tokenizer_config.json", _tokenizer_config(model.config.sequence_len))
        (temporary / TEMPLATE_FILE).write_text(read_resource("templates", TEMPLATE_FILE), encoding="utf-8")
        (temporary / "README.md").write_text(model_card(model, meta, form, repo), encoding="utf-8")
        for name in CODE_FILES if form == "custom" else ():
            (temporary / name).write_text(read_resource("hf", name), encoding="utf-8")
        save_tensors(state, temporary / WEIGHTS_FILE, {"format": "pt"})
        share_mode(temporary / CONFIG_FILE)
        replace_directory(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return form


def check_output(output: Path) -> None:
    """Raise NanochatError if a directory holds what an export would destroy, or cannot be replaced by one."""
    if not output.exists():
        return
    if not output.is_dir():
        raise NanochatError(f"--output {output} is a file: name a directory")
    if output.samefile("."):
        raise NanochatError(f"--output {output} is the working directory, which cannot be replaced: name another directory")
    found = {path.name for path in output.iterdir()}
    ours = ORIGIN_KEY in read_json(output / CONFIG_FILE) if CONFIG_FILE in found else not found
    if strangers := found if not ours else found - OUR_FILES:
        raise NanochatError(f"--output {output} holds {min(strangers)}, which is no export of ours: name another directory")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")


def _tokenizer_config(sequence_len: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "additional_special_tokens": [name for name in SPECIAL_TOKENS if name not in ("<|bos|>", "<|assistant_end|>")],
        "model_max_length": sequence_len,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


# ----------------------------------------------------------------------------- the model card


def model_card(model: GPT, meta: dict[str, Any], form: str, repo: str | None) -> str:
    """README.md: what the model is, how to use it, and the results of it and of the models it came from."""
    stage_dir = get_stage_dir(meta["tag"], meta["stage"])
    context = {
        "name": repo or f"nanochat {meta['tag']}",
        "repo": repo,
        "custom": form == "custom",
        "base": meta["stage"] == "base",
        "stage": STAGE_TITLES[meta["stage"]].lower(),
        "step": meta["step"],
        "config": model.config,
        "num_params": model.num_scaling_params()["total"],
        "numbers": [row for stage, step in _lineage(meta) for row in _measured(meta["tag"], stage, step)],
        "settings": settings_table(read_json(stage_dir / SETTINGS_FILE)),
    }
    return fill("model_card.md", context)


def _lineage(meta: dict[str, Any]) -> list[tuple[str, int]]:
    """(stage, step) of the checkpoint and its ancestors, the oldest first."""
    line, parent = [(meta["stage"], meta["step"])], meta.get("parent")
    while parent:
        line.insert(0, (parent["stage"], parent["step"]))
        stage_dir = get_stage_dir(meta["tag"], parent["stage"])
        parent = read_meta(stage_dir, parent["step"]).get("parent") if parent["step"] in list_steps(stage_dir) else None
    return line


def _measured(tag: str, stage: str, step: int) -> list[list[str]]:
    """Rows of (what, value, interval, problems) that were measured at exactly this step of a stage."""
    stage_dir = get_stage_dir(tag, stage)
    results = read_eval(stage_dir)
    if results.get("step") != step:
        results = {}
    _, logged = series([row for row in read_metrics(stage_dir / METRICS_FILE) if row["step"] == step], "val/bpb")
    measured = results.get("bpb", {})
    if logged and "val" not in measured:  # or only other text was measured
        results["bpb"] = {"val": logged[-1], **measured}
    rows = evaluation_table(results)
    if core := results.get("core"):
        rows.append([core_label(core), *describe_mean(core), ""])
    return [[f"{STAGE_TITLES[stage]}: {label}" if label else "", *rest] for label, *rest in rows]


# ----------------------------------------------------------------------------- the hub


def push(directory: Path, repo: str, private: bool) -> str:
    """Upload an export to the Hugging Face hub, creating the repository if necessary; returns its address.

    Raises NanochatError if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)  # None: as the account has it
        api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            commit_message="Export from nanochat",
            delete_patterns=sorted(OUR_FILES),  # of an earlier export in another form
        )
    except Exception as error:  # the hub library raises a dozen kinds, and those of the library for HTTP
        reason = " ".join(str(error).split())[:300]
        raise NanochatError(
            f"{repo!r} could not be sent to the hub ({reason}): it lies in {directory}; log in with `hf auth login`, or "
            "check the name and the network"
        ) from error
    return str(url)

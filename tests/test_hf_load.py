"""Properties of models that come from Hugging Face's form: nothing is lost on the way there and back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.checkpoint_manager import load_model
from nanochat.common import NanochatError
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.hf.export import export, push
from nanochat.hf.load import check_chat_template, import_run, load_hf
from nanochat.hf.tokenizer_json import from_tokenizer_json
from nanochat.hf.weights import NORM_EPS
from nanochat.runs import list_steps
from nanochat.sampling import SamplingParams
from nanochat.tokenizer import Tokenizer
from scripts import base_eval, base_train, chat_cli, chat_sft, export_hf
from tests.helpers import make_document, make_model
from tests.hub_server import ModelHub, ask_hub, serve_folder
from tests.test_hf_export import META, make_plain_model, some_ids

transformers = pytest.importorskip("transformers", reason="exports are loaded by transformers: bash runs/setup.sh hf")


@pytest.fixture
def exported(tokenizer: Tokenizer, tmp_path: Path) -> tuple[GPT, Path]:
    """(a model with everything that ours can have, its export)."""
    model = make_model(vocab_size=tokenizer.get_vocab_size(), n_head=4, n_kv_head=2)
    export(model, tokenizer, META, tmp_path / "export")
    return model, tmp_path / "export"


def logits(model: GPT) -> torch.Tensor:
    model.compute_dtype = torch.float32
    with torch.no_grad():
        return model(some_ids(2, 200, model.config.vocab_size))


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


# ----------------------------------------------------------------------------- there and back


def test_our_own_form_comes_back_bit_for_bit(exported: tuple[GPT, Path], tokenizer: Tokenizer) -> None:
    model, path = exported
    back, back_tokenizer, meta = load_hf(str(path), "cpu")
    assert torch.equal(logits(back), logits(model))
    assert back_tokenizer.fingerprint() == tokenizer.fingerprint()
    assert back.config.windows() == model.config.windows()
    assert meta["tag"] == "export"


def test_transformers_own_form_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make_plain_model(tokenizer)
    assert export(model, tokenizer, META, tmp_path / "export") == "nanochat"
    back = load_hf(str(tmp_path / "export"), "cpu")[0]
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=1e-4)
    assert export(back, tokenizer, META, tmp_path / "export") == "nanochat"  # in place of the first


def test_a_model_of_transformers_own_making(exported: tuple[GPT, Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    size = tokenizer.get_vocab_size()
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = transformers.NanoChatConfig(
        vocab_size=size + 50, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=NORM_EPS, rope_parameters=rope,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    theirs = transformers.NanoChatForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    transformers.AutoTokenizer.from_pretrained(exported[1]).save_pretrained(tmp_path / "theirs")
    ours, our_tokenizer, _ = load_hf(str(tmp_path / "theirs"), "cpu")
    assert our_tokenizer.fingerprint() == tokenizer.fingerprint()
    with torch.no_grad():
        expected = theirs(some_ids(2, 200, size)).logits[..., :size]  # the rest is padding
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4)


def test_what_transformers_saves_again_comes_back(exported: tuple[GPT, Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "again")
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "again")
    back, back_tokenizer, _ = load_hf(str(tmp_path / "again"), "cpu")
    rows = model.config.vocab_size
    assert torch.equal(back.wte.weight[:rows], model.wte.weight[:rows].bfloat16().float())
    assert back_tokenizer.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("multiple", [64, 1024])
def test_rows_beyond_the_vocabulary_are_never_said(
    exported: tuple[GPT, Path], tokenizer: Tokenizer, tmp_path: Path, multiple: int
) -> None:
    model, path = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    theirs.resize_token_embeddings(tokenizer.get_vocab_size(), pad_to_multiple_of=multiple)
    assert theirs.config.vocab_size % multiple == 0
    theirs.save_pretrained(tmp_path / "again")
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "again")
    back = load_hf(str(tmp_path / "again"), "cpu")[0]
    assert torch.equal(logits(back), logits(model))  # of the same shape, too


# ----------------------------------------------------------------------------- the commands


def test_chat_with_an_export(
    exported: tuple[GPT, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat_cli.main(["--from-hf", str(exported[1]), "-p", "the cat", "-m", "5", "--device-type=cpu", "-t", "0"]) == 0
    assert len(capsys.readouterr().out) > 1
    monkeypatch.setattr("builtins.input", lambda prompt: "quit")
    assert chat_cli.main(["--from-hf", str(exported[1]), "--device-type=cpu"]) == 0
    assert f"nanochat export (from {exported[1]})" in capsys.readouterr().out
    for flag in ("--source=sft", "--model-tag=tiny", "--step=0"):
        with pytest.raises(NanochatError, match="no checkpoint of a run: leave out --source, --model-tag and --step"):
            chat_cli.main(["--from-hf", str(exported[1]), flag, "--device-type=cpu"])


def test_an_exported_base_model_continues_a_text(
    exported: tuple[GPT, Path], tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-p", "the cat", "-m", "5", "--device-type=cpu", "-t", "0"]
    assert chat_cli.main(["--from-hf", str(exported[1]), "-i", "base", *flags]) == 0
    prompt = tokenizer.encode("the cat", prepend="<|bos|>")
    model, _, _ = load_hf(str(exported[1]), "cpu")
    (row,) = Engine(model, tokenizer).complete([prompt], SamplingParams(0, max_tokens=5))
    assert capsys.readouterr().out == row.text.translate(chat_cli.CONTROLS) + "\n"


def test_an_exports_own_code_is_not_run_to_measure_it(exported: tuple[GPT, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked at the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    with pytest.raises(NanochatError, match="brings its own code, which is not run here: measure an export of nanochat by"):
        base_eval.main(["--hf-path", str(exported[1]), "--eval=core", "--device-type=cpu"])


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors", "x" * 99), ("config.json", "[]"), ("tokenizer.json", "{}"),
     ("config.json", '{"model_type": "gpt2", "n_head": 0}'), ("config.json", '{"model_type": "gpt2", "n_layer": "x"}')],
)  # fmt: skip
def test_a_damaged_model_cannot_be_measured(file: str, content: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(make_plain_model(tokenizer), tokenizer, META, tmp_path / "export")
    (tmp_path / "export" / file).write_text(content, encoding="utf-8")
    with pytest.raises(NanochatError, match="is not a folder that transformers can load"):
        base_eval.main(["--hf-path", str(tmp_path / "export"), "--eval=core", "--device-type=cpu"])


def test_fine_tuning_from_an_export(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "little-model")
    assert export_hf.main(["--model-tag=tiny", "--source=base", "--output", output]) == 0
    flags = ["--from-hf", output, "--tasks=Arithmetic:60,Identity:40", "--num-iterations=2", "--total-batch-size=512",
             "--no-compile", "--device-type=cpu", "--eval-tokens=512"]  # fmt: skip
    assert chat_sft.main(flags) == 0
    base, _, meta = load_model("base", "cpu", "eval", "little-model")
    assert meta["imported"] == {"from": output}
    assert torch.equal(logits(base), logits(load_model("base", "cpu", "eval", "tiny")[0]))
    model, _, meta = load_model("sft", "cpu", "eval", "little-model")
    assert (meta["step"], meta["parent"]) == (2, {"stage": "base", "step": 0})
    assert not torch.equal(logits(model), logits(base))
    assert chat_sft.main([*flags, "--resume=auto"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert export_hf.main(["--model-tag=little-model", "--output", output]) == 0
    with pytest.raises(NanochatError, match="already has a base model, another"):
        import_run(output, "little-model")
    with pytest.raises(NanochatError, match="not pretrained here.*--data"):
        base_eval.main(["--model-tag=little-model", "--device-type=cpu", "--eval=bpb"])
    with pytest.raises(NanochatError, match=f"'little-model' came from {re.escape(output)}: it can be fine-tuned, but not"):
        base_train.main(["--model-tag=little-model", "--device-type=cpu", "--resume=auto"])


def test_importing_leaves_the_tokenizer_that_later_stages_need(tiny_run: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Whose base model is gone: the same model may take its place again, another one may not."""
    assert export_hf.main(["--model-tag=tiny", "--source=base", "--output", str(tmp_path / "same")]) == 0
    other = Tokenizer(tokenizer.tokens[:-1])
    export(make_plain_model(other), other, META, tmp_path / "other")
    shutil.rmtree(tiny_run / "base")
    before = (tiny_run / "tokenizer.json").read_bytes()
    with pytest.raises(NanochatError, match="'tiny' has sft checkpoints, whose tokenizer that of .*other would replace"):
        import_run(str(tmp_path / "other"), "tiny")
    assert import_run(str(tmp_path / "same"), "tiny") == "tiny"
    assert (tiny_run / "tokenizer.json").read_bytes() == before


def test_a_model_in_a_folder_here_is_found_again(
    tokenizer: Tokenizer, tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(make_plain_model(tokenizer), tokenizer, META, tmp_path / "plain")
    flags = ["--tasks=Arithmetic:20", "--num-iterations=2", "--save-every=1", "--total-batch-size=512", "--no-compile"]
    monkeypatch.chdir(tmp_path)
    assert chat_sft.main(["--from-hf=plain", *flags, "--device-type=cpu", "--eval-tokens=512"]) == 0
    stage_dir = base_dir / "runs" / "plain" / "sft"
    shutil.rmtree(stage_dir / "step_000002")
    monkeypatch.chdir("/")
    assert chat_sft.main(["--config", str(stage_dir / "config.toml"), "--resume=auto"]) == 0
    assert list_steps(stage_dir) == [1, 2]
    shutil.rmtree(stage_dir / "step_000002")
    shutil.rmtree(tmp_path / "plain")  # the run has all that it needs
    assert chat_sft.main(["--config", str(stage_dir / "config.toml"), "--resume=auto"]) == 0
    assert list_steps(stage_dir) == [1, 2]


def test_fine_tuning_does_not_go_on_with_another_model(tokenizer: Tokenizer, tmp_path: Path, base_dir: Path) -> None:
    model = make_plain_model(tokenizer)
    for name in ("one", "other"):
        export(model, tokenizer, META, tmp_path / name)
        torch.nn.init.zeros_(model.lm_head.weight)
    flags = ["--tasks=Arithmetic:20", "--num-iterations=2", "--save-every=1", "--total-batch-size=512", "--no-compile"]
    flags += ["--model-tag=tuned", "--resume=auto", "--device-type=cpu", "--eval-tokens=512"]
    assert chat_sft.main(["--from-hf", str(tmp_path / "one"), *flags]) == 0
    shutil.rmtree(base_dir / "runs" / "tuned" / "sft" / "step_000002")
    with pytest.raises(NanochatError, match="'tuned' already has a base model, another than .*other: choose another"):
        chat_sft.main(["--from-hf", str(tmp_path / "other"), *flags])
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert chat_sft.main(["--from-hf", str(tmp_path / "copy"), *flags]) == 0


def test_fine_tuning_a_plain_model_makes_it_one_of_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(make_plain_model(tokenizer), tokenizer, META, tmp_path / "plain")
    flags = ["--from-hf", str(tmp_path / "plain"), "--tasks=Arithmetic:20", "--num-iterations=2", "--total-batch-size=512"]
    assert chat_sft.main([*flags, "--no-compile", "--device-type=cpu", "--eval-tokens=512"]) == 0
    assert export_hf.main(["--model-tag=plain", "--output", str(tmp_path / "tuned")]) == 0
    back = load_hf(str(tmp_path / "tuned"), "cpu")[0]
    assert torch.equal(logits(back), logits(load_model("sft", "cpu", "eval", "plain")[0]))
    assert (back.config.value_embeddings, back.config.qk_scale) == (False, 1.0)


# ----------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ModelHub]]:
    (tmp_path / "hub").mkdir()
    with serve_folder(tmp_path / "hub", ModelHub) as server:
        ask_hub(monkeypatch, server.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_to_the_hub_and_back(tiny_run: Path, tmp_path: Path, hub: type[ModelHub], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model-tag=tiny", "--output", str(tmp_path / "export"), "--private"]
    assert export_hf.main([*flags, "--push-to-hub=someone/model"]) == 0
    assert f"{hub.address}/someone/model" in capsys.readouterr().out
    assert hub.private is True
    assert {path.name for path in hub.root.iterdir()} == {path.name for path in (tmp_path / "export").iterdir()}
    assert "someone/model" in (hub.root / "README.md").read_text(encoding="utf-8")
    back, _, meta = load_hf("someone/model", "cpu")
    assert meta["tag"] == "someone-model"
    assert torch.equal(logits(back), logits(load_model("sft", "cpu", "eval", "tiny")[0]))
    assert not any(request.endswith(".py") for request in hub.requests if request.startswith("GET"))


def test_sent_again_in_another_form_nothing_of_the_first_stays(
    tokenizer: Tokenizer, tmp_path: Path, hub: type[ModelHub]
) -> None:
    for name in ("modeling_nanochat.py", "notes.txt"):
        (hub.root / name).write_text("", encoding="utf-8")
    assert export(make_plain_model(tokenizer), tokenizer, META, tmp_path / "export") == "nanochat"
    push(tmp_path / "export", "someone/model", private=False)
    assert {path.name for path in hub.root.iterdir()} == {path.name for path in (tmp_path / "export").iterdir()} | {
        "notes.txt"
    }
    assert not hub.private


def test_what_the_hub_refuses_is_said(tiny_run: Path, tmp_path: Path, hub: type[ModelHub]) -> None:
    flags = ["--model-tag=tiny", "--output", str(tmp_path / "export")]
    with pytest.raises(NanochatError, match="'nobody/model' could not be sent to the hub"):
        export_hf.main([*flags, "--push-to-hub=nobody/model"])
    with pytest.raises(NanochatError, match="neither a directory nor available from the hub"):
        load_hf("nobody/model", "cpu")
    with pytest.raises(NanochatError, match="neither a directory nor available from the hub"):
        load_hf("someone/a--model", "cpu")
    with pytest.raises(NanochatError, match="--push-to-hub"):
        export_hf.main([*flags, "--private"])


def test_a_hub_that_cannot_be_reached_is_said(
    tokenizer: Tokenizer, tmp_path: Path, hub: type[ModelHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    export(make_plain_model(tokenizer), tokenizer, META, tmp_path / "export")
    ask_hub(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(NanochatError, match="'someone/model' could not be sent to the hub .* check the name and the network"):
        push(tmp_path / "export", "someone/model", private=False)


# ----------------------------------------------------------------------------- what is no model


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match="it has no config.json"):
        load_hf(str(tmp_path), "cpu")
    for absent in (str(tmp_path / "absent"), "~nobody.here/a/model"):
        with pytest.raises(NanochatError, match="there is no such directory"):
            load_hf(absent, "cpu")


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("config.json", {"model_type": "llama"}, "is a model of type 'llama': nanochat computes nanochat_gpt and nanochat"),
        ("config.json", {"final_logit_softcapping": 30.0}, "has final_logit_softcapping 30.0, but .* only with 15.0"),
        ("config.json", {"layer_windows": [128, 64, 512]}, r"has layer_windows \[128, 64, 512\]"),
        ("config.json", {"vocab_size": 100}, "do not belong together"),
        ("config.json", {"num_hidden_layers": 2, "layer_windows": [128, 512], "value_embedding_layers": [1]}, "do not fit"),
        ("config.json", {"num_hidden_layers": None}, "has num_hidden_layers None, not a whole number above 0: fetch or"),
        ("config.json", {"num_hidden_layers": 10**9}, "has 1000000000 layers in config.json, but"),
        ("config.json", {"bigram_rows": -1}, ": bigrams -1 is not a whole number above 0"),
        ("config.json", {"num_attention_heads": 0}, "has num_attention_heads 0, not"),
        ("config.json", {"num_attention_heads": "x"}, "has num_attention_heads 'x', not"),
        ("config.json", {"vocab_size": "x"}, "has vocab_size 'x', not"),
        ("config.json", {"max_position_embeddings": -5}, "has max_position_embeddings -5, not"),
        ("config.json", {"num_key_value_heads": "x"}, ": n_kv_head 'x' is not a whole number above 0"),
        ("config.json", {"layer_windows": None}, "is damaged .*: fetch or export the model again"),
        ("config.json", {"rotary_base": "x"}, "is damaged|rotary_base 'x' is not a number above 0"),
        ("config.json", {"rotary_base": None}, "is damaged|rotary_base None is not"),
        ("config.json", {"rotary_base": 0}, "is damaged|rotary_base 0 is not"),
        ("tokenizer.json", {"added_tokens": []}, "its special tokens are not"),
        ("tokenizer.json", {"model": {"type": "Unigram"}}, "its model is Unigram"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "does not split text by one pattern"),
    ],
)
def test_what_we_cannot_compute_is_named(exported: tuple[GPT, Path], file: str, values: dict[str, Any], reason: str) -> None:
    change(exported[1] / file, **values)
    with pytest.raises(NanochatError, match=reason):
        load_hf(str(exported[1]), "cpu")


@pytest.mark.parametrize("name", ["model.wte.weight", "model.value_embeds.0.weight", "lm_head.weight"])
def test_a_table_without_a_row_for_each_token_is_refused(exported: tuple[GPT, Path], name: str) -> None:
    path = exported[1] / "model.safetensors"
    state = load_file(path)
    save_file({**state, name: state[name][:-1].contiguous()}, path)
    with pytest.raises(NanochatError, match="rows for a vocabulary of"):
        load_hf(str(exported[1]), "cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_is_named(exported: tuple[GPT, Path], name: str) -> None:
    (exported[1] / name).write_bytes(b"\x00{")
    with pytest.raises(NanochatError, match=name):
        load_hf(str(exported[1]), "cpu")


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{% for message in %}", ENDLESS, "{{ 9 ** 9 ** 9 ** 9 }}"])
def test_another_chat_template_is_mentioned_and_never_run(
    exported: tuple[GPT, Path], tmp_path: Path, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers.AutoTokenizer.from_pretrained(exported[1]).save_pretrained(tmp_path / "again")
    capsys.readouterr()
    for folder in (exported[1], tmp_path / "again"):
        check_chat_template(folder)
    assert capsys.readouterr().out == ""
    (exported[1] / "chat_template.jinja").write_text(template, encoding="utf-8")
    load_hf(str(exported[1]), "cpu")
    assert "differs from nanochat's" in capsys.readouterr().out


def test_merges_in_another_order_are_refused(exported: tuple[GPT, Path]) -> None:
    path = exported[1] / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"].reverse()
    change(path, model=content["model"])
    with pytest.raises(NanochatError, match="merges are in another order"):
        load_hf(str(exported[1]), "cpu")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "changes text before it splits it"),
        ({"behavior": "Removed"}, "what lies between the pieces"),
        ({"invert": True}, "what lies between the pieces"),
    ],
)
def test_a_tokenizer_that_would_give_other_ids_is_refused(
    exported: tuple[GPT, Path], changed: dict[str, Any], reason: str
) -> None:
    path = exported[1] / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    (content if "normalizer" in changed else content["pre_tokenizer"]["pretokenizers"][0]).update(changed)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(NanochatError, match=reason):
        from_tokenizer_json(path)


def test_a_missing_file_is_named(exported: tuple[GPT, Path]) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        copy = exported[1].parent / name.partition(".")[0]
        shutil.copytree(exported[1], copy)
        (copy / name).unlink()
        with pytest.raises(NanochatError, match=name):
            load_hf(str(copy), "cpu")


def test_documents_survive_the_tokenizer_there_and_back(exported: tuple[GPT, Path], tokenizer: Tokenizer) -> None:
    back = load_hf(str(exported[1]), "cpu")[1]
    texts = [make_document(seed) for seed in range(20)]
    assert back.encode(texts) == tokenizer.encode(texts)

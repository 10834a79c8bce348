"""Properties of exported models: in Hugging Face's libraries they give the same logits, ids and conversations as here."""

from __future__ import annotations

import errno
import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from nanochat import checkpoint_manager
from nanochat.common import NanochatError
from nanochat.eval_results import merge_eval
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf.export import OUR_FILES, _measured, check_output, export
from nanochat.hf.weights import from_native, native_obstacles, to_native
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import export_hf
from tests.helpers import make_document, make_model

transformers = pytest.importorskip("transformers", reason="exports are loaded by transformers: bash runs/setup.sh hf")

META = {"tag": "tiny", "stage": "sft", "step": 4, "weights": "0" * 64}
SHAPES = {  # which lets windows, padding of the vocabulary and grouped heads matter
    "all": {"sequence_len": 512, "n_head": 4, "n_kv_head": 2, "window_pattern": "SSL", "bigrams": 2},
    "no pairs": {"bigrams": 0, "window_pattern": "L"},
}


def make_plain_model(tokenizer: Tokenizer) -> GPT:
    """One that transformers' own class can express, with factors of the stream that are not 1."""
    model = make_model(
        vocab_size=tokenizer.get_vocab_size(), window_pattern="L", bigrams=0, value_embeddings=False, qk_scale=1.0
    )
    with torch.no_grad():
        model.resid_lambdas.copy_(torch.tensor([0.9, 1.1, 0.8]))
        model.x0_lambdas.copy_(torch.tensor([0.3, 0.0, 0.0]))
    return model


@pytest.fixture(params=["all", "no pairs", "plain"])
def exported(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path: Path) -> tuple[GPT, Any]:
    """(our model, the same one loaded by transformers)."""
    if request.param == "plain":
        model = make_plain_model(tokenizer)
    else:
        model = make_model(vocab_size=tokenizer.get_vocab_size(), **SHAPES[request.param])
        torch.nn.init.normal_(model.resid_lambdas, 1.0, 0.2)
        torch.nn.init.normal_(model.x0_lambdas, 0.2, 0.2)
    form = export(model, tokenizer, META, tmp_path / "export")
    assert form == ("nanochat" if request.param == "plain" else "custom")
    code = form == "custom"
    return model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=code).eval()


@pytest.fixture(scope="module")
def custom(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with everything that only our own code can express."""
    path = tmp_path_factory.mktemp("exports") / "custom"
    assert export(make_model(vocab_size=tokenizer.get_vocab_size()), tokenizer, META, path) == "custom"
    return path


def load(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()


def some_ids(rows: int, length: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class SmearConfig(GPTConfig):
    smear: float = 0.0  # a field that gpt.py got and nanochat/hf/ did not


def test_what_an_export_cannot_say_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Rather than left out: the export would be loaded, and compute something else."""
    for model in (make_plain_model(tokenizer), make_model(vocab_size=tokenizer.get_vocab_size())):
        usual = native_obstacles(model)
        model.config = SmearConfig(**asdict(model.config))
        assert native_obstacles(model) == usual  # as it is by default, nothing is lost
        export(model, tokenizer, META, tmp_path / "by default")
        model.config = replace(model.config, smear=0.5)
        with pytest.raises(NanochatError, match=r"can say smear of this model: nanochat/hf/ must"):
            export(model, tokenizer, META, tmp_path / "export")
        with pytest.raises(NanochatError, match=r"cannot express this model \(smear"):
            export(model, tokenizer, META, tmp_path / "export", "nanochat")
    assert not (tmp_path / "export").exists()


def test_more_tokens_get_rows_in_every_table(custom: Path, tmp_path: Path) -> None:
    """As when others add tokens for their fine-tuning: old texts have the same logits, new ones work, also loaded again."""
    model = load(custom)
    size = model.config.vocab_size
    ids = some_ids(2, 9, size)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(size + 3)
        torch.testing.assert_close(model(ids).logits[..., :size], before)
        assert model(ids + 3).logits.shape == (2, 9, size + 3)
        model.save_pretrained(tmp_path / "resized")
        torch.testing.assert_close(load(tmp_path / "resized")(ids + 3).logits, model(ids + 3).logits)


# ----------------------------------------------------------------------------- logits


@torch.no_grad()
def test_the_logits_are_ours(exported: tuple[GPT, Any]) -> None:
    ours, theirs = exported
    ids = some_ids(2, 400, ours.config.vocab_size)  # beyond the windows of 128
    expected = ours(ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs(ids, logits_to_keep=3).logits, expected[:, -3:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_cached_logits_equal_uncached(exported: tuple[GPT, Any]) -> None:
    ours, theirs = exported
    ids = some_ids(2, 200, ours.config.vocab_size)
    expected = ours(ids)
    cache = transformers.DynamicCache()
    pieces = [theirs(piece, past_key_values=cache).logits for piece in ids.split([150, 1, 1, 30, 18], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 4}])
def test_generation_equals_generation_without_a_cache(custom: Path, how: dict[str, Any]) -> None:
    model = load(custom)
    ids = some_ids(1, 150, model.config.vocab_size, seed=3)
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    slow = {key: value for key, value in how.items() if key == "num_beams"}
    cached = model.generate(ids, attention_mask=mask, **settings, **how)
    assert cached.tolist() == model.generate(ids, attention_mask=mask, use_cache=False, **settings, **slow).tolist()


def test_generation_is_the_engines(custom: Path, tokenizer: Tokenizer) -> None:
    ours = make_model(vocab_size=tokenizer.get_vocab_size())
    ids = some_ids(1, 140, ours.config.vocab_size, seed=5)
    theirs = load(custom).generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert theirs[0, 140:].tolist() == list(ours.generate(ids[0].tolist(), 20, temperature=0))


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(custom: Path) -> None:
    model = load(custom)
    ids = some_ids(1, 150, model.config.vocab_size)
    expected = model(ids).logits
    padding = torch.full((1, 9), model.config.pad_token_id)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(padding)
    left = model(torch.cat([padding, ids], 1), attention_mask=torch.cat([zeros, ones], 1)).logits[:, 9:]
    right = model(torch.cat([ids, padding], 1), attention_mask=torch.cat([ones, zeros], 1)).logits[:, :-9]
    torch.testing.assert_close(left, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(right, expected, rtol=0, atol=1e-4)


def test_a_batch_with_padding_generates_what_each_row_would(custom: Path) -> None:
    model, tok = load(custom), transformers.AutoTokenizer.from_pretrained(custom)
    texts = ["the cat sees", "a small dog follows the river and then some more"]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    batch = tok(texts, return_tensors="pt", padding=True)
    together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
    for text, row in zip(texts, together, strict=True):
        alone = tok(text, return_tensors="pt")["input_ids"]
        assert row[-8:].tolist() == model.generate(alone, **settings)[0, -8:].tolist()


@torch.no_grad()
def test_a_cache_that_was_cut_is_not_taken_as_it_was(custom: Path) -> None:
    """Pairs of tokens need the token before: the cut cache does not say which that is, and the caller can."""
    model, ids = load(custom), some_ids(2, 12, 200)
    whole = model(ids)
    cache = getattr(whole, "past_key_values", None) or whole.cache
    cache.crop(-7)
    with pytest.raises(ValueError, match="give previous_ids"):
        model(ids[:, 5:], past_key_values=cache)
    cut = model(ids[:, 5:], past_key_values=cache, previous_ids=ids[:, 4:-1])
    torch.testing.assert_close(cut.logits, whole.logits[:, 5:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give previous_ids"):
        model(ids[:1, :1], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_texts_see_only_themselves(custom: Path, use_cache: bool) -> None:
    """As collators for training without padding give them: no mask, and positions that begin again."""
    model, first, second = load(custom), some_ids(1, 9, 200), some_ids(1, 7, 200, seed=1)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    packed = model(torch.cat([first, second], dim=1), position_ids=positions, use_cache=use_cache).logits
    alone = torch.cat([model(first).logits, model(second).logits], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_without_a_mask_the_first_token_is_seen(custom: Path, tokenizer: Tokenizer) -> None:
    """Rows are padded with <|bos|>, which begins every text; also where the caller names one end only."""
    model, prompt = load(custom), torch.tensor([tokenizer.encode("the cat", prepend="<|bos|>")])
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": tokenizer.encode_special("<|assistant_end|>")}
    masks = []
    model.model.register_forward_pre_hook(lambda module, args: masks.append(args[1]))
    model.generate(prompt, **how)
    assert masks and all(mask is None or bool(mask.all()) for mask in masks)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_ours(custom: Path, tokenizer: Tokenizer, checkpointing: bool) -> None:
    ours, theirs = make_model(vocab_size=tokenizer.get_vocab_size()), load(custom).train()
    if checkpointing:
        theirs.gradient_checkpointing_enable()
    ids = some_ids(2, 150, ours.config.vocab_size)
    loss = theirs(ids, labels=ids).loss
    expected = ours(ids[:, :-1], ids[:, 1:].contiguous())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for name, parameter in theirs.named_parameters():
        grad = ours.get_parameter(name.removeprefix("model.")).grad[: len(parameter)]
        torch.testing.assert_close(parameter.grad, grad.to_dense(), rtol=1e-3, atol=1e-5, msg=name)


def test_a_new_model_of_the_class_has_every_value_set() -> None:
    from nanochat.hf.configuration_nanochat import NanochatConfig
    from nanochat.hf.modeling_nanochat import NanochatForCausalLM

    config = NanochatConfig(
        300, 32, 2, 2, 2, 64, value_embedding_layers=[1], bigram_rows=640, bos_token_id=0, eos_token_id=1, pad_token_id=0
    )
    model = NanochatForCausalLM(config)
    assert model.model.resid_lambdas.tolist() == [1.0, 1.0]
    assert all(parameter.abs().max() < 10 for parameter in model.parameters())


# ----------------------------------------------------------------------------- ids


def varied_strings(count: int) -> list[str]:
    rng = random.Random(1)
    anything = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c != 0xFDD0]
    alphabets = [
        [chr(c) for c in range(128)],
        [chr(rng.choice(anything)) for _ in range(3000)],
        list("\u00e9\u0301ßſ\u1e9e\u212aʼn\u0130ıǅ\u00a0\u2028\u2029\u0085\u200b\u200d\ufeff \t\r\n"),
        list("😀👩🏽‍🚀🇩🇪✊🏿\ufe0f ab"), list("漢字かな한국어العربيةहिन्दीไทย 1२٣"),
        list(" \n\t\r  a1."), list("ab'stlvemdr SLVE "),
        list("0123456789.,-+e "), [*SPECIAL_TOKENS, "<|bos", "|>", "<|", "<", "|", " ", "x", "<|endoftext|>"],
        ["def ", "return", "(self):\n", "    ", "\t", "x[i] += 1;", "//", "{}", "==", "_", "\r\n", "'s", "\"\"\""],
        list("aab"), ["the cat", " sees", " a house", " the river", "."],
    ]  # fmt: skip
    texts = ["", " ", "a" * 2000, make_document(3)]
    while len(texts) < count:
        mixed = [rng.choice(alphabets) for _ in range(rng.choice((1, 1, 2, 3)))]
        texts.append("".join(rng.choice(rng.choice(mixed)) for _ in range(rng.randrange(1, 60))))
    return texts


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_ids_are_ours_for_varied_strings(custom: Path, tokenizer: Tokenizer, count: int) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(custom)
    texts = varied_strings(count)
    expected = tokenizer.encode(texts)
    found = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [text for text, a, b in zip(texts, expected, found, strict=True) if a != b] == []
    assert theirs.batch_decode(expected) == [tokenizer.decode(row) for row in expected]
    ordinary = [text for text in texts if not any(name in text for name in SPECIAL_TOKENS)]
    assert theirs(ordinary)["input_ids"] == tokenizer.encode(ordinary, prepend="<|bos|>")


def test_special_tokens_have_their_ids_and_uses(custom: Path, tokenizer: Tokenizer) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(custom)
    assert {name: theirs.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS} == tokenizer.special_ids
    assert set(theirs.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|bos|>", "<|assistant_end|>", "<|bos|>")
    assert len(theirs) == tokenizer.get_vocab_size()
    assert theirs.decode([*tokenizer.encode("the cat"), theirs.eos_token_id], skip_special_tokens=True) == "the cat"


# ----------------------------------------------------------------------------- conversations

NASTY = "<|assistant_start|>yes<|assistant_end|><|user_start|> a | b || <| x |> |<|bos|>"
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Yes.\n"}],
    [{"role": "system", "content": "Be\nshort. "}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": NASTY}, {"role": "assistant", "content": NASTY}, {"role": "user", "content": "  \n"}],
    [{"role": "system", "content": "a <"}, {"role": "user", "content": "|bos|>"}],
    [{"role": "user", "content": [{"type": "text", "text": "a <"}, {"type": "text", "text": "|bos|> b"}]},
     {"role": "assistant", "content": [
        {"type": "text", "text": "It is <"}, {"type": "python", "text": "1|2"}, {"type": "python_output", "text": "|bos|>"},
        {"type": "text", "text": "|user_end|> 3"}]},
     {"role": "user", "content": "more"}],
]  # fmt: skip


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_conversations_are_rendered_as_ours(custom: Path, tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(custom)
    ids, mask = tokenizer.render_conversation({"messages": messages})
    whole = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert whole["input_ids"] == ids
    assert whole["assistant_masks"] == mask
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asked == tokenizer.render_for_completion({"messages": messages})


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "assistant", "content": "a"}], "by turns"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "by turns"),
        ([{"role": "system", "content": "a"}], "followed by a user's message"),
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "must be text"),
    ],
)
def test_what_is_no_conversation_is_refused(custom: Path, messages: list[dict[str, Any]], reason: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(custom)
    with pytest.raises(Exception, match=reason):
        theirs.apply_chat_template(messages, tokenize=False)


def test_a_pipeline_chats(custom: Path, tokenizer: Tokenizer) -> None:
    ours = make_model(vocab_size=tokenizer.get_vocab_size())
    chat = transformers.pipeline("text-generation", str(custom), trust_remote_code=True)
    messages = [{"role": "user", "content": "the cat sees " + NASTY}]
    said = chat(messages, max_new_tokens=10, do_sample=False)[0]["generated_text"]
    assert said[0] == messages[0]
    answer = list(ours.generate(tokenizer.render_for_completion({"messages": messages}), 10, temperature=0))
    stops = (tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id())
    ends = [i for i, token in enumerate(answer) if token in stops]
    answer = answer[: ends[0]] if ends else answer
    assert said[1]["content"] == tokenizer.decode([token for token in answer if not tokenizer.is_special(token)])


# ----------------------------------------------------------------------------- the command


def test_the_command_writes_all_files_and_replaces_only_its_own(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "export"
    assert export_hf.main(["--model-tag=tiny", "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == OUR_FILES
    assert "in the format 'custom'" in capsys.readouterr().out
    assert export_hf.main(["--model-tag=tiny", "--source=base", "--step=3", "--output", str(output)]) == 0
    assert json.loads((output / "config.json").read_text(encoding="utf-8"))["nanochat_export"]["step"] == 3
    assert [path.name for path in tmp_path.glob(".export*")] == []
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(NanochatError, match=r"notes\.txt"):
        export_hf.main(["--model-tag=tiny", "--output", str(output)])
    assert (output / "notes.txt").exists()


def test_a_full_disk_is_said_to_be_one(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_manager, "save_file", fail)
    with pytest.raises(OSError, match="No space left") as failure:
        export_hf.main(["--model-tag=tiny", "--output", str(tmp_path / "export")])
    assert failure.value.errno == errno.ENOSPC and not list(tmp_path.glob("*export*"))


def test_another_model_is_not_written_over(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(NanochatError, match="no export of ours"):
        export_hf.main(["--model-tag=tiny", "--output", str(tmp_path)])


def test_a_directory_by_another_of_its_names(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in (".", "../work"):
        with pytest.raises(NanochatError, match="is the working directory"):
            export_hf.main(["--model-tag=none", "--output", name])  # before the model is looked for
    Path("link").symlink_to("../empty")
    export(make_plain_model(tokenizer), tokenizer, META, Path("link"))
    assert Path("link").is_symlink() and {path.name for path in (tmp_path / "empty").iterdir()} <= OUR_FILES
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["link"]


def test_what_transformers_own_class_cannot_say_is_named(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match="value embeddings, .*pairs.*first embedding.*1.2 times as long"):
        export_hf.main(["--model-tag=tiny", "--format=nanochat", "--output", str(tmp_path / "export")])
    assert not (tmp_path / "export").exists()


def test_the_card_has_the_numbers_that_were_measured(tiny_run: Path, tmp_path: Path) -> None:
    task = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    merge_eval(tiny_run / "sft", 4, {"bpb": {"val": 1.2345}, "tasks": {"Odd|name": task}})
    core = {"name": "core_metric", "value": 0.123, "low": 0.1, "high": 0.2, "tasks": {}}
    merge_eval(tiny_run / "base", 6, {"core": core})
    assert export_hf.main(["--model-tag=tiny", "--output", str(tmp_path / "export")]) == 0
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for row in ("bits per byte, val | 1.2345", "Odd\\|name | 50.0% | 40.0% to 60.0% | 100", "Pretraining: CORE | 0.1230"):
        assert row in card
    assert 'pipeline("text-generation", "PATH", trust_remote_code=True)' in card
    assert "\n- conversational\n" in card and "messages = [" in card


def test_the_card_of_a_base_model_shows_how_it_continues_a_text(tiny_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "export"
    assert export_hf.main(["--model-tag=tiny", "--source=base", "--output", str(output)]) == 0
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "tags:\n- nanochat\n---\n" in card
    assert "messages" not in card and "chat" not in card.replace("nanochat", "")
    example = card.split("```python\n")[1].split("```")[0]
    shown: list[str] = []
    exec(example.replace("PATH", output.as_posix()).replace("max_new_tokens=100", "max_new_tokens=4"), {"print": shown.append})
    assert shown[0].startswith("The sky is")


def test_another_models_folder_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(NanochatError):
        check_output(tmp_path)


def test_the_card_shows_what_was_measured_of_these_weights(tiny_run: Path) -> None:
    task = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    merge_eval(tiny_run / "sft", 4, {"tasks": {"A": task}})
    shown = [[any("A" in row[0] and "%" in row[1] for row in _measured("tiny", "sft", step))] for step in (2, 4)]
    assert shown == [[False], [True]]


def test_the_card_of_a_run_that_diverged_leaves_out_what_is_no_number(tiny_run: Path) -> None:
    metrics = tiny_run / "base" / "metrics.jsonl"
    for value, shown in ((None, []), (1.5, ["1.5000"])):
        metrics.write_text(json.dumps({"step": 6, "val/bpb": value}), encoding="utf-8")
        assert [row[1] for row in _measured("tiny", "base", 6)] == shown


def test_what_transformers_class_takes_and_what_it_leaves_out(tokenizer: Tokenizer) -> None:
    model = make_plain_model(tokenizer)
    with torch.no_grad():
        model.resid_lambdas.fill_(1)
        model.x0_lambdas.zero_()
        content, state = to_native(model)
        for key in ("rope_parameters", "rope_theta"):
            content.pop(key)
        assert from_native({**content, "rope_theta": None}, dict(state))[0].rotary_base == 10_000
        with pytest.raises(NanochatError, match="rotary_base 0 is not a number above 0"):
            from_native({**content, "rope_theta": 0}, dict(state))
        model.resid_lambdas[1] = 0.01
    assert native_obstacles(model)

"""Generation: cached equals plain, samples are their own, tools force tokens, contexts end."""

from __future__ import annotations

import pytest
import torch

from nanochat.common import NanochatError
from nanochat.engine import Engine, Row, trim_conversation
from nanochat.kv_cache import KVCache
from nanochat.sampling import make_generators, sample
from nanochat.tokenizer import Tokenizer
from tests.helpers import make_model


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    model = make_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=512)
    engine = Engine(model, tokenizer, calculator=lambda expression: "42")
    return engine


def _prompts(tokenizer: Tokenizer) -> list[list[int]]:
    texts = ["the cat", "my old friend likes some bread " * 20, "a", "one quick fox finds"]
    return [tokenizer.encode(text, prepend="<|bos|>") for text in texts]


def test_greedy_equals_plain_generation(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.stop_ids = set()
    for prompt in _prompts(tokenizer):
        expected = list(engine.model.generate(prompt, 20, temperature=0))
        (result,), _ = engine.generate_batch(prompt, max_tokens=20, temperature=0)
        assert [t for t in result[len(prompt) :]] == expected


def test_a_batch_of_many_lengths_equals_one_by_one(engine: Engine, tokenizer: Tokenizer) -> None:
    prompts = _prompts(tokenizer)
    together = engine.complete(prompts, max_tokens=30, temperature=0)
    for prompt, row in zip(prompts, together, strict=True):
        (alone,) = engine.complete([prompt], max_tokens=30, temperature=0)
        assert row.tokens == alone.tokens
        assert row.finish_reason == alone.finish_reason


def test_samples_differ_and_depend_on_their_seed_alone(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = _prompts(tokenizer)[0]
    five, _ = engine.generate_batch(prompt, 5, max_tokens=12, seed=7)
    assert len({tuple(tokens) for tokens in five}) > 1
    assert len({tokens[len(prompt)] for tokens in five if len(tokens) > len(prompt)}) > 1  # also in the first token
    assert engine.generate_batch(prompt, 5, max_tokens=12, seed=7)[0] == five
    for i in range(5):
        assert engine.generate_batch(prompt, 1, max_tokens=12, seed=7 + i)[0] == [five[i]]


def test_stop_tokens_end_a_row_and_the_rest_go_on(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.stop_ids = set(range(0, 400, 7))
    rows = engine.complete(_prompts(tokenizer) * 3, max_tokens=40, temperature=1.0)
    assert {row.finish_reason for row in rows} >= {"stop"}
    assert len({len(row.tokens) for row in rows}) > 1
    for row in rows:
        assert not set(row.tokens) & engine.stop_ids
        assert len(row.tokens) == len(row.masks)


def test_generation_ends_with_the_context(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.stop_ids = set()
    prompt = [tokenizer.get_bos_token_id()] * 505
    (row,) = engine.complete([prompt], temperature=0)
    assert row.finish_reason == "context"
    assert len(row.prompt) + len(row.tokens) == 512
    with pytest.raises(NanochatError, match="leaves no room"):
        engine.complete([prompt * 2])
    with pytest.raises(NanochatError, match="empty prompt"):
        engine.complete([[]])


def test_a_calculator_call_is_answered_with_forced_tokens(engine: Engine, tokenizer: Tokenizer) -> None:
    special = tokenizer.encode_special
    row = Row([1])
    said = [special("<|python_start|>"), *tokenizer.encode("6*7"), special("<|python_end|>")]
    asked: list[str] = []
    engine.calculator = lambda expression: asked.append(expression) or "42"
    for token in said:
        engine._accept(row, token, 100, 500)
    assert asked == ["6*7"]
    forced = [special("<|output_start|>"), *tokenizer.encode("42"), special("<|output_end|>")]
    for expected in forced:  # whatever is drawn meanwhile
        assert engine._accept(row, 5, 100, 500) == (expected, 0)
    assert engine._accept(row, 5, 100, 500) == (5, 1)
    assert row.tokens == said + forced + [5]
    assert row.masks == [1] * len(said) + [0] * len(forced) + [1]


def test_a_call_that_is_no_expression_is_not_answered(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.calculator = lambda expression: None
    row = Row([1])
    for token in [tokenizer.encode_special("<|python_start|>"), 65, tokenizer.encode_special("<|python_end|>")]:
        engine._accept(row, token, 100, 500)
    assert not row.forced


def test_shared_prefixes_are_computed_once(engine: Engine, tokenizer: Tokenizer) -> None:
    first, second = _prompts(tokenizer)[1], [*_prompts(tokenizer)[1][:60], 5, 6, 7]
    fresh = Engine(engine.model, tokenizer).generate_batch(second, max_tokens=10, temperature=0)
    engine.generate_batch(first, max_tokens=10, temperature=0)
    computed: list[int] = []
    features = engine.model.features
    engine.model.features = lambda idx, cache=None: computed.append(idx.numel()) or features(idx, cache)
    again = engine.generate_batch(second, max_tokens=10, temperature=0)
    assert again == fresh
    assert computed[0] == 3


def test_conversations_are_trimmed_at_turns(tokenizer: Tokenizer) -> None:
    turns = [{"role": role, "content": f"message {i} " * 5} for i in range(10) for role in ("user", "assistant")]
    conversation = {"messages": [{"role": "system", "content": "Be kind."}, *turns, {"role": "user", "content": "last"}]}
    kept, dropped = trim_conversation(conversation, tokenizer, 200)
    assert dropped > 0
    assert len(tokenizer.render_for_completion(kept)) <= 200
    assert kept["messages"][0]["role"] == "system"
    assert kept["messages"][-1]["content"] == "last"
    assert kept["messages"][1]["role"] == "user"
    assert trim_conversation(conversation, tokenizer, 10_000) == (conversation, 0)
    with pytest.raises(NanochatError, match="does not fit"):
        trim_conversation(conversation, tokenizer, 5)


# ----------------------------------------------------------------------------- cache and sampling


def test_cache_keeps_its_contents_when_it_grows_and_copies() -> None:
    model = make_model()
    idx = torch.randint(300, (1, 200), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        one = KVCache.for_model(model, 1)
        model(idx[:, :150], kv_cache=one)
        many = KVCache.for_model(model, 3)
        many.prefill(one)
        assert many.get_pos() == 150
        logits = model(idx[:, 150:].expand(3, -1), kv_cache=many)
        torch.testing.assert_close(logits[2], model(idx)[0, 150:], atol=2e-4, rtol=1e-4)
        many.keep_rows([1])
        many.reset()
        assert many.get_pos() == 0
        torch.testing.assert_close(model(idx, kv_cache=many)[0], model(idx)[0], atol=2e-4, rtol=1e-4)
    assert one.keys.dtype == torch.float32
    with pytest.raises(ValueError, match="do not fit"):
        model(torch.zeros(1, 600, dtype=torch.long), kv_cache=KVCache.for_model(model, 1))


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    n = 4000
    generators = make_generators(list(range(n)), torch.device("cpu"))
    drawn = sample(logits.expand(n, -1), generators, temperature=1.0)
    shares = torch.bincount(drawn, minlength=4) / n
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.03, rtol=0)
    top = sample(logits.expand(n, -1), generators, temperature=1.0, top_k=2)
    assert set(top.tolist()) == {1, 2}
    assert set(sample(logits.expand(9, -1), generators[:9], temperature=1.0, top_k=0).tolist()) <= {0, 1, 2, 3}
    assert sample(logits, generators[:1], temperature=0).item() == 2
    assert sample(logits.expand(50, -1), generators[:50], temperature=0.01).unique().item() == 2

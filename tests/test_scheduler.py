"""What becomes of one text: its end, its calls, its log-probabilities, and what is counted."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import scheduler
from nanochat.engine import Engine
from nanochat.kv_cache import BLOCK_SIZE, KVBlocks
from nanochat.openai_api import Reply
from nanochat.sampling import SamplingParams
from nanochat.sequence import Sequence, _beginning
from nanochat.tokenizer import Tokenizer
from tests.helpers import calculator_call, make_engine, make_it_say, make_model, run_texts


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    return make_engine(tokenizer)


def test_a_forced_answer_ends_with_the_limit(engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.scheduler.calculator = lambda expression: "123456789"
    said = calculator_call(tokenizer, "x")
    make_it_say(engine, monkeypatch, said)
    (row,) = run_texts(engine, [Sequence([1, 2], SamplingParams(seed=1000, max_tokens=len(said) + 2))])
    assert len(row.tokens) == len(said) + 2 and row.finish_reason == "length"


def test_waiting_for_a_tool_takes_no_steps(engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where other texts wait for the row of the one that called it."""
    answered = threading.Event()
    engine = Engine(engine.model, tokenizer, lambda expression: "1" if answered.wait(60) else None, max_rows=1)
    make_it_say(engine, monkeypatch, calculator_call(tokenizer, "x"))
    texts = [Sequence([1, 2], SamplingParams(seed=1000, max_tokens=40)) for _ in range(2)]
    for text in texts:
        engine.scheduler.submit(text)
    while not engine.scheduler.is_idle:
        engine.scheduler.step()
    assert engine.scheduler.calling == {texts[0]} and list(engine.scheduler.waiting) == [texts[1]]
    assert engine.scheduler.num_running == 1
    answered.set()
    engine.scheduler.wait()
    assert not engine.scheduler.is_idle
    while any(text.finish_reason is None for text in texts):
        engine.scheduler.wait() if engine.scheduler.is_idle else engine.scheduler.step()
    assert all(text.tokens for text in texts)


def test_logprobs_are_of_the_model_whatever_is_penalized(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the cat", prepend="<|bos|>")
    params = SamplingParams(
        0, repetition_penalty=5, presence_penalty=1, logit_bias=((7, 5.0),), max_tokens=8, logprobs=0, ignore_eos=True
    )
    (row,) = run_texts(engine, [Sequence(prompt, params)])
    expected = engine.model(torch.tensor([prompt + row.tokens]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert [entry.logprob for entry in row.logprobs] == pytest.approx(expected[range(8), row.tokens].tolist(), abs=1e-3)


def test_of_several_stop_texts_the_first_place_counts(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    the = tokenizer.encode("the")
    assert len(the) == 1
    make_it_say(engine, monkeypatch, the)
    (row,) = run_texts(engine, [Sequence([1, 2], SamplingParams(seed=1000, max_tokens=9, stop=("e", "h")))])
    assert row.text == "t"


def test_a_text_that_a_stopping_server_ends_is_shown_to_its_last_token(engine: Engine, tokenizer: Tokenizer) -> None:
    """Also what was held back because it may have been the beginning of a stop text."""
    prompt, params = tokenizer.encode("the cat", prepend="<|bos|>"), SamplingParams(0, ignore_eos=True)
    (free,) = run_texts(engine, [Sequence(prompt, replace(params, max_tokens=20))])
    ended = Sequence(prompt, replace(params, stop=(free.text[-1] + "\0",)))
    engine.scheduler.submit(ended)
    while len(ended.tokens) < 20:
        engine.scheduler.step()
    assert ended.text == free.text[:-1]
    engine.scheduler.end_all("cancelled")
    assert ended.text == free.text


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=6))
def test_the_shortest_text_is_held_back(text: str, stop: str) -> None:
    """From the first place on whose rest is a beginning of the stop text."""
    if stop not in text:
        assert _beginning(stop, text) == min(at for at in range(len(text) + 1) if stop.startswith(text[at:]))


def test_a_text_that_was_only_submitted_waits(engine: Engine) -> None:
    text = Sequence([1], SamplingParams(0))
    engine.scheduler.submit(text)
    assert engine.scheduler.num_waiting == 1
    engine.scheduler.end_all("cancelled")
    assert engine.scheduler.num_waiting == 0 and text.finish_reason == "cancelled"


def test_a_text_that_was_given_up_before_it_came_is_not_begun(engine: Engine) -> None:
    text = Sequence([1], SamplingParams(0))
    engine.scheduler.cancel(text)
    engine.scheduler.submit(text)
    engine.scheduler.step()
    assert engine.scheduler.is_idle and not text.tokens and text.finish_reason == "cancelled"


def test_a_prompt_that_is_given_up_halfway_leaves_nothing(engine: Engine) -> None:
    engine.scheduler.chunk = 16
    text = Sequence([1] * 50, SamplingParams(0))
    engine.scheduler.submit(text)
    engine.scheduler.step()
    assert engine.scheduler.prefilling is text
    engine.scheduler.cancel(text)
    engine.scheduler.step()
    assert engine.scheduler.is_idle and engine.scheduler.num_running == 0 and not text.tokens
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_blocks - 1


def test_what_is_posted_may_fail_without_any_text(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    text = Sequence([1], SamplingParams(0, max_tokens=3, ignore_eos=True))
    engine.scheduler.post(lambda: 1 / 0)
    engine.scheduler.wait()
    engine.scheduler.submit(text)
    engine.scheduler.post(lambda: 1 / 0)
    while text.finish_reason is None:
        engine.scheduler.step()
    assert text.finish_reason == "length" and caplog.text.count("ZeroDivisionError") == 2


def test_texts_that_wait_for_a_tool_are_ended_too(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    engine.scheduler.calculator = lambda expression: str(release.wait(10))
    make_it_say(engine, monkeypatch, calculator_call(tokenizer, "1"))
    slow = Sequence([1, 2], SamplingParams(seed=1000, max_tokens=20))
    engine.scheduler.submit(slow)
    while not engine.scheduler.calling:
        engine.scheduler.step()
    engine.scheduler.end_all("error", "failed")
    release.set()
    engine.scheduler.wait(10)  # its answer comes too late
    assert slow.finish_reason == "error" and engine.scheduler.num_running == 0


def test_a_text_that_is_put_back_is_counted_once(engine: Engine) -> None:
    text = Sequence(list(range(2, 52)), SamplingParams(0, max_tokens=40, prompt_logprobs=True, ignore_eos=True))
    engine.scheduler.submit(text)
    for _ in range(20):
        engine.scheduler.step()
    engine.scheduler._preempt(text)
    run_texts(engine, [Sequence([1], SamplingParams(0, max_tokens=1))])
    while text.finish_reason is None:
        engine.scheduler.step()
    assert len(text.prompt_logprobs) == 49
    assert text.cached_tokens == 0 and engine.scheduler.prompt_tokens == 51


def test_the_youngest_text_gives_way(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the oldest is never put back, and all come to their end."""
    poor = Engine(engine.model, engine.tokenizer, kv_tokens=512).scheduler
    texts = [Sequence([i + 1], SamplingParams(0, max_tokens=250, ignore_eos=True)) for i in range(3)]
    preempt, chosen = poor._preempt, []
    monkeypatch.setattr(poor, "_preempt", lambda text: chosen.append(text) or preempt(text))
    for text in reversed(texts):
        poor.submit(text)
    while not poor.is_idle:
        poor.step()
    assert texts[2] in chosen and texts[0] not in chosen
    assert all(len(text.tokens) == 250 for text in texts)


def test_a_text_that_is_put_back_is_the_next_to_run(engine: Engine) -> None:
    one_row = Engine(engine.model, engine.tokenizer, max_rows=1).scheduler
    texts = [Sequence([1, 2], SamplingParams(0, max_tokens=9, ignore_eos=True)) for _ in range(2)]
    for text in texts:
        one_row.submit(text)
    one_row.step()
    one_row._preempt(texts[0])
    assert list(one_row.waiting) == texts


def test_a_text_is_its_prompt_and_what_follows() -> None:
    text, whole = Sequence([5, 6, 7], tokens=[8, 9]), [5, 6, 7, 8, 9]
    assert text.length == 5
    assert [text.token_at(i) for i in range(5)] == whole
    assert [text.token_before(i) for i in range(5)] == [5, *whole[:-1]]
    for start in range(6):
        for end in range(start, 6):
            assert text.slice(start, end) == whole[start:end]


def test_the_token_that_ends_an_answer_has_no_logprob(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_it_say(engine, monkeypatch, [7, 8, tokenizer.encode_special("<|assistant_end|>")])
    (text,) = run_texts(engine, [Sequence([1, 2], SamplingParams(seed=1000, max_tokens=20, logprobs=0))])
    choice = Reply("chat", "m", tokenizer, False).chat_choice(0, text)
    assert len(choice["logprobs"]["content"]) == 2


@pytest.mark.parametrize("name", ["<|assistant_end|>", "<|bos|>"])
def test_an_answer_ends_where_the_model_says_so(
    name: str, engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = tokenizer.encode_special(name)
    make_it_say(engine, monkeypatch, [7, end])
    (text,) = run_texts(engine, [Sequence([1, 2], SamplingParams(seed=1000, max_tokens=20))])
    assert (text.tokens, text.stop_token, text.finish_reason) == ([7], end, "stop")


def test_the_end_of_a_call_that_never_began_is_a_token_like_others(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.scheduler.calculator = lambda expression: "42"
    said, times = [7, calculator_call(tokenizer, "")[-1], 8], set()
    make_it_say(engine, monkeypatch, said)
    text = Sequence([1, 2], SamplingParams(seed=1000, max_tokens=5), lambda text: times.add(text.first_token_at))
    run_texts(engine, [text])
    assert text.tokens == [*said, 5, 5] and set(text.masks) == {1}
    assert len(times) == 1  # when its first token came does not change


def test_a_forced_answer_ends_with_the_context(engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.scheduler.calculator = lambda expression: "123456789" * 3
    make_it_say(engine, monkeypatch, said := calculator_call(tokenizer, "x"))
    (text,) = run_texts(engine, [Sequence([1] * (510 - len(said)), SamplingParams(seed=1000))])
    assert text.length == 512 and text.finish_reason == "context" and text.masks == [1] * len(said) + [0, 0]


def test_a_text_waits_for_the_memory_of_one_that_calls_a_tool(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    poor = Engine(engine.model, tokenizer, lambda expression: "1" if answered.wait(60) else None, kv_tokens=512)
    make_it_say(poor, monkeypatch, said := calculator_call(tokenizer, "x"))
    texts = [Sequence([i + 1] * 300, SamplingParams(seed=seed, max_tokens=9)) for i, seed in enumerate((1000, 0))]
    for text in texts:
        poor.scheduler.submit(text)
    while not poor.scheduler.is_idle:
        poor.scheduler.step()
    assert poor.scheduler.calling == {texts[0]} and list(poor.scheduler.waiting) == [texts[1]]
    answered.set()
    run_texts(poor, [Sequence([9], SamplingParams(max_tokens=1))])
    while any(text.finish_reason is None for text in texts):
        poor.scheduler.step()
    assert texts[0].tokens[: len(said)] == said and texts[1].tokens == [5] * 9


def test_each_text_has_the_probabilities_of_its_prompt_that_it_asks_for(engine: Engine) -> None:
    """Also where another one's computation of the same prompt could be shared."""
    prompt = list(range(1, 2 * BLOCK_SIZE + 3))
    asked = [SamplingParams(0, max_tokens=2, seed=i, prompt_logprobs=i != 1, ignore_eos=True) for i in range(4)]
    texts = run_texts(engine, [Sequence(prompt, params) for params in asked])
    assert [len(text.prompt_logprobs) for text in texts] == [len(prompt) - 1, 0, len(prompt) - 1, len(prompt) - 1]


@pytest.mark.parametrize("length", [3, BLOCK_SIZE, 2 * BLOCK_SIZE + 5])
@pytest.mark.parametrize("room", [{}, {"max_rows": 2}, {"kv_tokens": 512}])
def test_samples_of_a_prompt_are_what_each_is_alone_and_cost_one_computation(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, length: int, room: dict[str, int]
) -> None:
    """Also where few have a row at once, some end with their first token, and memory is short; nothing is left in use."""
    prompts = [[1, *range(7 + i, 6 + i + length)] for i in range(2)]
    asked = [(p, SamplingParams(seed=i, max_tokens=1 + i % 3 * 20)) for p in prompts for i in range(9)]
    alone = []
    for prompt, params in asked:
        engine.forget()
        alone.append(engine.complete([prompt], params)[0].tokens)
    other, computed = Engine(engine.model, engine.tokenizer, **room), []
    prefill = other.scheduler.runner.prefill
    monkeypatch.setattr(
        other.scheduler.runner, "prefill", lambda tokens, *rest: computed.append(len(tokens)) or prefill(tokens, *rest)
    )
    assert [s.tokens for s in run_texts(other, [Sequence(*one) for one in asked])] == alone
    assert computed == [length, length]
    assert other.scheduler.cached_tokens == 16 * length
    other.scheduler.step()
    assert other.scheduler.allocator.num_free == other.scheduler.allocator.num_blocks - 1


@pytest.mark.parametrize("rows", [3, 12])
def test_samples_give_way_where_memory_runs_out(engine: Engine, rows: int) -> None:
    asked = [(list(range(1, 21)), SamplingParams(seed=i, max_tokens=160, ignore_eos=True)) for i in range(6)]
    alone = [run_texts(engine, [Sequence(*one)])[0].tokens for one in asked]
    poor = Engine(engine.model, engine.tokenizer, max_rows=rows, kv_tokens=512)
    assert [s.tokens for s in run_texts(poor, [Sequence(*one) for one in asked])] == alone
    assert poor.scheduler.preemptions > 0
    assert poor.scheduler.allocator.num_free == 32


@pytest.mark.parametrize("length", [3, BLOCK_SIZE, BLOCK_SIZE + 3])
def test_a_text_that_runs_while_weights_change_shares_nothing_afterwards(engine: Engine, length: int) -> None:
    running = Sequence(list(range(1, length + 1)), SamplingParams(max_tokens=3 * BLOCK_SIZE, ignore_eos=True))
    running.on_update = lambda text: engine.forget() if len(text.tokens) == 1 else None
    run_texts(engine, [running])
    (after,) = run_texts(engine, [Sequence(running.prompt + running.tokens, SamplingParams(max_tokens=1))])
    assert after.cached_tokens == 0


def test_weights_that_changed_share_nothing_with_the_old(engine: Engine) -> None:
    prompt = list(range(40))
    before = engine.complete([prompt], SamplingParams(0, max_tokens=8))[0].tokens
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(-0.5)
    engine.forget()
    after = engine.complete([prompt], SamplingParams(0, max_tokens=8))[0]
    assert after.cached_tokens == 0
    assert after.tokens == Engine(engine.model, engine.tokenizer).complete([prompt], SamplingParams(0, max_tokens=8))[0].tokens
    assert after.tokens != before


def test_a_prompt_is_computed_by_one_set_of_weights(engine: Engine) -> None:
    """Those after the change, if they change between two of its chunks; log-probabilities of it are not doubled."""

    def ask() -> list[Sequence]:
        params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=True, ignore_eos=True)
        return [Sequence([1 + i % 200 for i in range(engine.scheduler.chunk + 100)], params), Sequence([5] * 40, params)]

    texts, chunk = ask(), engine.scheduler.chunk
    for text in texts:
        engine.scheduler.submit(text)
    engine.scheduler.step()
    assert engine.scheduler.prefilling is texts[0] and texts[0].computed == chunk and engine.scheduler.num_running == 1
    with torch.no_grad():
        engine.model.blocks[0].attn.c_v.weight.neg_()
    engine.forget()
    while not engine.scheduler.is_idle:
        engine.scheduler.step()
    changed = Engine(engine.model, engine.tokenizer)
    for text, expected in zip(texts, run_texts(changed, ask()), strict=True):
        assert text.tokens == expected.tokens and text.prompt_logprobs == expected.prompt_logprobs
        assert text.logprobs == expected.logprobs
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_blocks - 1


@pytest.mark.parametrize("end", ["cancel", "forget", "end_all"])
def test_a_prompt_is_held_no_longer_than_texts_wait_for_it(engine: Engine, end: str) -> None:
    one_row = Engine(engine.model, engine.tokenizer, max_rows=1).scheduler
    texts = [Sequence([1, 2, 3], SamplingParams(seed=i, max_tokens=30, ignore_eos=True)) for i in range(3)]
    for text in texts:
        one_row.submit(text)
    one_row.step()
    assert one_row._computed is not None and one_row.num_waiting == 2
    if end == "cancel":
        one_row.cancel(texts[1])
        one_row.cancel(texts[2])
        one_row.take_messages()
    elif end == "forget":
        one_row.forget()
    else:
        one_row.end_all("cancelled")
    assert one_row._computed is None
    one_row.cancel(texts[0])
    one_row.take_messages()
    while not one_row.is_idle:
        one_row.step()
    assert one_row.allocator.num_free == one_row.allocator.num_blocks - 1


def test_many_short_prompts_do_not_hold_up_running_texts(engine: Engine) -> None:
    """A prefill reads all weights, however few tokens it has."""
    running = Sequence([1, 2], SamplingParams(max_tokens=100, ignore_eos=True))
    engine.scheduler.submit(running)
    engine.scheduler.step()
    short = [Sequence([3, i], SamplingParams(max_tokens=1)) for i in range(40)]
    for text in short:
        engine.scheduler.submit(text)
    before = len(running.tokens)
    engine.scheduler.step()
    assert len(running.tokens) == before + 1
    assert 0 < sum(text.finish_reason is not None for text in short) <= 10


def test_there_is_memory_for_what_was_asked_and_for_one_whole_text() -> None:
    """And a block that nobody has."""
    model = make_model(sequence_len=512)
    blocks = [scheduler._choose_num_blocks(model, max_rows=1, kv_tokens=tokens) - 1 for tokens in (1, 512, 513, 600)]
    assert [n * BLOCK_SIZE for n in blocks] == [512, 512, 512 + BLOCK_SIZE, -(-600 // BLOCK_SIZE) * BLOCK_SIZE]


def test_memory_that_was_freed_is_free_for_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU, where PyTorch keeps it: weights were cast, or a pass of training has ended."""
    model, kept = make_model(sequence_len=512), [6 << 20]
    monkeypatch.setattr(model, "get_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((8 << 20) - sum(kept), 16 << 20))
    blocks = scheduler._choose_num_blocks(model, max_rows=1000, kv_tokens=0) - 1
    assert blocks == (2 << 20) // KVBlocks.bytes_per_block(model.config, torch.float32)

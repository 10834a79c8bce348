"""Generation: cached equals plain, a text is its own whoever else is there, tools force tokens, contexts end."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch

from nanochat.common import NanochatError
from nanochat.compilation import can_compile
from nanochat.engine import Engine
from nanochat.engine_thread import EngineThread
from nanochat.runner import prepare_for_inference
from nanochat.sampling import SamplingParams
from nanochat.sequence import Sequence, joined_parts
from nanochat.tokenizer import Tokenizer
from tests.helpers import calculator_call, make_engine, make_it_say, make_model, make_prompts, run_texts, wait_for


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    return make_engine(tokenizer, calculator=lambda expression: "42")


def _free_blocks(engine: Engine) -> int:
    return engine.scheduler.allocator.num_free


# ----------------------------------------------------------------------------- what is generated


def test_greedy_equals_plain_generation(engine: Engine, tokenizer: Tokenizer) -> None:
    """Past the window, over several blocks, whatever the length of the prompt."""
    engine.scheduler.stop_ids = set()
    for prompt in make_prompts(tokenizer):
        expected = list(engine.model.generate(prompt, 150, temperature=0))
        (result,), _ = engine.generate_batch(prompt, max_tokens=150, temperature=0)
        assert [t for t in result[len(prompt) :]] == expected


def test_a_text_does_not_depend_on_its_company(engine: Engine, tokenizer: Tokenizer) -> None:
    """Drawn or greedy; alone, among 31 others, and where memory is so short that texts are put back and computed again."""
    prompts = [prompt[:n] for prompt in make_prompts(tokenizer) for n in range(2, 10)]
    params = [
        SamplingParams(i // 3 % 2, top_k=i % 3 * 10, top_p=1 - i % 2 * 0.2, min_p=i % 5 * 0.02, seed=i,
                       repetition_penalty=1 + i % 2 * 0.3, frequency_penalty=i % 4 / 4, max_tokens=40 + i, ignore_eos=True)
        for i in range(len(prompts))
    ]  # fmt: skip
    alone = [run_texts(engine, [Sequence(p, s)])[0].tokens for p, s in zip(prompts, params, strict=True)]
    together = run_texts(engine, [Sequence(p, s) for p, s in zip(prompts, params, strict=True)])
    assert [s.tokens for s in together] == alone
    assert [len(tokens) for tokens in alone] == [40 + i for i in range(len(prompts))]
    poor = Engine(engine.model, tokenizer, engine.scheduler.calculator, kv_tokens=512)
    assert [s.tokens for s in run_texts(poor, [Sequence(p, s) for p, s in zip(prompts, params, strict=True)])] == alone
    assert poor.scheduler.preemptions > 0
    assert _free_blocks(poor) == 32


def test_a_text_that_was_put_back_is_the_same_in_bfloat16(tokenizer: Tokenizer) -> None:
    """Where prefill rounds what decoding had computed otherwise, and a model of this size shows it."""
    model = make_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=512, n_embd=128)
    model.compute_dtype = torch.bfloat16
    prompts = [list(range(1, 20 + 3 * i)) for i in range(5)]
    params = SamplingParams(0, max_tokens=100, ignore_eos=True)
    alone = []
    for prompt in prompts:
        alone += [row.tokens for row in Engine(model, tokenizer).complete([prompt], params)]
    poor = Engine(model, tokenizer, kv_tokens=512)
    assert [row.tokens for row in poor.complete(prompts, params)] == alone
    assert poor.scheduler.preemptions > 0


def test_texts_come_and_go_at_any_step(engine: Engine, tokenizer: Tokenizer) -> None:
    prompts = make_prompts(tokenizer)
    expected = [run_texts(engine, [Sequence(p, SamplingParams(0, max_tokens=30))])[0].tokens for p in prompts]
    late = [Sequence(p, SamplingParams(0, max_tokens=30)) for p in prompts]
    for sequence in late:
        engine.scheduler.submit(sequence)
        for _ in range(7):
            engine.scheduler.step()
    while not engine.scheduler.is_idle:
        engine.scheduler.step()
    assert [s.tokens for s in late] == expected


def test_samples_differ_and_depend_on_their_seed_alone(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = make_prompts(tokenizer)[0]
    five, _ = engine.generate_batch(prompt, 5, max_tokens=12, seed=7)
    assert len({tuple(tokens) for tokens in five}) > 1
    assert len({tokens[len(prompt)] for tokens in five if len(tokens) > len(prompt)}) > 1  # also in the first token
    assert engine.generate_batch(prompt, 5, max_tokens=12, seed=7)[0] == five
    for i in range(5):
        assert engine.generate_batch(prompt, 1, max_tokens=12, seed=7 + i)[0] == [five[i]]


def test_streaming_gives_what_the_batch_gives(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.scheduler.stop_ids = set(range(0, 400, 7))
    prompt = make_prompts(tokenizer)[3]
    assert engine.generate_batch(prompt, max_tokens=9, top_p=1e-6) == engine.generate_batch(
        prompt, max_tokens=9, temperature=0
    )
    whole, _ = engine.generate_batch(prompt, 4, max_tokens=20, seed=3)
    columns = list(engine.generate(prompt, 4, max_tokens=20, seed=3))
    for i, tokens in enumerate(whole):
        column = [tokens_at[i] for tokens_at, _ in columns]
        generated = tokens[len(prompt) :]
        assert column[: len(generated)] == generated
        assert len(set(column[len(generated) :])) <= 1  # then its stop token, again and again


def test_stop_tokens_end_a_row_and_the_rest_go_on(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.scheduler.stop_ids = set(range(0, 400, 7))
    rows = engine.complete(make_prompts(tokenizer) * 3, SamplingParams(max_tokens=40))
    assert {row.finish_reason for row in rows} >= {"stop"}
    assert len({len(row.tokens) for row in rows}) > 1
    for row in rows:
        assert not set(row.tokens) & engine.stop_ids
        assert len(row.tokens) == len(row.masks)


def test_generation_ends_with_the_context(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.scheduler.stop_ids = set()
    prompt = [tokenizer.get_bos_token_id()] * 505
    (row,) = engine.complete([prompt], SamplingParams(0))
    assert row.finish_reason == "context"
    assert len(row.prompt) + len(row.tokens) == 512
    with pytest.raises(NanochatError, match="leaves no room"):
        engine.complete([prompt * 2], SamplingParams())
    with pytest.raises(NanochatError, match="empty prompt"):
        engine.complete([prompt, []], SamplingParams())
    assert engine.scheduler.is_idle and not engine.scheduler.num_waiting  # the first is not left behind
    with pytest.raises(NanochatError, match="top_p cannot be 0"):
        SamplingParams(top_p=0)


def test_a_step_never_computes_two_chunks_of_prompts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, sizes = engine.scheduler, []
    scheduler.chunk = 32
    prefill = scheduler.runner.prefill
    monkeypatch.setattr(scheduler.runner, "prefill", lambda tokens, *rest: sizes.append(len(tokens)) or prefill(tokens, *rest))
    for i, length in enumerate((31, 32, 100, 1, 31, 64)):
        scheduler.submit(Sequence([i + 1] * length, SamplingParams(0, max_tokens=3, ignore_eos=True)))
    steps = []
    while not scheduler.is_idle:
        sizes.clear()
        scheduler.step()
        steps.append(sum(sizes))
    assert sum(steps) == 31 + 32 + 100 + 1 + 31 + 64 and 32 < max(steps) < 64


def test_stop_texts_end_an_answer_and_are_left_out(engine: Engine, tokenizer: Tokenizer) -> None:
    """Also one that is spread over tokens, of which nothing is shown before it is sure."""
    prompt = make_prompts(tokenizer)[0]
    params = SamplingParams(0, max_tokens=60, ignore_eos=True)
    (free,) = run_texts(engine, [Sequence(prompt, params)])
    assert len(free.text) > 30
    for stop in (free.text[9:16], free.text[20]):
        shown: list[str] = []
        sequence = Sequence(prompt, SamplingParams(0, max_tokens=60, ignore_eos=True, stop=("never said", stop)))
        sequence.on_update = lambda s, shown=shown: shown.append(s.text)
        run_texts(engine, [sequence])
        assert sequence.text == free.text[: free.text.index(stop)]
        assert sequence.finish_reason == "stop"
        assert all(sequence.text.startswith(text) for text in shown)
    (unstopped,) = run_texts(engine, [Sequence(prompt, SamplingParams(0, max_tokens=60, ignore_eos=True, stop=("\0",)))])
    assert unstopped.text == free.text


def test_what_is_read_at_the_end_is_all(engine: Engine, tokenizer: Tokenizer) -> None:
    """Another thread that sees a finish_reason finds the last piece, which a stop text held back, and the error there."""
    at_the_end: list[tuple[str, str | None]] = []

    class Watched(Sequence):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "finish_reason" and value is not None:
                at_the_end.append((self.text, self.error))

    prompt = make_prompts(tokenizer)[0]
    (free,) = run_texts(engine, [Sequence(prompt, SamplingParams(0, max_tokens=20, ignore_eos=True))])
    params = SamplingParams(0, max_tokens=20, ignore_eos=True, stop=(free.text[-1] + "\0",))
    (held,) = run_texts(engine, [Watched(prompt, params)])
    assert held.text == free.text
    failed = Watched(prompt, params)
    engine.scheduler.submit(failed)
    engine.scheduler.end_all("error", "it broke")
    assert at_the_end == [(free.text, None), ("", "it broke")]


def test_a_repetition_penalty_keeps_a_text_from_repeating_itself(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = list(dict.fromkeys(make_prompts(tokenizer)[3]))
    for penalty, repeats in ((1.0, True), (100.0, False)):
        params = SamplingParams(0, repetition_penalty=penalty, max_tokens=40, ignore_eos=True)
        (row,) = run_texts(engine, [Sequence(prompt, params)])
        assert (len(set(prompt + row.tokens)) < len(prompt + row.tokens)) == repeats


def test_logprobs_are_those_of_the_model(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = make_prompts(tokenizer)[3]
    (sequence,) = run_texts(engine, [Sequence(prompt, SamplingParams(0.7, seed=5, max_tokens=8, logprobs=3, ignore_eos=True))])
    ids = torch.tensor([prompt + sequence.tokens])
    with torch.no_grad():
        expected = engine.model(ids)[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert len(sequence.logprobs) == 8
    for entry, token, row in zip(sequence.logprobs, sequence.tokens, expected, strict=True):
        assert entry.token == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()


def test_logprobs_of_the_prompt(engine: Engine, tokenizer: Tokenizer) -> None:
    """Over several chunks, also where nothing is generated, and where the prompt's blocks are known already."""
    engine.scheduler.chunk = 16
    prompt = make_prompts(tokenizer)[1][:50]
    engine.complete([prompt], SamplingParams(max_tokens=2))
    with torch.no_grad():
        expected = engine.model(torch.tensor([prompt]))[0].log_softmax(-1)
    for max_tokens in (0, 3):
        params = SamplingParams(0, max_tokens=max_tokens, logprobs=1, prompt_logprobs=True, ignore_eos=True)
        (sequence,) = run_texts(engine, [Sequence(prompt, params)])
        assert len(sequence.tokens) == len(sequence.logprobs) == max_tokens
        assert [entry.token for entry in sequence.prompt_logprobs] == prompt[1:]
        for entry, row in zip(sequence.prompt_logprobs, expected, strict=False):
            assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-3)
    assert _free_blocks(engine) == engine.scheduler.allocator.num_blocks - 1


# ----------------------------------------------------------------------------- memory


def test_shared_prefixes_are_computed_once(engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_prompts(tokenizer)[1], [*make_prompts(tokenizer)[1][:60], 5, 6, 7]
    fresh = Engine(engine.model, tokenizer).generate_batch(second, max_tokens=10, temperature=0)
    engine.generate_batch(first, max_tokens=10, temperature=0)
    computed: list[int] = []
    prefill = engine.scheduler.runner.prefill
    monkeypatch.setattr(
        engine.scheduler.runner, "prefill", lambda tokens, *rest: computed.append(len(tokens)) or prefill(tokens, *rest)
    )
    assert engine.generate_batch(second, max_tokens=10, temperature=0) == fresh
    assert computed == [len(second) - 48]  # three blocks of 16 are shared, the fourth is not full
    (row,) = engine.complete([second], SamplingParams(0, max_tokens=10))
    assert row.cached_tokens == 48


def test_a_conversation_goes_on_from_its_last_turn(engine: Engine, tokenizer: Tokenizer) -> None:
    (turn,) = engine.complete([make_prompts(tokenizer)[3]], SamplingParams(0, max_tokens=100))
    longer = turn.prompt + turn.tokens + [5, 6, 7]
    (next_turn,) = engine.complete([longer], SamplingParams(0, max_tokens=5))
    assert next_turn.cached_tokens >= len(longer) - 3 - 16
    fresh = Engine(engine.model, tokenizer).complete([longer], SamplingParams(0, max_tokens=5))[0]
    assert next_turn.tokens == fresh.tokens


def test_all_memory_comes_back(engine: Engine, tokenizer: Tokenizer) -> None:
    """Whatever ends a text: its end, its stop text, a cancellation in any state, a listener that leaves."""
    free = _free_blocks(engine)
    sequences = [Sequence(p, SamplingParams(max_tokens=50, seed=i)) for i, p in enumerate(make_prompts(tokenizer) * 12)]
    for sequence in sequences:
        engine.scheduler.submit(sequence)
    for n in range(30):
        engine.scheduler.cancel(sequences[-n])
        engine.scheduler.step()
    engine.scheduler.end_all("cancelled")
    assert _free_blocks(engine) == free
    assert all(s.finish_reason for s in sequences)
    stream = engine.generate(make_prompts(tokenizer)[0], 3)
    next(stream)
    stream.close()
    assert _free_blocks(engine) == free
    assert engine.scheduler.is_idle


def test_an_engine_leaves_nothing_behind(engine: Engine, tokenizer: Tokenizer) -> None:
    """Also without the garbage collector, which training switches off between its samples."""
    gc.disable()
    try:
        other = Engine(engine.model, tokenizer)
        other.complete(make_prompts(tokenizer), SamplingParams(max_tokens=3))
        keys = weakref.ref(other.scheduler.runner.memory.keys[0])
        del other
        assert keys() is None
    finally:
        gc.enable()


def test_a_long_prompt_does_not_stall_others(engine: Engine, tokenizer: Tokenizer) -> None:
    engine.scheduler.chunk = 32
    talking = Sequence([1, 2, 3], SamplingParams(0, max_tokens=100, ignore_eos=True))
    engine.scheduler.submit(talking)
    engine.scheduler.step()
    long = Sequence([7] * 400, SamplingParams(0, max_tokens=5))
    engine.scheduler.submit(long)
    before = len(talking.tokens)
    while not long.tokens and not long.finish_reason:
        engine.scheduler.step()
    assert len(talking.tokens) - before >= 400 // 32
    assert long.tokens[0] == next(engine.model.generate([7] * 400, 1, temperature=0))


# ----------------------------------------------------------------------------- tools


def test_a_call_is_answered_with_forced_tokens(engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    engine.scheduler.calculator = lambda expression: asked.append(expression) or "42"
    said = calculator_call(tokenizer, "6*7")
    make_it_say(engine, monkeypatch, said)
    (row,) = run_texts(engine, [Sequence([1, 2], SamplingParams(seed=1000, max_tokens=20))])
    assert asked == ["6*7"]
    special = tokenizer.encode_special
    forced = [special("<|output_start|>"), *tokenizer.encode("42"), special("<|output_end|>")]
    assert row.tokens[: len(said) + len(forced)] == said + forced
    assert set(row.tokens[len(said) + len(forced) :]) == {5}
    assert row.masks == [1] * len(said) + [0] * len(forced) + [1] * (20 - len(said) - len(forced))
    parts = [(text, part) for text, part in row.pieces if text]
    assert "".join(text for text, part in parts if part == "python") == "6*7"
    assert "".join(text for text, part in parts if part == "python_output") == "42"


def test_stop_texts_and_calls_do_not_mix(engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held back before a call is shown before it, and no stop text is found in what is hidden."""
    before, after = tokenizer.encode("the cat"), tokenizer.encode(" sees it")
    said = [*before, *calculator_call(tokenizer, "6*7"), *after]
    forced = 2 + len(tokenizer.encode("42"))
    parts = [("the cat", "text"), ("6*7", "python"), ("42", "python_output"), (" sees it", "text")]
    for stop in (("cat6", "6*", "42", "cat sees"), ("t6", "*7", "it is")):
        make_it_say(engine, monkeypatch, said)
        params = SamplingParams(seed=1000, max_tokens=len(said) + forced, stop=stop)
        (row,) = run_texts(engine, [Sequence([1, 2], params)])
        assert [(part["text"], part["type"]) for part in joined_parts(row.pieces)] == parts
        assert row.finish_reason == "length"
    make_it_say(engine, monkeypatch, said)
    (row,) = run_texts(engine, [Sequence([1, 2], SamplingParams(seed=1000, max_tokens=99, stop=("sees",)))])
    assert row.text == "the cat6*742 " and row.finish_reason == "stop"


def test_half_a_character_before_a_call_stays_there(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tokenizer.tokens.index("é".encode()[:1])
    said = [half, *calculator_call(tokenizer, "6*7")]
    make_it_say(engine, monkeypatch, said)
    (row,) = run_texts(engine, [Sequence([1, 2], SamplingParams(seed=1000, max_tokens=len(said)))])
    assert joined_parts(row.pieces) == [{"type": "text", "text": "\ufffd"}, {"type": "python", "text": "6*7"}]


@pytest.mark.parametrize("answer", [None, ValueError("broken tool")])
def test_a_call_without_an_answer_goes_on(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, answer: Exception | None
) -> None:
    def tool(expression: str) -> None:
        if answer is not None:
            raise answer

    engine.scheduler.calculator = tool
    said = calculator_call(tokenizer, "x")
    make_it_say(engine, monkeypatch, said)
    (row,) = run_texts(engine, [Sequence([1], SamplingParams(seed=1000, max_tokens=10))])
    assert row.tokens == said + [5] * (10 - len(said))
    assert set(row.masks) == {1}


def test_a_slow_tool_delays_only_its_own_text(engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    engine.scheduler.calculator = lambda expression: str(release.wait(10))
    make_it_say(engine, monkeypatch, calculator_call(tokenizer, "1"))
    slow = Sequence([1, 2], SamplingParams(seed=1000, max_tokens=20))
    engine.scheduler.submit(slow)
    others = run_texts(engine, [Sequence([3, 4], SamplingParams(seed=1, max_tokens=60))])
    assert others[0].finish_reason == "length" and slow.finish_reason is None
    release.set()
    while slow.finish_reason is None:
        engine.scheduler.wait(timeout_s=10)
        while not engine.scheduler.is_idle:
            engine.scheduler.step()
    assert tokenizer.encode_special("<|output_end|>") in slow.tokens


# ----------------------------------------------------------------------------- the thread


def test_a_failed_step_ends_its_requests_and_not_the_service(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = EngineThread(engine)
    thread.start()
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler.runner, "decode", lambda *args: 1 / 0)
        failed = Sequence([1, 2], SamplingParams(max_tokens=5, ignore_eos=True))
        engine.scheduler.submit(failed)
        wait_for(lambda: failed.finish_reason, "the failed text to end")
        assert failed.finish_reason == "error" and "server's log" in failed.error
    fine = Sequence([1, 2], SamplingParams(max_tokens=5, ignore_eos=True))
    engine.scheduler.submit(fine)
    wait_for(lambda: fine.finish_reason, "the other to end")
    assert fine.finish_reason == "length"
    endless = Sequence([1, 2], SamplingParams(ignore_eos=True))
    engine.scheduler.submit(endless)
    thread.close()
    assert not thread.is_alive
    assert endless.finish_reason == "cancelled"


def test_what_waits_for_the_compiler_can_be_cancelled_and_the_thread_closed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = threading.Event()
    monkeypatch.setattr(engine, "compile", lambda: compiled.wait(60) and None)
    thread = EngineThread(engine, compile=True)
    thread.start()
    first, second = Sequence([1, 2]), Sequence([1, 2])
    began = time.monotonic()
    for sequence in (first, second):
        engine.scheduler.submit(sequence)
    engine.scheduler.cancel(first)
    wait_for(lambda: first.finish_reason, "the first to end")
    assert first.finish_reason == "cancelled" and second.finish_reason is None
    thread.close()
    assert second.finish_reason == "cancelled" and not thread.is_alive and not thread.ready.is_set()
    assert time.monotonic() - began < 30  # not the minute that the compiler takes
    compiled.set()


# ----------------------------------------------------------------------------- compiled and quantized


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_texts(tokenizer: Tokenizer) -> None:
    """In float32 as uncompiled; and in the dtype at hand, alone as among 31 others, to the last bit of the logits."""
    if reason := can_compile(torch.device("cpu")):
        pytest.skip(f"nothing compiles here: {reason}")
    model = make_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=512)
    prompts = [prompt[:n] for prompt in make_prompts(tokenizer) for n in range(2, 10)]
    plain = Engine(model, tokenizer).complete(prompts, SamplingParams(0, max_tokens=40))
    engine = Engine(model, tokenizer)
    assert engine.compile() is None
    compiled = engine.complete(prompts, SamplingParams(0, max_tokens=40))
    assert [row.tokens for row in compiled] == [row.tokens for row in plain]
    runner = engine.scheduler.runner
    runner.table[:32] = torch.arange(32)[:, None] + 1
    inputs = list(range(32)), list(range(7, 39)), [100 + i for i in range(32)]
    many = runner.decode(*inputs).clone()
    for B in (1, 2, 3, 8, 31):
        some = runner.decode(*(row[:B] for row in inputs))
        assert torch.equal(some, many[:B]) or model.get_compute_dtype() != torch.bfloat16


def test_int8_weights_are_near_the_exact_ones(tokenizer: Tokenizer) -> None:
    vocab_size = tokenizer.get_vocab_size()
    exact, rounded = (make_model(vocab_size=vocab_size, n_embd=64, sequence_len=128) for _ in range(2))
    rounded.load_state_dict(exact.state_dict())
    prepare_for_inference(rounded, "int8")
    ids = torch.tensor([list(range(1, 60))])
    with torch.no_grad():
        a, b = exact(ids), rounded(ids)
    assert (a - b).std() < 0.05 * a.std()
    assert not torch.equal(a, b)
    matrices = rounded.blocks[0].mlp.c_fc
    assert matrices.weight.dtype == torch.int8
    (row,) = Engine(rounded, tokenizer).complete([[1, 2, 3]], SamplingParams(0, max_tokens=5))
    assert row.tokens == list(rounded.generate([1, 2, 3], 5, temperature=0))[: len(row.tokens)]
    with pytest.raises(NanochatError, match="choose auto or int8"):
        prepare_for_inference(exact, "int3")


def test_logits_that_are_no_numbers_end_the_request_and_not_the_engine(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt, params = tokenizer.encode("the cat", prepend="<|bos|>"), SamplingParams(temperature=0, max_tokens=5)
    expected = engine.complete([prompt], params)[0].tokens
    value = engine.model.blocks[0].attn.c_v
    for weights in (engine.model.lm_head.weight.data[0], value.weight.data):  # the latter also fills the cache with them
        before = weights.clone()
        weights.fill_(float("nan"))
        with pytest.raises(NanochatError, match="logits are not finite"):
            engine.complete([prompt * 5], params)
        weights.copy_(before)
        assert engine.complete([prompt], params)[0].tokens == expected

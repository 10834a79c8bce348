"""Drawing tokens: the distribution, its restrictions, and rows that know nothing of each other."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from nanochat import sampling
from nanochat.common import NanochatError
from nanochat.sampling import Adjustment, RowSettings, SamplingParams, policy_logprobs, sample

LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.0])


def _rows(params: list[SamplingParams]) -> RowSettings:
    return RowSettings(params, torch.device("cpu"))


def _draw(n: int, **params: float) -> torch.Tensor:
    rng = random.Random(0)
    return sample(LOGITS.expand(n, -1), _rows([SamplingParams(**params)] * n), [rng.random() for _ in range(n)])


def test_draws_follow_the_distribution() -> None:
    for temperature in (0.5, 1.0, 2.0):
        shares = torch.bincount(_draw(20_000, temperature=temperature), minlength=5) / 20_000
        torch.testing.assert_close(shares, (LOGITS / temperature).softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [({"top_k": 1}, {2}), ({"top_k": 2}, {1, 2, 4}), ({"top_k": 0}, {0, 1, 2, 3, 4}), ({"top_k": 10**30}, {0, 1, 2, 3, 4}),
     ({"top_p": 0.5}, {2}), ({"top_p": 0.6}, {1, 2, 4}), ({"min_p": 0.3}, {1, 2, 4}), ({"min_p": 1.0}, {2}),
     ({"top_k": 3, "top_p": 0.55}, {2}), ({"temperature": 0.0}, {2}), ({"temperature": 1e-300}, {2})],
)  # fmt: skip
def test_restrictions_leave_the_likeliest(params: dict, allowed: set[int]) -> None:
    """Equal logits are all in or all out, so that the order in which they were sorted plays no part."""
    assert set(_draw(3000, **params).tolist()) == allowed


settings_of_a_row = st.builds(
    SamplingParams, temperature=st.floats(0, 100), top_k=st.integers(0, 60), top_p=st.floats(1e-6, 1), min_p=st.floats(0, 1)
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(settings_of_a_row, min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_the_others(rows: list[SamplingParams], seed: int) -> None:
    logits = torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(seed)) * 5
    uniform = [random.Random(seed + i).random() for i in range(len(rows))]
    together = sample(logits, _rows(rows), uniform)
    for i, params in enumerate(rows):
        assert sample(logits[i : i + 1], _rows([params]), uniform[i : i + 1]).item() == together[i].item() < 50


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_a_row_of_many_words_is_added_up_alike_in_any_company(as_on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_sums_vary", lambda device: as_on_a_gpu)
    logits = 3 * torch.randn(5, 131_072, generator=torch.Generator().manual_seed(0))
    rows = [SamplingParams(temperature=0.8, top_p=(1.0, 0.9)[i % 2], top_k=(0, 50)[i // 2 % 2]) for i in range(5)]
    uniform = [(i + 0.5) / 5 for i in range(5)]
    together = sample(logits, _rows(rows), uniform)
    logprobs = policy_logprobs(logits, _rows(rows), together)
    exact = (logits[0].double() / 0.8).log_softmax(-1)[together[0]]
    assert logprobs[0].item() == pytest.approx(exact.item(), abs=1e-5)
    if as_on_a_gpu:  # where sums of floats would depend on it
        order = torch.randperm(131_072, generator=torch.Generator().manual_seed(1))
        assert torch.equal(policy_logprobs(logits[:, order], _rows(rows), order.argsort()[together]), logprobs)
    for some in (slice(0, 1), slice(1, 3), slice(2, 5)):
        assert torch.equal(sample(logits[some], _rows(rows[some]), uniform[some]), together[some])
        assert torch.equal(policy_logprobs(logits[some], _rows(rows[some]), together[some]), logprobs[some])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("value", "words"), [("nan", 1), ("inf", 1), ("nan", 5), ("inf", 5), ("-inf", 5)])
def test_logits_that_are_no_numbers_are_told(value: str, words: int, temperature: float) -> None:
    logits = LOGITS.expand(3, -1).clone()
    logits[1, :words] = float(value)
    drawn = sample(logits, _rows([SamplingParams(temperature=temperature)] * 3), [0.99] * 3)
    assert [token < 0 for token in drawn.tolist()] == [False, True, False]


def test_the_ends_of_the_interval_draw_possible_tokens() -> None:
    logits = torch.tensor([[-1e9, 0.0, 3.0, -1e9]]).expand(2, -1)
    assert sample(logits, _rows([SamplingParams()] * 2), [0.0, 1 - 1e-16]).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"repetition_penalty": 2.0}, [1.0, -4.0, 0.5, 1.0]),  # of prompt and answer
        ({"presence_penalty": 0.5}, [2.0, -2.5, 0.5, 1.0]),  # of the answer alone, once
        ({"frequency_penalty": -0.5}, [2.0, -1.0, 1.5, 1.0]),  # for each time
        ({"logit_bias": ((0, -100.0), (3, 3.0))}, [-98.0, -2.0, 1.0, 4.0]),
        ({"repetition_penalty": 2.0, "presence_penalty": 1.0, "logit_bias": ((1, 1.0),)}, [1.0, -4.0, -0.5, 1.0]),
    ],
)
def test_what_was_said_is_less_likely(settings: dict[str, Any], expected: list[float]) -> None:
    """However many tokens come at a time, and whoever asks twice."""
    logits, prompt, answer, masks = torch.tensor([2.0, -2.0, 1.0, 1.0]), [0], [1, 2, 1], [1] * 3
    at_once, one_by_one = (Adjustment(SamplingParams(**settings), prompt, logits) for _ in range(2))
    assert at_once.apply(logits, answer, masks).tolist() == expected
    for n in (0, 1, 2, 3, 3):
        adjusted = one_by_one.apply(logits, answer[:n], masks[:n])
    assert adjusted.tolist() == expected
    assert logits.tolist() == [2.0, -2.0, 1.0, 1.0]


def test_biases_are_set_at_once_for_all_texts_of_a_request() -> None:
    """In the model's thread, where each operation on a tensor holds up everybody's answers."""

    class Count(TorchFunctionMode):
        n = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += 1
            return func(*args, **(kwargs or {}))

    def operations(biases: int, seed: int) -> int:
        params = SamplingParams(seed=seed, logit_bias=tuple((token, -1.0) for token in range(biases)))
        with Count() as count:
            Adjustment(params, [0], torch.zeros(2000))
        return count.n

    first, many = operations(1, 0), operations(1000, 0)
    assert many == first > operations(1000, 1)


def test_what_a_tool_said_may_be_repeated() -> None:
    """An answer repeats the calculator's number, which the model did not sample."""
    logits = torch.tensor([2.0, 2.0])
    adjustment = Adjustment(SamplingParams(presence_penalty=1.0, frequency_penalty=1.0), [0], logits)
    assert adjustment.apply(logits, [0, 1, 1], [1, 0, 0]).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("name", "fine", "bad"),
    [
        ("temperature", [0, 100], [-1e-6, float("nan")]),
        ("top_k", [0, 10**30], [-1]),
        ("top_p", [1e-6, 1], [0, 1.001]),
        ("min_p", [0, 1], [-1e-6, 1.001]),
        ("repetition_penalty", [0.01, 100], [0, 0.009, 100.1]),
        ("presence_penalty", [-2, 2], [-2.001, 2.001]),
        ("frequency_penalty", [-2, 2], [-2.001, 2.001, float("nan")]),
        ("logit_bias", [((1, -100), (2, 100))], [((1, 1), (2, -100.1)), ((1, 100.1), (2, 1))]),
        ("max_tokens", [None, 0], [-1]),
        ("stop", [(), (" ",)], [("a", ""), ("", "a")]),
        ("logprobs", [None, 0], [-1]),
    ],
)
def test_settings_reach_to_their_limits_and_no_further(name: str, fine: list[Any], bad: list[Any]) -> None:
    for value in fine:
        SamplingParams(**{name: value})
    for value in bad:
        with pytest.raises(NanochatError, match=f"{name} cannot be"):
            SamplingParams(**{name: value})


def test_settings_without_effect_make_no_columns() -> None:
    """On a GPU each column would wait for all computation that was queued before."""
    rows = _rows([SamplingParams(), SamplingParams(seed=1)])
    assert [rows.greedy, rows.temperature, rows.min_p, rows.top_k, rows.top_p] == [None] * 5
    assert not (rows.restricts or rows.all_greedy or rows.to_adjust)


def test_a_row_without_top_k_draws_from_all_beside_one_with_it() -> None:
    logits = torch.arange(50.0, 0, -1).repeat(2, 1) * 1e-3
    params = [SamplingParams(), SamplingParams(top_k=3)]
    drawn = {int(sample(logits, _rows(params), [uniform, 0.5])[0]) for uniform in (0.1, 0.5, 0.9)}
    assert len(drawn) == 3 and max(drawn) > 30

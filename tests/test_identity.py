"""Properties of the conversations about the model itself: what is tested was never trained on, and can still be known."""

from __future__ import annotations

import pytest

from tasks.identity import GREETINGS, TOPICS, Identity


def openings(split: str) -> list[str]:
    """The first message of each conversation of a split, without case and closing mark."""
    task = Identity(split)
    return [task[i]["messages"][0]["content"].lower().rstrip("?.!") for i in range(len(task))]


@pytest.mark.parametrize(("split", "others"), [("val", ("train", "test")), ("test", ("train", "val"))])
def test_what_is_tested_opens_as_nothing_in_another_split_does(split: str, others: tuple[str, str]) -> None:
    tested = openings(split)
    assert not set(tested) & {opening for other in others for opening in openings(other)}
    assert len(tested) == 100 and len(set(tested)) > 10
    last = {Identity(split)[i]["messages"][-1]["content"] for i in range(100)}
    assert all(last & set(answers) for _, answers in TOPICS.values())  # of every topic


def test_every_question_and_most_ways_to_greet_with_it_are_learned() -> None:
    learned = set(openings("train"))
    assert len(openings("train")) == 2_000
    greetings = {greeting.lower() for greeting in GREETINGS if greeting}
    ways = []
    for topic, (questions, _) in TOPICS.items():
        plain = [question.lower().rstrip("?.!") for question in questions]
        assert learned.issuperset(plain)
        if topic not in ("hello", "thanks"):
            ways += [{greeting + question for greeting in greetings} for question in plain]
    assert all(way & learned for way in ways)
    assert sum(len(way & learned) for way in ways) > 0.7 * sum(map(len, ways))

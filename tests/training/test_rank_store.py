"""Ranks agree through a store: gathered in order, decided once, answered to all."""

from __future__ import annotations

import pytest

from tbpo_ray.training.rank_store import RankStore
from tests.training.rank_threads import on_ranks


def test_rank_0_decides_on_what_all_ranks_say(monkeypatch):
    decided = []

    def decide(values):
        decided.append(values)
        return sum(values)

    def work(ranks):
        return [ranks.decide(ranks.rank + 10 * call, decide) for call in range(3)]

    assert on_ranks(monkeypatch, 3, work) == [[3, 33, 63]] * 3
    assert decided == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]


def test_a_decision_that_fails_fails_on_every_rank(monkeypatch):
    def work(ranks):
        with pytest.raises((ZeroDivisionError, RuntimeError), match="division by zero"):
            ranks.decide(1, lambda values: values[0] / 0)
        ranks.meet()
        return ranks.rank

    assert on_ranks(monkeypatch, 2, work) == [0, 1]


def test_one_process_needs_no_store():
    assert RankStore().decide("alone", list) == ["alone"]

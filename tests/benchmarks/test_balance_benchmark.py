"""The benchmark of the distribution across ranks reaches its goals, from the schedule itself."""

from __future__ import annotations

import pytest

from benchmarks import balance
from tbpo_ray.config.schema import Config


def test_no_rank_waits_beyond_the_goals() -> None:
    rows = balance.run(Config(), quick=True)
    assert len(rows) == len(balance.LENGTHS) * len(balance.SIZES)
    for row in rows:
        assert {"lengths", "gpus", "pairs_per_step", "busy"} <= set(row)
        assert row["busy"] <= row["longest_pair_allows"] <= 1
        if row["pairs_per_step"] >= 8 * row["gpus"]:
            assert row["busy"] >= balance.GOAL
        else:
            assert row["busy"] >= balance.GOAL_OF_ALLOWED * row["longest_pair_allows"]
        assert row["busy_padded"] < row["busy"]
    text = balance.markdown(rows)
    assert text.count("reached") == len(rows) and "missed" not in text


@pytest.mark.parametrize("kind", balance.LENGTHS)
def test_lengths_are_reproducible_and_have_a_long_tail(kind: str) -> None:
    lengths = balance.pair_lengths(kind, 4096)
    assert (lengths == balance.pair_lengths(kind, 4096)).all() and lengths.min() >= 1
    totals = lengths.sum(axis=1)
    assert totals.max() > 3 * totals.mean()

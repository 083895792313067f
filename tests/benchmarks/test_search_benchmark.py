"""The benchmark of the search runs, and its figures make sense."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks import search
from benchmarks.search import CASES, LIVE, QUICK_SPACE, SEPARATE, SPACE, STUDY
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.tuning.space import Space

MACHINE = {"processor": "p", "cores": 2, "load": 0.0, "versions": {}}


def test_the_space_has_eight_points() -> None:
    sizes = [len(list(Space.parse(space).grid_points())) for space in (SPACE, QUICK_SPACE)]
    assert sizes == [8, 2]


def test_ratios_and_the_table() -> None:
    variants = {
        STUDY: [{"seconds": 100.0, "cpu_seconds": 150.0, "scorings": 2}],
        SEPARATE: [{"seconds": 250.0, "cpu_seconds": 300.0, "scorings": 16}],
        LIVE: [{"seconds": 120.0, "cpu_seconds": 200.0, "scorings": 0}],
    }
    ratios = search.ratios(variants)
    assert ratios["separate"]["time"]["ratio"] == 2.5 and ratios["cached"]["cpu_time"]["ratio"] == 0.75
    sizes = {"trials": 8, **asdict(CASES["hh_rlhf"]), "parameters": 5_300_000}
    text = search.markdown({"machine": MACHINE, **sizes, "variants": variants, **ratios})
    assert "2.50 [2.50, 2.50] of the study | at least 1.3: reached" in text
    assert "cached over live 0.83 [0.83, 0.83] | at most 0.8: missed | 0.75" in text
    assert "8 trials, 2 at a time" in text and "5.3 M parameters" in text
    assert "evaluated at the end" in text and "separate runs are" in text


def test_two_studies_alone() -> None:
    variants = {
        STUDY: [{"seconds": 70.0, "cpu_seconds": 100.0, "scorings": 2}],
        LIVE: [{"seconds": 100.0, "cpu_seconds": 200.0, "scorings": 0}],
    }
    sizes = {"trials": 8, **asdict(CASES["ultrafeedback"]), "parameters": 5_300_000}
    text = search.markdown({"machine": MACHINE, **sizes, "variants": variants, **search.ratios(variants)})
    assert "cached over live 0.70 [0.70, 0.70] | at most 0.8: reached | 0.50" in text
    assert "evaluated every 4 steps" in text and "separate" not in text


def test_an_unknown_case_is_named() -> None:
    with pytest.raises(InputError, match="search:ultra"):
        search.run(Config(), only="ultra")


@pytest.mark.e2e
@pytest.mark.slow
def test_quick_search_run() -> None:
    result = json.loads(json.dumps(search.run(Config(), quick=True)))
    (study,), (separate,), (live,) = (result["variants"][variant] for variant in (STUDY, SEPARATE, LIVE))
    assert study["trials"] == separate["trials"] == result["trials"] == 2
    # Of training and of held-out pairs: by the study once, by each separate run, never with a live model.
    assert (study["scorings"], separate["scorings"], live["scorings"]) == (2, 4, 0)
    assert study["cpu_seconds"] > 0 and result["separate"]["time"]["ratio"] > 0
    assert "separate runs" in search.markdown(result)

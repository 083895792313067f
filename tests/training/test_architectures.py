"""Models of many architectures: right log-probs in both layouts and attentions, or the layout is not used."""

from __future__ import annotations

import json

import pytest

from tests.training.architectures import ARCHITECTURES, TABLE, TinyModel, deviation

EXACT = 1e-5
ROWS = {f"{row['model_type']}, {row['features']}": row for row in json.loads(TABLE.read_text("utf-8"))}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if a.slow else []) for n, a in ARCHITECTURES.items()],
)
def test_log_probs_are_those_of_plain_transformers(name):
    """Each architecture with SDPA and eager attention requested, in shared and in separate rows."""
    tiny = TinyModel(ARCHITECTURES[name])
    plain = tiny.plain_logps()
    for requested in ("sdpa", "eager"):
        model, choice = tiny.choose(requested)
        assert deviation(model, plain, shared=False) < EXACT
        if choice.shared_prompt:
            assert deviation(model, plain, shared=True) < EXACT
        else:
            assert "each answer gets its own row" in choice.sentences[-1]
        if requested == "sdpa":
            found = {"attention": choice.attention, "rows": "shared" if choice.shared_prompt else "separate"}
            assert found == {key: ROWS[name][key] for key in found}


def test_the_table_of_the_documentation_has_every_architecture():
    assert list(ROWS) == list(ARCHITECTURES)
    assert len(ROWS) >= 60 and sum(not a.slow for a in ARCHITECTURES.values()) >= 30

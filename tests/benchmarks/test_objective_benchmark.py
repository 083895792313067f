"""The benchmark of the objectives runs and its figures make sense."""

from __future__ import annotations

import pytest

from benchmarks.objectives import markdown, run
from tbpo_ray.errors import InputError


@pytest.mark.heavy
def test_quick_run_saves_memory_and_prints_tables() -> None:
    result = run(only=["logp_frozen", "step"], quick=True)
    case = result["output_layer"]["logp_frozen"]
    assert case["memory_ratio"] < 1 and case["time_ratio"] > 0
    assert result["step"]["dpo"]["ratio"] == pytest.approx(1, abs=0.5)
    text = markdown(result)
    assert "| logp_frozen |" in text and "| tbpo_a exact_kl |" in text


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(InputError, match="logpp"):
        run(only="logpp")

"""No file of ours has a bare NaN, and readers of metrics cope with what stands in its place."""

from __future__ import annotations

import json
import math

import pytest

from tbpo_ray.data.records import BadRecord
from tbpo_ray.storage.json_lines import dumps, loads_numbers
from tbpo_ray.storage.ownership import WriteLease
from tbpo_ray.training.metrics_file import MetricsFile, read_metrics
from tbpo_ray.tuning.study_state import StudyState, Trial


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(value):
    tree = {"a": value, "b": [1.5, (value,)], "c": {"d": value}, "e": "NaN"}
    assert strict(dumps(tree)) == {"a": None, "b": [1.5, [None]], "c": {"d": None}, "e": "NaN"}
    assert math.isnan(loads_numbers(dumps({"a": value}))["a"])
    bad = BadRecord("s", 0, "not_json", "d", {"x": value})
    assert strict(bad.to_json())["record"] == {"x": None}


def test_finite_values_are_written_as_before():
    tree = {"step": 1, "loss": 0.1 + 0.2, "tiny": 5e-324, "text": "ä", "none": None, "yes": True}
    assert dumps(tree) == json.dumps(tree)
    assert dumps(tree, indent=1, sort_keys=True) == json.dumps(tree, indent=1, sort_keys=True)
    with pytest.raises(TypeError):
        dumps({"a": object()})
    assert dumps({"a": object}, default=lambda x: "object") == '{"a": "object"}'


class _Lease(WriteLease):
    """A lease that always holds."""

    def check(self) -> None:
        pass


def test_a_metrics_file_with_a_value_that_is_not_finite(tmp_path):
    file = MetricsFile(tmp_path, _Lease(str(tmp_path), "token"))
    file.write({"step": 1, "loss": math.nan, "x": 1.0}, {"step": 1, "seconds": math.inf})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "x": 1.0}
    assert strict((tmp_path / "timings.jsonl").read_text()) == {"step": 1, "seconds": None}
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"]) and row["x"] == 1.0


def test_a_study_with_a_value_that_is_not_finite(tmp_path):
    trial = Trial(
        0, {"objective.beta": 0.1}, reports=[{"step": 1, "m": math.nan}], values={"m": math.nan, "n": 2.0}
    )
    StudyState(tmp_path / "study.json", {}, [trial]).save()
    strict((tmp_path / "study.json").read_text())
    (read,) = StudyState.open(tmp_path / "study.json").trials
    assert math.isnan(read.values["m"]) and read.values["n"] == 2.0 and math.isnan(read.reports[0]["m"])
    assert (read.params, read.step) == (trial.params, 0)

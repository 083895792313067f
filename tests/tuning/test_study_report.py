"""The report of a study: the page, the tables, and parameter importance."""

from __future__ import annotations

import csv
import json
import random
import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.config.objective import BregmanConfig
from tbpo_ray.tuning.figures import ramp_color
from tbpo_ray.tuning.importance import comparable_values, importances
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_charts import plane_map, plane_point
from tbpo_ray.tuning.study_report import write_report
from tbpo_ray.tuning.study_state import StudyState, Trial, pareto_front

GENERATOR, LAM, BETA = "objective.bregman.generator", "objective.bregman.lam", "objective.beta"
SPACE = Space.parse(
    {
        GENERATOR: {"choice": ["logistic", "<sba>"]},
        LAM: {"uniform": [-0.5, 1.0], "when": {GENERATOR: "<sba>"}},
        BETA: {"loguniform": [0.01, 1.0]},
        "objective.state_baseline.clip": {"choice": [None, 2.0]},
    }
)
METRIC, KL = "eval/rewards/accuracy", "eval/kl/k3"


def trials(count: int) -> list[Trial]:
    """The generator decides the metric, the rest is noise; every third trial is stopped at step 30."""
    rng = random.Random(1)
    out = []
    for number, params in enumerate(SPACE.random_samples(count, 0)):
        score = 0.5 + 0.2 * (params[GENERATOR] == "<sba>") + 0.02 * rng.random()
        row = {METRIC: score, KL: rng.random()}
        stopped = number % 3 == 2
        # A stopped trial would look worse by its last value alone; at step 30 it is compared fairly.
        last = row if stopped else {METRIC: score + 0.3, KL: row[KL]}
        out.append(
            Trial(number, params, "stopped" if stopped else "finished", [{"step": 30, **row}], last,
                  repeats=[] if stopped else [last, last], step=30 if stopped else 120,
                  seconds=10.0, workers=2)
        )  # fmt: skip
    return out


def test_importance_separates_a_decisive_parameter_from_noise():
    study = trials(24)
    step, values = comparable_values(study, METRIC)
    assert (step, len(values)) == (30, 24)
    ranked = importances(SPACE, study, values)
    assert ranked[0].key == GENERATOR
    assert ranked[0].share > 0.8 and ranked[0].p_value < 0.01
    assert all(item.share < 0.4 for item in ranked[1:])
    in_force = sum(LAM in t.params for t in study)
    assert {item.key: item.trials for item in ranked}[LAM] == in_force < 24


def test_too_few_trials_give_no_importance():
    study = trials(4)
    assert importances(SPACE, study, comparable_values(study, METRIC)[1]) == []


@pytest.fixture
def written(tmp_path):
    config = load_config(None, ["run.name=demo", "tune.repeats=2", f"tune.metric=[{METRIC}, {KL}]",
                                "tune.mode=[max, min]"])  # fmt: skip
    study = trials(12)
    study.append(Trial(12, SPACE.random_samples(1, 5)[0], "failed", reason="the <loss> is NaN"))
    for t in study[:3]:
        run = tmp_path / "trials" / t.name
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": s, METRIC: s / 200, KL: s / 300}) + "\n" for s in (30, 60, 120))
        )
    state = StudyState(tmp_path / "study.json", {"search_seconds": 60.0, "reference_scorings": 2}, study)
    tracker = SimpleNamespace(url_hint=lambda: "mlflow ui")
    front = pareto_front(study, config.tune)
    write_report(config, SPACE, state, front, "It held up.", tmp_path, tracker)  # type: ignore[arg-type]
    return tmp_path, study, front


def test_the_page_is_complete_and_self_contained(written):
    folder, _, front = written
    page = (folder / "report.html").read_text()
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        ET.fromstring(svg)
    charts = re.findall(r'aria-label="([^"]+)"', page)
    assert charts[:3] == ["parameter importance", "parallel coordinates", f"{METRIC} against {KL}"]
    assert f"{METRIC} over step" in charts and f"{KL} over step" in charts
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert not re.search(r"(src|href)=.?(http|//)|@import|url\(|<script", page)
    assert "<sba>" not in page and "&lt;sba&gt;" in page
    assert "t012 failed: the &lt;loss&gt; is NaN" in page
    assert len(front) > 1 and all(f"{trial.name}" in page for trial in front)
    assert "It held up." in page


def test_the_tables_list_every_trial_and_its_cost(written):
    folder, study, _ = written
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == [t.name for t in study]
    assert (rows[0]["seconds"], rows[0]["worker seconds"], rows[0]["step"]) == ("10.0", "20.0", "120")
    assert rows[0][GENERATOR] == study[0].params[GENERATOR]
    kept = json.loads((folder / "trials.json").read_text())
    assert [item["params"] for item in kept] == [t.params for t in study]
    assert (folder / "trials.txt").read_text().count("\n") == 14


def test_the_curve_of_a_stopped_trial_ends_at_its_last_step(written):
    folder, _, _ = written
    page = (folder / "report.html").read_text()
    chart = next(s for s in re.findall(r"<svg.*?</svg>", page, flags=re.S) if f'"{METRIC} over step"' in s)
    paths = {re.search("<title>(t\\d+)", p).group(1): p for p in re.findall(r"<path.*?</path>", chart)}  # type: ignore[union-attr]
    assert paths["t000"].count("L") == 2
    assert paths["t002"].count("L") == 0


PLANE = Space.parse(
    {
        GENERATOR: {"choice": ["beta_family", "logistic", "sba"]},
        "objective.bregman.a_plus_b": {"uniform": [-1.5, 3.0], "when": {GENERATOR: "beta_family"}},
        "objective.bregman.a_minus_b": {"uniform": [0.0, 3.0], "when": {GENERATOR: "beta_family"}},
    }
)


def plane_trials(count: int) -> list[Trial]:
    """Trials over the plane whose metric is highest at (1, 1)."""
    out = []
    for number, params in enumerate(PLANE.random_samples(count, 3)):
        total, difference = (params.get(f"objective.bregman.a_{op}_b", 0.0) for op in ("plus", "minus"))
        score = 0.8 - 0.02 * ((total - 2) ** 2 + difference**2)
        out.append(Trial(number, params, "finished", [{"step": 30, METRIC: score}], {METRIC: score}, step=30))
    return out


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_plane_is_a_map(mode):
    config = load_config(None, [f"tune.metric={METRIC}", f"tune.mode={mode}"])
    study = plane_trials(30)
    values = {t.number: t.values[METRIC] for t in study}
    pick = max if mode == "max" else min
    best = pick(study, key=lambda t: values[t.number])
    svg = plane_map(config, PLANE, study, values, best)
    root = ET.fromstring(svg)
    dots = [c for c in root.iter("circle") if c.find("title") is not None]
    assert len(dots) == 30
    # The best trial is drawn last, in the brightest color and with a ring around it.
    title = dots[-1].find("title")
    assert title is not None and title.text is not None and title.text.startswith(best.name)
    assert dots[-1].get("style") == f"fill:{ramp_color(1.0)}"
    assert dots[0].get("style") == f"fill:{ramp_color(0.0)}"
    texts = {t.text for t in root.iter("text")}
    assert {"logistic", "kliep, sba 0", "lsif, sba 1", "Brier (1, 1)", "a + b", METRIC} <= texts
    assert "(2, 2)" not in texts, "it is outside the space"
    logistic = next(t for t in study if t.params[GENERATOR] == "logistic")
    place = next(d for d in dots if d.find("title").text.startswith(f"{logistic.name} "))  # type: ignore[union-attr]
    assert "a 0, b 0," in place.find("title").text  # type: ignore[union-attr, operator]


def test_a_study_of_other_keys_has_no_map(written):
    folder, study, front = written
    assert plane_map(load_config(None), SPACE, study, {0: 1.0}, front[0]) == ""
    assert "plane of divergences" not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("section", "point"),
    [
        ({"generator": "logistic"}, (0, 0)),
        ({"generator": "sba", "lam": 1.0}, (1, -2)),
        ({"generator": "ba", "lam": -0.5}, (-0.5, -0.5)),
        ({"generator": "beta_family", "a": -2.0, "b": 1.0}, (1, -2)),
        ({"generator": "own.py:loss"}, None),
    ],
)
def test_where_a_generator_is_on_the_plane(section, point):
    assert plane_point(BregmanConfig(**section)) == point

"""Search spaces: faults are reported before anything starts, and proposals are always in the space."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from tbpo_ray.config.loading import load_config, stage_config
from tbpo_ray.errors import InputError
from tbpo_ray.tuning.space import Space

CONFIG = load_config(None)
ROOT = Path(__file__).resolve().parent.parent.parent
SHIPPED = sorted((ROOT / "tune_spaces").glob("*.yaml"))
LAM, GENERATOR, BETA = "objective.bregman.lam", "objective.bregman.generator", "objective.beta"
CONDITIONAL = {
    LAM: {"uniform": [-0.5, 1.0], "when": {GENERATOR: ["ba", "sba"]}},
    GENERATOR: {"choice": ["logistic", "ba", "sba"]},
    BETA: {"loguniform": [0.01, 1.0]},
    "training.micro_batch_pairs": {"randint": [1, 4]},
}


def faults(tree: dict) -> list[str]:
    with pytest.raises(InputError) as caught:
        Space.parse(tree).check(load_config(None))
    return list(caught.value.faults)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"objective.bregman.lm": {"uniform": [0, 1]}}, ["objective.bregman.lm", LAM]),
        ({LAM: -2}, [LAM, "-2", "uniform"]),
        ({LAM: {"choice": [-2]}}, [f"{LAM}=-2", "greater than -1"]),
        ({LAM: {"uniform": [-3, 0]}}, [f"{LAM}=-3"]),
        ({BETA: {"choice": []}}, [BETA, "empty"]),
        ({BETA: {"uniform": [1, 0.5]}}, [BETA, "[0.5, 1]"]),
        ({BETA: {"uniform": [1, 1]}}, [BETA, "lo equals hi"]),
        ({BETA: {"uniform": [1]}}, [BETA, "uniform=[1]"]),
        ({BETA: {"loguniform": [0, 1]}}, [BETA, "loguniform=[0, 1]"]),
        ({BETA: {"uniform": ["1e-6", 1]}}, [BETA, "1.0e-6"]),
        ({BETA: {"unifrom": [0.1, 1]}}, ["unifrom", "uniform"]),
        ({BETA: {"uniform": [0.1, 1], "choice": [1]}}, [BETA, "choice and uniform"]),
        ({"training.micro_batch_pairs": {"randint": [1, 2.5]}}, ["randint=[1, 2.5]"]),
        ({"training.micro_batch_pairs": {"uniform": [1, 4]}}, ["training.micro_batch_pairs", "integer"]),
        ({"objective.name": {"choice": ["dpo", "tbop"]}}, ["objective.name='tbop'"]),
        ({"training.deepspeed.stage": {"choice": [1, 9]}}, ["stage=9", "ZeRO stage"]),
        ({"run.name": {"choice": ["a"]}}, ["run.name"]),
        ({BETA: {"uniform": [0.1, 1], "when": {GENERATOR: "sba"}}}, [BETA, GENERATOR]),
        (CONDITIONAL | {BETA: {"uniform": [0.1, 1], "when": {GENERATOR: "kliep"}}}, [f"{GENERATOR}='kliep'"]),
        (CONDITIONAL | {BETA: {"uniform": [0.1, 1], "when": {LAM: 0.5}}}, [f"{LAM} is a uniform"]),
        ({BETA: {"choice": [1], "when": {BETA: 1}}}, [BETA, "itself"]),
        ({}, ["empty"]),
    ],
)  # fmt: skip
def test_a_fault_names_the_key_and_an_accepted_value(tree, words):
    found = faults(tree)
    assert len(found) == 1
    assert all(word in found[0] for word in words), found


def test_all_faults_are_reported_at_once():
    assert len(faults({BETA: {"choice": []}, LAM: 3, GENERATOR: {"grid": "sba"}})) == 3


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.stem)
def test_shipped_spaces_fit_the_embedded_default(file):
    config = load_config(ROOT / "jobs" / "configs" / "tiny.yaml")
    space = Space.load(str(file))
    space.check(config)
    for params in space.random_samples(50, seed=0):
        stage_config(config, params)


def test_four_spaces_ship():
    assert {f.stem for f in SHIPPED} >= {"divergence", "baseline", "joint", "optimizer"}


def test_a_condition_holds_in_every_sample():
    space = Space.parse(CONDITIONAL)
    assert list(space.parameters).index(GENERATOR) < list(space.parameters).index(LAM)
    samples = space.random_samples(200, seed=1)
    assert all((LAM in values) == (values[GENERATOR] != "logistic") for values in samples)
    assert {values[GENERATOR] for values in samples} == {"logistic", "ba", "sba"}
    assert all(0.01 <= values[BETA] <= 1.0 for values in samples)
    assert {values["training.micro_batch_pairs"] for values in samples} == {1, 2, 3, 4}


def test_a_grid_has_every_active_combination_once():
    space = Space.parse({GENERATOR: {"grid": ["logistic", "sba"]}, BETA: {"choice": [0.1, 0.2]},
                         LAM: {"grid": [0.0, 0.5], "when": {GENERATOR: "sba"}}})  # fmt: skip
    points = list(space.grid_points())
    assert len(points) == 2 + 4
    assert {GENERATOR: "logistic", BETA: 0.1} in points
    with pytest.raises(InputError, match=r"objective\.beta: loguniform has no grid"):
        list(Space.parse(CONDITIONAL).grid_points())


def test_exploring_stays_in_the_space_and_moves():
    space = Space.parse({LAM: {"uniform": [-0.9, 1.0]}, BETA: {"loguniform": [0.01, 1.0]},
                         "objective.bregman.scale": {"choice": [1.0, 2.0, 4.0]}})  # fmt: skip
    rng = random.Random(0)
    here = {LAM: -0.9, BETA: 1.0, "objective.bregman.scale": 4.0}
    found = [space.explore(here, rng) for _ in range(200)]
    assert all(-0.9 <= v[LAM] <= 1.0 and 0.01 <= v[BETA] <= 1.0 for v in found)
    assert {v["objective.bregman.scale"] for v in found} == {1.0, 2.0, 4.0}
    assert len({v[BETA] for v in found}) > 10


def test_only_some_keys_can_change_during_a_run():
    Space.parse(
        {BETA: {"uniform": [0.1, 1]}, "training.learning_rate": {"uniform": [0.1, 1]}}
    ).check_changeable(CONFIG)
    with pytest.raises(InputError, match=r"pbt: objective\.state_baseline\.hidden"):
        Space.parse({"objective.state_baseline.hidden": {"choice": [0, 8]}}).check_changeable(CONFIG)
    tis_dpo = stage_config(CONFIG, {"objective.name": "tis_dpo"})
    Space.parse({"objective.alpha": {"uniform": [0.1, 1]}}).check_changeable(tis_dpo)
    with pytest.raises(InputError, match=r"objective\.alpha from 0.* leave 0 out of the range"):
        Space.parse({"objective.alpha": {"uniform": [0, 1]}}).check_changeable(tis_dpo)


def test_a_missing_or_invalid_file(tmp_path):
    with pytest.raises(InputError, match=r"--space .*nowhere\.yaml: no such file"):
        Space.load(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "list.yaml").write_text(yaml.safe_dump([1]))
    with pytest.raises(InputError, match=r"list\.yaml.*mapping"):
        Space.load(str(tmp_path / "list.yaml"))

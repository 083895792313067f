"""Proposals and what a study keeps, on functions instead of training runs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from tbpo_ray.config import TuneConfig
from tbpo_ray.configuration import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.tuning.check import (
    check_metrics,
    logged_metrics,
    of_a_trial,
    refuse_other_study,
    share_cores,
)
from tbpo_ray.tuning.ledger import Ledger, Trial, interval, pareto
from tbpo_ray.tuning.schedule import Asha, Proposals
from tbpo_ray.tuning.search import propose, size
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study import check_study

X, KIND = "objective.beta", "objective.bregman.generator"
SPACE = Space.parse({X: {"uniform": [0.1, 1.0]}, KIND: {"choice": ["logistic", "sba"]}})


def play(settings: TuneConfig, count: int, seed: int) -> list[Trial]:
    """A study whose metric is highest at beta 0.3 under sba."""
    trials: list[Trial] = []
    for number in range(count):
        params = propose(SPACE, number, trials, settings, seed)
        assert params is not None
        score = -((params[X] - 0.3) ** 2) - (params[KIND] != "sba")
        values = dict.fromkeys(settings.metrics, score)
        trials.append(Trial(number, params, "finished", values=values, step=1))
    return trials


def test_tpe_finds_the_better_half_more_often_than_chance():
    def good(settings: TuneConfig) -> int:
        found = [t for seed in range(4) for t in play(settings, 24, seed)[8:]]
        return sum(t.params[KIND] == "sba" and abs(t.params[X] - 0.3) < 0.15 for t in found)

    assert good(TuneConfig(algorithm="tpe")) > 1.5 * good(TuneConfig(algorithm="random"))


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_proposals_depend_on_what_is_known_alone(algorithm):
    settings = TuneConfig(algorithm=algorithm)
    trials = play(settings, 8, seed=3)
    for number in (0, 5, 7):
        assert propose(SPACE, number, trials[:number], settings, 3) == trials[number].params
    assert propose(SPACE, 0, [], settings, 4) != trials[0].params


def test_every_state_and_several_metrics_can_be_told():
    settings = TuneConfig(metric=["a", "b"], mode=["max", "min"])
    trials = play(settings, 5, seed=0)
    for trial, state in zip(trials, ("waiting", "running", "stopped", "failed", "finished"), strict=True):
        trial.state, trial.reports = state, [{"step": 3, "a": 0.1, "b": 0.2}]
        trial.values = {} if state == "failed" else {"a": 0.1, "b": math.nan if state == "running" else 0.2}
    assert propose(SPACE, 5, trials, settings, 0)
    assert propose(SPACE, 5, trials, TuneConfig(metric="a"), 0)


def test_a_grid_ends():
    grid = Space.parse({X: {"grid": [0.1, 0.2]}, KIND: {"choice": ["logistic", "sba"]}})
    settings = TuneConfig(algorithm="grid", trials=12)
    assert size(grid, settings) == 4
    assert [propose(grid, n, [], settings, 0) is None for n in range(5)] == [False] * 4 + [True]


def test_proposals_go_on_with_unfinished_trials_first(tmp_path):
    ledger = Ledger(tmp_path / "study.json", {}, play(TuneConfig(), 3, 0))
    ledger.trials[1].state, ledger.trials[1].step = "running", 6
    ledger.save()
    settings = TuneConfig(trials=4)
    search = Proposals(SPACE, Ledger.open(ledger.file), settings, 0, 4)
    assert search.suggest("a") == {"number": 1, "params": ledger.trials[1].params, "since": 6}
    new = search.suggest("b")
    assert new["number"] == 3
    # What is handed out is on disk before it starts.
    assert Ledger.open(ledger.file).trials[3].params == new["params"]
    assert search.suggest("c") == Proposals.FINISHED


def test_halving_remembers_earlier_sessions():
    def decide(past: list[Trial]) -> str:
        ledger = Ledger(None, {}, past)  # type: ignore[arg-type]
        asha = Asha(ledger, time_attr="step", metric="objective", mode="max", grace_period=3,
                    max_t=10**9, reduction_factor=2)  # fmt: skip
        trial = SimpleNamespace(trial_id="new", config={"number": 9})
        asha.on_trial_add(None, trial)
        return asha.on_trial_result(None, trial, {"step": 3, "objective": 0.5})

    strong = [Trial(n, {}, "finished", reports=[{"step": 3, "objective": 0.8 + n / 100}]) for n in range(3)]
    weak = [Trial(n, {}, "stopped", reports=[{"step": 3, "objective": 0.1}]) for n in range(3)]
    assert (decide([]), decide(weak), decide(strong)) == ("CONTINUE", "CONTINUE", "STOP")


def test_pareto_front():
    settings = TuneConfig(metric=["gain", "kl"], mode=["max", "min"])
    points = [(0.7, 0.2), (0.6, 0.1), (0.6, 0.3), (0.9, 0.9), (math.nan, 0.0)]
    trials = [Trial(n, {}, "finished", values={"gain": g, "kl": k}) for n, (g, k) in enumerate(points)]
    trials.append(Trial(5, {}, "stopped", values={"gain": 2.0, "kl": 0.0}))
    assert [t.number for t in pareto(trials, settings)] == [3, 0, 1]
    assert [t.number for t in pareto(trials, TuneConfig(metric="kl", mode="min"))] == [4]


def test_interval_by_hand():
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (high - mean, mean - low) == pytest.approx((4.303 / math.sqrt(3),) * 2, rel=1e-3)
    assert math.isnan(interval([1.0])[1])


CONFIG = load_config("jobs/configs/tiny.yaml")


def test_logged_metrics_are_what_a_run_logs():
    assert {"eval/rewards/accuracy", "eval/kl/k3", "loss", "grad_norm"} <= logged_metrics(CONFIG)
    assert "eval/entropy" not in logged_metrics(CONFIG)
    exact = load_config("jobs/configs/tiny.yaml", ["objective.name=tbpo_a"])
    assert {"eval/entropy", "kl/exact"} <= logged_metrics(exact)
    blind = load_config("jobs/configs/tiny.yaml", ["data.eval=null"])
    assert not any(name.startswith("eval/") for name in logged_metrics(blind))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tune.metric=eval/acuracy"], ["eval/acuracy", "nothing logs it", "eval/rewards/accuracy"]),
        (["tune.metric=eval/entropy"], ["eval/entropy", "logged are"]),
        (["tune.metric=evaluation/win"], ["evaluation/win", "evaluation/win_rate"]),
        (["tune.metric=evaluation/win_rate"], ["known at the end only", "tune.scheduler=none"]),
        (["tune.scheduler=pbt", "tune.repeats=2"], ["tune.repeats=2"]),
    ],
)
def test_metrics_that_cannot_be_had(overrides, words):
    config = load_config("jobs/configs/tiny.yaml", overrides)
    with pytest.raises(InputError) as caught:
        check_metrics(config, [config])
    assert all(word in caught.value.faults[0] for word in words), caught.value.faults


def test_a_metric_that_some_trials_do_not_log():
    config = load_config("jobs/configs/tiny.yaml", ["tune.metric=eval/entropy"])
    space = Space.parse({"objective.state_baseline.kind": {"choice": ["learned", "exact_kl"]}})
    with pytest.raises(InputError, match="eval/entropy: not every trial logs it"):
        check_study(config, space)


def test_values_that_do_not_go_together_are_found_before_the_start():
    config = load_config("jobs/configs/tiny.yaml", ["training.reference_scores=cached"])
    space = Space.parse({"objective.name": {"choice": ["dpo", "tdpo1"]}})
    with pytest.raises(InputError, match=r"objective\.name=.?tdpo1"):
        check_study(config, space)


def test_directions():
    with pytest.raises(InputError, match=r"2 direction\(s\) for 1"):
        load_config(None, ["tune.mode=[max, min]"])


def test_another_study_under_the_same_name_is_refused():
    from tbpo_ray.configuration import to_tree

    facts = {"config": to_tree(CONFIG), "space": SPACE.source}
    refuse_other_study("s", facts, load_config("jobs/configs/tiny.yaml", ["tune.trials=20"]), SPACE)
    for overrides, words in (
        (["objective.beta=0.3"], r"objective\.beta=0\.3: study s was started with 0\.1"),
        (["tune.trials=3"], r"tune\.trials=3: .* only a larger"),
        (["tune.metric=loss"], r"tune\.metric='loss'"),
    ):
        with pytest.raises(InputError, match=words):
            refuse_other_study("s", facts, load_config("jobs/configs/tiny.yaml", overrides), SPACE)
    with pytest.raises(InputError, match=rf"--space: {X}"):
        refuse_other_study("s", facts, CONFIG, Space.parse({X: {"uniform": [0.2, 1]}}))


def test_a_trial_s_workers_and_threads(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    config = load_config(None, ["cluster.num_workers=2", "cluster.use_gpu=false"])
    assert of_a_trial(config).cluster.num_workers == 2
    one = of_a_trial(load_config(None, ["cluster.num_workers=2", "tune.num_workers=1"]))
    assert one.cluster.num_workers == 1
    for at_once, threads in ((1, 4), (2, 2), (3, 1), (8, 1)):
        assert share_cores(config, at_once).cluster.threads_per_worker == threads
    own = load_config(None, ["cluster.threads_per_worker=3", "cluster.use_gpu=false"])
    assert share_cores(own, 2).cluster.threads_per_worker == 3
    gpus = load_config(None, ["cluster.use_gpu=true"])
    assert share_cores(gpus, 2).cluster.threads_per_worker is None

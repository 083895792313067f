"""Proposals, schedulers and the state of a study, on functions instead of training runs."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.config.schema import TuneConfig
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.evaluation.win_rates import t_interval
from tbpo_ray.training.run_result import RunResult
from tbpo_ray.tuning.check import refuse_other_study, share_cores, trial_base_config
from tbpo_ray.tuning.metrics import check_metrics, logged_metrics
from tbpo_ray.tuning.ray_tune import Asha, Proposals, make_scheduler
from tbpo_ray.tuning.searchers import propose, trial_count
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_state import StudyState, Trial, pareto_front
from tbpo_ray.workflows.tune import _Study, check_study

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
    assert propose(SPACE, 11, trials, settings, 2**31 - 1)  # the largest seed of a run


def test_optuna_accepts_every_state_and_several_metrics():
    settings = TuneConfig(metric=["a", "b"], mode=["max", "min"])
    trials = play(settings, 5, seed=0)
    for trial, state in zip(trials, ("waiting", "running", "stopped", "failed", "finished"), strict=True):
        trial.state, trial.reports = state, [{"step": 3, "a": 0.1, "b": 0.2}]
        trial.values = {} if state == "failed" else {"a": 0.1, "b": math.nan if state == "running" else 0.2}
    assert propose(SPACE, 5, trials, settings, 0)
    assert propose(SPACE, 5, trials, TuneConfig(metric="a"), 0)


def test_a_grid_is_exhausted():
    grid = Space.parse({X: {"grid": [0.1, 0.2]}, KIND: {"choice": ["logistic", "sba"]}})
    settings = TuneConfig(algorithm="grid", trials=12)
    assert trial_count(grid, settings) == 4
    assert [propose(grid, n, [], settings, 0) is None for n in range(5)] == [False] * 4 + [True]


def test_unfinished_trials_resume_before_new_ones(tmp_path):
    study = StudyState(tmp_path / "study.json", {}, play(TuneConfig(), 3, 0))
    study.trials[1].state, study.trials[1].step = "running", 6
    study.save()
    settings = TuneConfig(trials=4)
    search = Proposals(SPACE, StudyState.open(study.file), settings, 0, 4)
    assert search.suggest("a") == {"number": 1, "params": study.trials[1].params, "since": 6}
    new = search.suggest("b")
    assert new is not None and new["number"] == 3
    # A suggested trial is on disk before it starts.
    assert StudyState.open(study.file).trials[3].params == new["params"]
    assert search.suggest("c") == Proposals.FINISHED


def test_halving_compares_with_trials_of_earlier_sessions():
    def decide(past: list[Trial]) -> str:
        study = StudyState(None, {}, past)  # type: ignore[arg-type]
        asha: Any = Asha(study, time_attr="step", metric="objective", mode="max", grace_period=3,
                    max_t=10**9, reduction_factor=2)  # fmt: skip
        trial = SimpleNamespace(trial_id="new", config={"number": 9})
        asha.on_trial_add(None, trial)
        return asha.on_trial_result(None, trial, {"step": 3, "objective": 0.5})

    strong = [Trial(n, {}, "finished", reports=[{"step": 3, "objective": 0.8 + n / 100}]) for n in range(3)]
    weak = [Trial(n, {}, "stopped", reports=[{"step": 3, "objective": 0.1}]) for n in range(3)]
    assert (decide([]), decide(weak), decide(strong)) == ("CONTINUE", "CONTINUE", "STOP")


class PopulationMember(SimpleNamespace):
    """The part of a trial that Ray's scheduler reads."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, name: str):
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        super().__init__(
            trial_id=name, experiment_tag=name, status="PAUSED", config={}, placement_group_factory=None,
            run_metadata=SimpleNamespace(checkpoint_manager=manager),
        )  # fmt: skip

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")


def population(count: int) -> tuple[Any, Any, list[PopulationMember]]:
    """A scheduler of trials that run in rounds, the part of Tune that it reads, and the trials."""
    study = StudyState(None, {}, [Trial(n, {}) for n in range(count)])  # type: ignore[arg-type]
    settings = TuneConfig(scheduler="pbt")
    scheduler: Any = make_scheduler(SPACE, study, settings, every=4, concurrent=1, seed=0)
    members = [PopulationMember(f"t_{n}") for n in range(count)]
    live = set(members)
    controller = SimpleNamespace(
        search_alg=None, get_trials=lambda: members, get_live_trials=lambda: live
    )  # fmt: skip
    for member in members:
        scheduler.on_trial_add(controller, member)
    return scheduler, controller, members


def report(scheduler: Any, controller: Any, member: PopulationMember, step: int) -> None:
    member.status = "RUNNING"
    assert scheduler.on_trial_result(controller, member, {"step": step, "objective": 0.5}) == "PAUSE"
    member.status = "PAUSED"


def test_a_resumed_population_does_not_wait_for_past_rounds():
    scheduler, controller, members = population(2)
    scheduler._checkpoint_or_exploit = lambda *_: None
    for step in (12, 16):
        for member in members:
            report(scheduler, controller, member, step)
        assert scheduler.choose_trial_to_run(controller) in members
    assert scheduler._next_perturbation_sync == 20


@pytest.mark.parametrize("how", ["complete", "error"])
def test_a_population_does_not_wait_for_an_ended_trial(how):
    scheduler, controller, members = population(3)
    for member in members[:2]:
        report(scheduler, controller, member, 4)
    assert scheduler.choose_trial_to_run(controller) is members[2]
    members[2].status = "RUNNING"
    assert scheduler.choose_trial_to_run(controller) is None  # both wait for it
    if how == "complete":
        scheduler.on_trial_complete(controller, members[2], {"objective": math.nan})
        members[2].status = "TERMINATED"
        controller.get_live_trials().discard(members[2])  # as Tune does after the call
    else:
        scheduler.on_trial_error(controller, members[2])
        members[2].status = "ERROR"
    assert scheduler.choose_trial_to_run(controller) in members[:2]
    # The next round does not wait for the ended trial.
    assert members[2] not in controller.get_live_trials()
    assert scheduler._next_perturbation_sync == 8


def test_pareto_front():
    settings = TuneConfig(metric=["gain", "kl"], mode=["max", "min"])
    points = [(0.7, 0.2), (0.6, 0.1), (0.6, 0.3), (0.9, 0.9), (math.nan, 0.0)]
    trials = [Trial(n, {}, "finished", values={"gain": g, "kl": k}) for n, (g, k) in enumerate(points)]
    trials.append(Trial(5, {}, "stopped", values={"gain": 2.0, "kl": 0.0}))
    assert [t.number for t in pareto_front(trials, settings)] == [3, 0, 1]
    assert [t.number for t in pareto_front(trials, TuneConfig(metric="kl", mode="min"))] == [4]


def test_interval_worked_by_hand():
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (high - mean, mean - low) == pytest.approx((4.303 / math.sqrt(3),) * 2, rel=1e-3)
    assert math.isnan(t_interval([1.0])[1])


def test_interval_of_eleven_values_uses_ten_degrees_of_freedom():
    # 1 to 11: mean 6, sum of squared deviations 110, variance 11, standard error sqrt(11 / 11) = 1.
    mean, low, high = t_interval([float(value) for value in range(1, 12)])
    assert mean == 6.0
    assert (low, high) == pytest.approx((6 - 2.228, 6 + 2.228), abs=5e-4)


def test_interval_of_many_values_approaches_the_normal_one():
    values = [0.0, 1.0] * 5000
    _, low, high = t_interval(values)
    error = math.sqrt(0.25 * 10000 / 9999 / 10000)
    assert (high - low) / 2 / error == pytest.approx(1.960, abs=5e-4)


CONFIG = load_config("jobs/configs/tiny.yaml")


def test_logged_metrics_are_what_a_run_logs():
    assert {"eval/rewards/accuracy", "eval/kl/k3", "loss", "grad_norm"} <= logged_metrics(CONFIG)
    assert "eval/entropy" not in logged_metrics(CONFIG)
    exact = load_config("jobs/configs/tiny.yaml", ["objective.name=tbpo_a"])
    assert {"eval/entropy", "kl/exact"} <= logged_metrics(exact)
    blind = load_config("jobs/configs/tiny.yaml", ["data.eval=null"])
    assert not any(name.startswith("eval/") for name in logged_metrics(blind))


def test_an_objective_without_a_reference_logs_no_distance_from_it():
    simpo = load_config("jobs/configs/tiny.yaml", ["objective={name: simpo}"])
    assert "eval/rewards/accuracy" in logged_metrics(simpo)
    assert not {"eval/kl/k3", "logratio/chosen", "logps/chosen_drift"} & logged_metrics(simpo)


@pytest.mark.parametrize("name", ["tis_dpo", "sepo", "t_reg"])
def test_objectives_with_token_weights_can_be_searched(name):
    assert "eval/rewards/accuracy" in logged_metrics(
        load_config("jobs/configs/tiny.yaml", [f"objective={{name: {name}}}"])
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tune.metric=eval/acuracy"], ["eval/acuracy", "eval/rewards/accuracy"]),
        (["tune.metric=eval/entropy"], ["eval/entropy", "eval/rewards/accuracy"]),
        (["tune.metric=evaluation/win"], ["evaluation/win", "evaluation/win_rate"]),
        (
            ["tune.metric=evaluation/win_rate"],
            ["tune.scheduler=asha", "tune.scheduler=none"],
        ),
        (["tune.scheduler=pbt", "tune.repeats=2"], ["tune.repeats=2"]),
        (["tune.metric=evaluation/self_bleu"], ["generation.samples=1", "evaluation/distinct_1"]),
        (["tune.metric=evaluation/score"], ["judge.kind=checker", "evaluation/exact_match"]),
        (
            ["tune.metric=evaluation/win_rate", "evaluation.judge.kind=implicit"],
            ["judge.kind=implicit", "evaluation/implicit_accuracy"],
        ),
    ],
)
def test_unavailable_metrics_are_refused(overrides, words):
    config = load_config("jobs/configs/tiny.yaml", overrides)
    with pytest.raises(InputError) as caught:
        check_metrics(config, [config])
    assert all(word in caught.value.faults[0] for word in words), caught.value.faults


def test_a_metric_that_some_trials_do_not_log():
    config = load_config("jobs/configs/tiny.yaml", ["tune.metric=eval/entropy"])
    space = Space.parse({"objective.state_baseline.kind": {"choice": ["learned", "exact_kl"]}})
    with pytest.raises(InputError, match="eval/entropy: not every trial"):
        check_study(config, space)


def test_inconsistent_values_are_found_before_the_start():
    config = load_config("jobs/configs/tiny.yaml", ["training.reference_scores=cached"])
    space = Space.parse({"objective.name": {"choice": ["dpo", "tdpo1"]}})
    with pytest.raises(InputError, match=r"objective\.name=.?tdpo1"):
        check_study(config, space)


def test_directions():
    with pytest.raises(InputError, match=r"2 direction\(s\) for 1"):
        load_config(None, ["tune.mode=[max, min]"])


def test_another_study_under_the_same_name_is_refused():
    from tbpo_ray.config.loading import to_tree

    facts = {"config": to_tree(CONFIG), "space": SPACE.source}
    refuse_other_study("s", facts, load_config("jobs/configs/tiny.yaml", ["tune.trials=20"]), SPACE)
    for overrides, words in (
        (["objective.beta=0.3"], r"objective\.beta=0\.3: study s was started with 0\.1"),
        (["tune.trials=3"], r"tune\.trials=3: study s was started with 12"),
        (["tune.metric=loss"], r"tune\.metric='loss'"),
        (["sft.training.max_steps=7"], r"sft\.training\.max_steps=7"),
        (["run.output_dir=elsewhere"], r"run\.output_dir='elsewhere'"),
    ):
        with pytest.raises(InputError, match=words):
            refuse_other_study("s", facts, load_config("jobs/configs/tiny.yaml", overrides), SPACE)
    with pytest.raises(InputError, match=rf"--space: {X}"):
        refuse_other_study("s", facts, CONFIG, Space.parse({X: {"uniform": [0.2, 1]}}))


def test_a_trial_s_workers_and_threads(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    config = load_config(None, ["cluster.num_workers=2", "cluster.use_gpu=false"])
    assert trial_base_config(config).cluster.num_workers == 2
    one = trial_base_config(load_config(None, ["cluster.num_workers=2", "tune.num_workers=1"]))
    assert one.cluster.num_workers == 1
    for concurrent, threads in ((1, 4), (2, 2), (3, 1), (8, 1)):
        assert share_cores(config, concurrent).cluster.threads_per_worker == threads
    own = load_config(None, ["cluster.threads_per_worker=3", "cluster.use_gpu=false"])
    assert share_cores(own, 2).cluster.threads_per_worker == 3
    gpus = load_config(None, ["cluster.use_gpu=true"])
    assert share_cores(gpus, 2).cluster.threads_per_worker is None


def test_a_whole_grid_is_validated_before_the_start():
    lengths, prompts = [64, *range(200, 290, 10)], [8, 16, 24, 32, 40, 48, 64]
    space = Space.parse({"data.max_length": {"grid": lengths}, "data.max_prompt_length": {"grid": prompts}})
    config = load_config("jobs/configs/tiny.yaml", ["tune.algorithm=grid", "tune.trials=100"])
    with pytest.raises(InputError, match=r"space: a trial with data\.max_length=64"):
        check_study(config, space)


def test_a_truncated_grid_is_reported(capsys):
    space = Space.parse({X: {"grid": [0.1, 0.2, 0.3]}})
    check_study(load_config("jobs/configs/tiny.yaml", ["tune.algorithm=grid", "tune.trials=2"]), space)
    assert "first 2" in "".join(capsys.readouterr())


def test_a_grace_period_as_long_as_a_trial_is_refused():
    settings = ["tune.scheduler=asha", "training.max_steps=20", "tune.grace_steps=20"]
    with pytest.raises(InputError, match=r"tune\.grace_steps=20: a trial has 20 steps"):
        check_study(load_config("jobs/configs/tiny.yaml", settings), SPACE)


def test_a_study_and_a_run_do_not_share_a_name(tmp_path):
    from tbpo_ray.training.resume_checks import refuse_changes

    config = load_config("jobs/configs/tiny.yaml", [f"run.output_dir={tmp_path}"])
    folder = tmp_path / config.run.name
    (folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=rf"run\.name={config.run.name}: .* holds a training run"):
        check_study(config, SPACE)
    (folder / "study.json").write_text("{}")
    check_study(config, SPACE)
    with pytest.raises(InputError, match=rf"run\.name={config.run.name}: .* holds a study"):
        refuse_changes(config, folder)


class Study(_Study):
    """A study whose methods are called directly, without a cluster."""

    def __init__(self, tmp_path, overrides=()):
        config = load_config("jobs/configs/tiny.yaml", [f"run.output_dir={tmp_path}", "sft={}", *overrides])
        study = StudyState(tmp_path / "study.json", {})
        tracker = SimpleNamespace(log_metrics=lambda *_: None, run_id="parent")
        super().__init__(config, SPACE, tmp_path, study, tracker)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["default", "best", "default best"])
def test_a_failing_confirming_run_does_not_fail_the_study(tmp_path, monkeypatch, bad):
    study = Study(tmp_path, ["tune.confirm=2"])
    metric = study.config.tune.metrics[0]

    def train(config, **_):
        label, *_, seed = config.run.name.split("-")
        if label in bad and (seed.endswith("0") or len(bad.split()) > 1):
            raise RunFailedError("the loss is not finite")
        value = 0.9 if label == "best" else 0.6
        return RunResult(tmp_path, tmp_path, "run", {metric: value})

    monkeypatch.setattr("tbpo_ray.workflows.confirmation.train", train)
    best = Trial(0, {X: 0.2}, "finished")
    note = study._confirm(study.config, best, concurrent=1)
    assert f"{bad.split()[0]}-" in note and "the loss is not finite" in note
    if len(bad.split()) > 1:
        assert "Not confirmed" in note and "confirmation" not in study.state.facts
    else:
        assert "With 1 new seed(s)" in note and "0.9000 against 0.6000" in note
        assert study.state.facts["confirmation"]["gain"] == pytest.approx(0.3)


def test_trials_start_from_the_folder_that_a_gguf_file_became(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tbpo_ray.workflows.tune.resolve_models", lambda _: ("/cache/gguf-1", "/cache/gguf-1")
    )
    study = Study(tmp_path, ["model.name_or_path=/models", "model.gguf_file=m.gguf"])
    start = study._starting_config()
    assert (start.model.name_or_path, start.model.gguf_file) == ("/cache/gguf-1", None)


def test_the_metric_is_logged_at_the_steps_that_compare_trials(tmp_path, monkeypatch):
    for name in ("prepare_inputs", "score_inputs", "resolve_models"):
        monkeypatch.setattr(
            f"tbpo_ray.workflows.tune.{name}", lambda *_: SimpleNamespace(data=SimpleNamespace(lengths=list))
        )
    monkeypatch.setattr(
        "tbpo_ray.workflows.tune.make_schedule", lambda *_: SimpleNamespace(steps_total=50)
    )  # trials are compared every 12 steps
    settings = ["tune.metric=rewards/accuracy", "training.log_every=10", "tune.scheduler=asha"]
    study = Study(tmp_path, settings)
    assert study._prepare(study.config).training.log_every == 2
    held_out = Study(tmp_path, [*settings[1:], "tune.metric=eval/rewards/accuracy"])
    assert held_out._prepare(held_out.config).training.log_every == 10


def test_keys_that_change_a_study_s_helper_models_are_refused(tmp_path):
    def check(space: dict[str, Any], *more: str) -> None:
        settings = [f"run.output_dir={tmp_path}", *more]
        check_study(load_config("jobs/configs/tiny.yaml", settings), Space.parse(space))

    names = {"objective.name": {"choice": ["dpo", "sepo"]}}
    steps = "objective.helpers.oracle.training.max_steps"
    check(
        {"objective.beta": {"uniform": [0.5, 2.0]}, "data.max_length": {"grid": [64]}}, "objective.name=sepo"
    )
    with pytest.raises(
        InputError, match=r"space: objective\.name: the helper models of .*=sepo are trained once"
    ):
        check(names)
    check(names, "objective.token_weights.positive=/some/model")
    with pytest.raises(InputError, match=re.escape(steps)):
        check({steps: {"grid": [1, 2]}}, "objective.name=sepo")
    with pytest.raises(InputError, match=r"objective\.helpers\.oracle\.data\.share=2"):
        check({X: {"uniform": [0.5, 2.0]}}, "objective.name=sepo", "objective.helpers.oracle.data.share=2")

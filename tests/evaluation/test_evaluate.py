"""Evaluation end to end, with real engines and a real MLflow store."""

from __future__ import annotations

import json

import pytest
import ray

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.evaluator import check_evaluation, evaluate_policies
from tbpo_ray.evaluation.verdict import Verdict
from tbpo_ray.models.tiny import build_tiny
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.workflows.evaluate import configured_policies, evaluation_plan
from tbpo_ray.workflows.pipeline import run_pipeline


def config_for(tmp_path, *overrides):
    return load_config(
        None,
        [
            f"run.output_dir={tmp_path}",
            "evaluation.prompts=builtin:copyedit?split=test",
            "evaluation.max_prompts=20",
            "evaluation.slice_by=[task]",
            "generation.max_tokens=8",
            "generation.samples=2",
            "cluster.use_gpu=false",
            *overrides,
        ],
    )


def test_policies_come_from_the_configuration_or_the_runs(tmp_path):
    assert configured_policies(config_for(tmp_path, "evaluation.policies={a: x}", "runs=[b]")) == {"a": "x"}
    assert configured_policies(config_for(tmp_path, "runs=[one, deep/two]")) == {
        "one": "one",
        "two": "deep/two",
    }
    with pytest.raises(InputError, match=r"runs=.*evaluation\.policies"):
        configured_policies(config_for(tmp_path, "runs=[one, deep/one]"))
    with pytest.raises(InputError, match=r"evaluation\.policies"):
        configured_policies(config_for(tmp_path))


@pytest.mark.parametrize(
    ("policies", "overrides", "message"),
    [
        ({}, [], r"evaluation\.policies"),
        ({"a": "/none"}, [], r"evaluation\.policies\.a"),
        ({"a": "TINY"}, ["evaluation.baseline=b"], r"evaluation\.baseline=b.* a$"),
        ({"a": "TINY"}, ["model.reference=/none"], "reference"),
        ({"a": "TINY"}, ["evaluation.prompts=/none.jsonl"], "none.jsonl"),
        ({"a": "TINY"}, ["evaluation.judge={kind: oracle}"], "oracle"),
    ],
)
def test_invalid_input_is_rejected_before_an_engine_starts(tmp_path, policies, overrides, message):
    folder = str(build_tiny(tmp_path / "tiny"))
    named = {name: folder if where == "TINY" else where for name, where in policies.items()}
    with pytest.raises(InputError, match=message):
        check_evaluation(config_for(tmp_path, *overrides), named)


def test_a_pipeline_that_cannot_evaluate_does_not_train(tmp_path):
    overrides = ["sft={training.max_steps: 1}", "evaluation.prompts=/none.jsonl", "run.name=p"]
    with pytest.raises(InputError, match=r"none\.jsonl"):
        run_pipeline(config_for(tmp_path, *overrides))
    with pytest.raises(InputError, match=r"evaluation\.judge\.kind='oracle'"):
        run_pipeline(config_for(tmp_path, "evaluation.judge={kind: oracle}", "run.name=p"))
    assert not list(tmp_path.rglob("p-sft")) and not list(tmp_path.rglob("mlflow.db"))


def test_a_dry_run_says_which_model_is_where_and_when(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("a dry run starts no cluster"))
    folder = str(build_tiny(tmp_path / "tiny"))
    nodes = tmp_path / "cluster.yaml"
    nodes.write_text(
        "max_workers: 2\navailable_node_types:\n"
        "  gpu: {resources: {CPU: 8, GPU: 4}, labels: {pool: generate}}\n"
    )
    config = config_for(
        tmp_path,
        f"evaluation.policies={{before: {folder}, after: {folder}}}",
        f"evaluation.judge={{kind: llm, pool: {folder}, max_tokens: 7}}",
        "evaluation.credit_pairs=2",
        "generation.batch_size=10",
        "generation.tensor_parallel=2",
        "cluster.use_gpu=auto",
        "cluster.labels.generate={pool: generate}",
        f"cluster.node_types={nodes}",
    )
    lines = evaluation_plan(config).splitlines()
    assert "# engines          at most 4, for 4 batch(es) of 10" in lines
    stages = [line.split(". ", 1)[1] for line in lines if line.startswith("#   ")]
    device = "2 GPU(s) of a node with pool=generate"
    for name, stage in zip(("before", "after"), stages, strict=False):
        assert stage.startswith(f"sampling {name}: vLLM on {device}, {folder}, weights 0.00 GiB, cache 0.")
        assert " GiB for 64 tokens (longest prompt " in stage or " GiB for 128 tokens (" in stage
    one = "1 GPU(s) of a node with pool=generate"
    assert stages[2] == f"held-out pairs: each policy and the reference {folder} in turn on {one}"
    assert stages[3] == f"KL from the reference: {folder} on {one}"
    assert stages[4] == f"judge: llm, vLLM on {device}, {folder}, cache for its longest prompt and 7 tokens"
    unknown = evaluation_plan(
        config_for(tmp_path, f"evaluation.policies={{a: {folder}}}", "cluster.use_gpu=auto")
    )
    assert "engines          as many as the nodes hold, at most 1, for 1 batch(es) of 256" in unknown
    assert "1 GPU(s), without GPUs the CPUs" in unknown and "judge: checker, on no device" in unknown


def test_more_positions_than_the_model_has_are_refused_before_an_engine_starts(tmp_path):
    folder = str(build_tiny(tmp_path / "tiny"))
    config = config_for(tmp_path, f"evaluation.policies={{a: {folder}}}", "generation.max_model_len=9999")
    with pytest.raises(InputError, match=r"generation\.max_model_len=9999: .* positions; must be at most"):
        evaluation_plan(config)


@pytest.mark.e2e
def test_two_policies_get_a_verdict_that_is_tracked(ray_session, tmp_path):
    policies = {f"seed{seed}": str(build_tiny(tmp_path / f"tiny{seed}", seed)) for seed in (0, 1)}
    config = config_for(tmp_path, "evaluation.credit_pairs=2")
    with Tracker.start(config.tracking, tmp_path, name="evaluate", kind="evaluate", config=config) as tracker:
        verdict = evaluate_policies(config, policies, output=tmp_path / "out", tracker=tracker)
    base, other = verdict["seed0"].metrics, verdict["seed1"].metrics
    assert base["exact_match"].value == 0.0 and other["win_rate"].value == 0.5
    least = other["kl_k1"].low
    assert least is not None and abs(base["kl_k1"].value) < 1e-3 < least
    assert 0 <= base["self_bleu"].value < 1 and base["length_tokens"].value <= 8
    assert sum(value["prompts"].value for value in verdict["seed1"].slices["task"].values()) == 20
    assert base["implicit_accuracy"].value == 0.5 and base["credit_auc"].value == 0.5
    assert "seed1, rejected" in (tmp_path / "out" / "credit.html").read_text()
    assert Verdict.load(tmp_path / "out" / "verdict.json") == verdict
    assert "seed1" in (tmp_path / "out" / "verdict.txt").read_text()
    run = tracker._client.get_run(tracker.run_id)
    assert run.data.metrics["seed1/kl_k1"] == pytest.approx(other["kl_k1"].value)
    assert run.inputs is not None
    assert run.inputs.dataset_inputs[0].dataset.name == "held-out prompts"
    names = {item.path for item in tracker._client.list_artifacts(tracker.run_id)}
    assert {"verdict.json", "verdict.txt", "credit.html", "samples", "config.yaml"} <= names

    # A second evaluation reuses the samples and gives the same verdict.
    again = evaluate_policies(config, policies, output=tmp_path / "out")
    assert json.dumps([p.metrics["kl_k1"].value for p in again.policies]) == json.dumps(
        [p.metrics["kl_k1"].value for p in verdict.policies]
    )

"""The typed tree: faults name the key, the value and what is accepted; every shipped YAML file parses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tbpo_ray.config.loading import (
    flatten,
    known_keys,
    load_config,
    sft_config,
    stage_config,
    to_tree,
    to_yaml,
    validate,
)
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_step=3", ["training.max_step", "training.max_steps"]),
        ("model.lora.rank=3", ["model.lora.rank", "model.lora.r"]),
        ("training.max_steps=0", ["training.max_steps=0", "greater than or equal to 1"]),
        ("training.max_steps=many", ["training.max_steps='many'", "integer"]),
        ("training.learning_rate=-1", ["training.learning_rate=-1", "greater than or equal to 0"]),
        ("objective.name=tbop", ["objective.name='tbop'", "tbpo_q"]),
        ("objective.bregman.lam=-2", ["objective.bregman.lam=-2", "greater than -1"]),
        ("objective.bregman.lam=.nan", ["objective.bregman.lam=nan"]),
        ("cluster.num_workers=[3, 1]", ["cluster.num_workers=[3, 1]", "min <= max"]),
        ("cluster.num_workers=0", ["cluster.num_workers=0"]),
        ("data.max_length=3", ["data.max_length=3", "greater than or equal to 4"]),
        ("data.max_prompt_length=2048", ["data.max_prompt_length=2048", "data.max_length=2048"]),
        ("data.quarantine_limit=2", ["data.quarantine_limit=2", "less than or equal to 1"]),
        ("training.deepspeed={stage: 7}", ["ZeRO stage must be 0, 1, 2 or 3"]),
        (
            "training.deepspeed={zero_optimization: {stage: 2, offload_param: {device: cpu}}}",
            ["offload_param does nothing with ZeRO stage 2", "use 3"],
        ),
        (
            "training.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}",
            ["offload_optimizer does nothing with ZeRO stage 0", "use 1 or 2 or 3"],
        ),
        ("generation.engine={trust_remote_code: true}", ["trust_remote_code"]),
        (
            "generation.max_model_len=256",
            ["generation.max_model_len=256", "generation.max_tokens=256", "larger"],
        ),
        ("generation.engine={max_model_len: 99}", ["generation.engine.max_model_len=99", "must be larger"]),
        ("generation.engines=[4, 2]", ["generation.engines=[4, 2]", "min <= max"]),
        ("generation.engines=many", ["generation.engines='many'", "auto"]),
        ("generation.stall_timeout_s=0", ["generation.stall_timeout_s=0", "greater than 0"]),
        ("model=3", ["model=3"]),
        ("training.max_steps=true", ["training.max_steps=True", "number"]),
        ("objective={name: sft, label_smoothing: 0.1}", ["objective.label_smoothing=0.1", "sft"]),
    ],
)
def test_a_fault_names_key_and_value(override, words):
    with pytest.raises(InputError) as caught:
        load_config(None, [override])
    assert len(caught.value.faults) == 1
    assert all(word in caught.value.faults[0] for word in words), caught.value.faults


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/b", "a#b", "%2e%2e", "a\0b", "..", ".hidden", "", "x" * 129]
)
def test_names_that_would_leave_the_folder_are_refused(name):
    with pytest.raises(InputError):
        validate({"run": {"name": name}})


def test_all_faults_are_reported_at_once():
    with pytest.raises(InputError) as caught:
        load_config(None, ["training.optimizer=sgd", "foo=1", "run.seed=-1"])
    assert len(caught.value.faults) == 3


def test_cached_scores_cannot_serve_the_exact_kl():
    with pytest.raises(InputError, match=r"reference_scores=cached.*tbpo_a.*exact_kl"):
        load_config(None, ["training.reference_scores=cached", "objective.name=tbpo_a"])


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training: {learning_rate: 5e-7}\ndata.max_length: 64\n", encoding="utf-8")
    config = load_config(file)
    assert (config.training.learning_rate, config.data.max_length) == (5e-7, 64)


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b", "\t: x"])
def test_a_file_that_is_not_a_configuration(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        load_config(file)


def test_round_trip():
    config = load_config(
        None, ["model.lora={r: 8}", "cluster.num_workers=[1, 4]", "sft={training.max_steps: 3}"]
    )
    assert validate(yaml.safe_load(to_yaml(config))) == config
    assert stage_config(config, config.sft).training.max_steps == 3


def test_every_field_has_a_docstring():
    def fields(model):
        for name, field in model.model_fields.items():
            sub = field.annotation
            if isinstance(sub, type) and hasattr(sub, "model_fields"):
                yield from fields(sub)
            else:
                yield model.__name__, name, field.description

    assert [f"{m}.{n}" for m, n, text in fields(Config) if not text] == []
    free = {"evaluation.judge.function", "evaluation.judge.kind", "training.deepspeed.stage"}
    assert set(flatten(to_tree(Config()))) - free <= set(known_keys())


@pytest.mark.parametrize("file", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configurations_parse(file):
    config = load_config(file)
    if config.sft:
        sft_config(config)


def test_importing_the_configuration_pulls_in_neither_torch_nor_ray():
    code = (
        "import sys, tbpo_ray.config.loading, tbpo_ray.cli; "
        "print([m for m in ('torch', 'ray', 'transformers', 'mlflow', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_empty_mapping_clears_and_a_judge_of_another_kind_replaces(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("sft: {training.max_steps: 5}\nevaluation: {judge: {kind: checker, function: 'a:b'}}\n")
    config = load_config(file, ["sft={}", "evaluation.judge={kind: implicit}"])
    assert config.sft == {} and config.evaluation.judge == {"kind": "implicit"}
    assert stage_config(load_config(file), {}, sft={}).sft == {}
    kept = load_config(file, ["evaluation.judge.function=c:d"])
    assert kept.evaluation.judge == {"kind": "checker", "function": "c:d"}


def test_the_sft_stage_does_not_inherit_the_direction_and_the_share_of_the_pairs():
    config = load_config(None, ["data.swap_answers=true", "data.share=[0.3, 1]", "sft.training.max_steps=3"])
    assert (sft_config(config).data.swap_answers, sft_config(config).data.share) == (False, 1.0)
    own = load_config(None, ["data.share=0.3", "sft.data.share=0.5", "sft.data.swap_answers=true"])
    assert (sft_config(own).data.swap_answers, sft_config(own).data.share) == (True, 0.5)


def test_the_sft_stage_does_not_inherit_label_smoothing():
    config = load_config(None, ["objective.label_smoothing=0.1", "sft={training.max_steps: 3}"])
    stage = sft_config(config, run__name="first")
    assert (stage.objective.name, stage.objective.label_smoothing) == ("sft", 0.0)
    assert (stage.training.max_steps, stage.run.name) == (3, "first")


def test_overrides_of_a_helper_have_the_types_of_their_keys(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "objective:\n  helpers:\n    oracle:\n"
        "      model.revision: 007\n      training: {learning_rate: 1e-5}\n"
        "objective.helpers.positive: {model: {revision: 1.10}}\n",
        encoding="utf-8",
    )
    config = load_config(file, ["objective.helpers.oracle.model.chat_template=1e5"])
    assert flatten(config.objective.helpers) == {
        "oracle.model.revision": "007",
        "oracle.training.learning_rate": 1e-5,
        "oracle.model.chat_template": "1e5",
        "positive.model.revision": "1.10",
    }


def test_an_override_of_a_dotted_key_of_a_stage_replaces_it_in_the_resolved_configuration(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("sft:\n  training.max_steps: 1000\n  training.learning_rate: 1.0e-3\n")
    config = load_config(file, ["sft.training.max_steps=2"])
    assert config.sft == {"training": {"max_steps": 2, "learning_rate": 1e-3}}
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written).sft == config.sft
    assert sft_config(load_config(written)).training.max_steps == 2

"""A string field takes the text as typed, from YAML files, overrides, stages and search spaces alike."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tbpo_ray.config.loading import (
    load_config,
    overrides_to_tree,
    read_space,
    read_yaml,
    stage_config,
    to_yaml,
    validate,
)
from tbpo_ray.errors import InputError

NAMES = [
    "007", "1.10", "1e5", "20260105_093000", "2026-01-05", "0x1F", "0o17", "1_000", "no", "Yes", "true", "on",
    "null", "1.", "12e03",
]  # fmt: skip
TEXTS = [*NAMES, "12:30:45", "190:20:30", "+1", ".5", ".inf", ".NaN", "2026-01-05T10:00:00Z", "~x", "="]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_name_is_taken_as_typed(tmp_path, name):
    assert load_config(None, [f"run.name={name}"]).run.name == name
    file = tmp_path / "c.yaml"
    for text in (f"run: {{name: {name}}}\n", f"run:\n  name: {name}\n", f"run.name: {name}\n"):
        file.write_text(text, encoding="utf-8")
        config = load_config(file)
        assert config.run.name == name
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(file) == config
        assert yaml.safe_load(to_yaml(config))["run"]["name"] == name


@pytest.mark.parametrize("text", TEXTS)
def test_every_kind_of_text_is_taken_as_typed(tmp_path, text):
    tree: dict[str, Any] = {
        "tracking": {"experiment": text},
        "model": {"lora": {"target_modules": [text]}},
        "runs": [text],
        "evaluation": {"policies": {"a": text}, "slice_by": [text], "judge": {"kind": "llm", "model": text}},
        "data": {"train": [{"source": text}]},
        "generation": {"engine": {"revision": text}},
        "sft": {"tracking.experiment": text},
    }
    overrides = [
        f"tracking.experiment={text}",
        f"model.lora={{target_modules: [{text}]}}",
        f"runs=[{text}]",
        f"evaluation.policies={{a: {text}}}",
        f"evaluation.slice_by=[{text}]",
        f"evaluation.judge={{kind: llm, model: {text}}}",
        f"data.train=[{{source: {text}}}]",
        f"generation.engine={{revision: {text}}}",
        f"sft={{tracking.experiment: {text}}}",
    ]
    if text == "null":  # these two may be null
        tree["evaluation"]["judge"]["model"] = tree["generation"]["engine"]["revision"] = None
    assert overrides_to_tree(overrides) == tree
    file = tmp_path / "c.yaml"
    file.write_text("\n".join(item.replace("=", ": ", 1) for item in overrides), encoding="utf-8")
    assert read_yaml(file) == tree
    assert stage_config(load_config(file), load_config(file).sft).tracking.experiment == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.train=[ab]*.jsonl", "[ab]*.jsonl"),
        ("data.train={a,b}.jsonl", "{a,b}.jsonl"),
        ("data.train=pairs #1.jsonl", "pairs #1.jsonl"),
        ("data.train=a: b.jsonl", "a: b.jsonl"),
        ("data.train=*.jsonl", "*.jsonl"),
        ("data.train=!x&y", "!x&y"),
        ("data.train='007'", "007"),
        ('data.train="a\\tb"', "a\tb"),
        ("data.train=it's", "it's"),
        ("data.train=a=b", "a=b"),
    ],
)
def test_text_that_yaml_would_change(override, value):
    assert load_config(None, [override]).data.train == value


@pytest.mark.parametrize("key", ["data.eval", "model.revision", "model.reference", "evaluation.prompts"])
@pytest.mark.parametrize("text", ["", "null", "~", "Null", "''"])
def test_nothing_is_null_where_null_is_accepted(key, text):
    section, name = key.split(".")
    assert getattr(getattr(load_config(None, [f"{key}=x", f"{key}={text}"]), section), name) is None


@pytest.mark.parametrize(
    "key", ["data.train", "run.name", "run.output_dir", "model.name_or_path", "tracking.experiment"]
)
def test_an_empty_string_is_refused_elsewhere(tmp_path, key):
    for override in (f"{key}=", f"{key}=  ", f"{key}=''"):
        with pytest.raises(InputError, match=rf"{key}='.*must not be empty"):
            load_config(None, [override])
    file = tmp_path / "c.yaml"
    file.write_text(f"{key}:\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"{key}=''"):
        load_config(file)


@pytest.mark.parametrize(
    "override",
    [
        "data.train=[]",
        "data.eval=[]",
        "data.train=[{source: ''}]",
        "evaluation.policies={a: }",
        "runs=['']",
        "model.lora={target_modules: []}",
        "model.lora={target_modules: ['']}",
    ],
)
def test_empty_lists_and_entries_are_refused(override):
    with pytest.raises(InputError, match=override.split("=")[0]):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("1_000", 1000), ("0x10", 16), ("0o10", 8), ("0b11", 3), ("1e3", 1000), ("+7", 7)],
)
def test_numbers_remain_numbers(text, value):
    assert load_config(None, [f"training.max_steps={text}"]).training.max_steps == value


@pytest.mark.parametrize("text", ["12:30", "2026-01-05", "1.5", "#3", "1 2", "[1]", "no"])
def test_what_is_not_an_integer_is_refused(text):
    with pytest.raises(InputError, match=r"training\.max_steps="):
        load_config(None, [f"training.max_steps={text}"])


def test_values_without_a_declared_type_have_the_types_of_yaml():
    kwargs = "{date: 2024-07-26, enable_thinking: false, n: 010, x: 1e-3, time: 12:30, none: null, t: '7'}"
    assert load_config(None, [f"data.template_kwargs={kwargs}"]).data.template_kwargs == {
        "date": "2024-07-26", "enable_thinking": False, "n": 10, "x": 1e-3, "time": "12:30",
        "none": None, "t": "7",
    }  # fmt: skip


def test_booleans_and_alternatives_keep_their_types():
    config = load_config(None, ["training.tf32=yes", "cluster.use_gpu=no", "cluster.num_workers=[1, 02]"])
    assert config.training.tf32 is True and config.cluster.use_gpu is False
    assert config.cluster.num_workers == [1, 2]
    assert load_config(None, ["cluster.use_gpu=auto"]).cluster.use_gpu == "auto"
    with pytest.raises(InputError, match=r"objective\.name='no'"):
        load_config(None, ["objective.name=no"])


def test_keys_are_text(tmp_path):
    policies = load_config(None, ["evaluation.policies={007: a, no: b, 1.10: c}"]).evaluation.policies
    assert policies == {"007": "a", "no": "b", "1.10": "c"}


def test_a_search_space_has_the_types_of_its_keys(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "model.revision: {choice: [0123456, no], when: {tracking.experiment: [007, 1e5]}}\n"
        "training.learning_rate: {loguniform: [1e-7, 1e-3], when: {objective.name: no}}\n"
        "training.max_steps: {choice: [010]}\n",
        encoding="utf-8",
    )
    assert read_space(file) == {
        "model.revision": {"choice": ["0123456", "no"], "when": {"tracking.experiment": ["007", "1e5"]}},
        "training.learning_rate": {"loguniform": [1e-7, 1e-3], "when": {"objective.name": "no"}},
        "training.max_steps": {"choice": [10]},
    }


@pytest.mark.parametrize(
    "text", ["run: {name: a, name: b}", "run.name: a\nrun.name: b", "training:\n  tf32: true\n  tf32: false"]
)
def test_a_key_that_is_given_twice_is_refused(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="twice"):
        load_config(file)


def test_anchors_and_merge_keys_work(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("sft: &s {run.name: 007}\nrun: {<<: {name: 1e5}, seed: 3}\n", encoding="utf-8")
    config = load_config(file)
    assert (config.run.name, config.run.seed, config.sft) == ("1e5", 3, {"run.name": "007"})


def test_a_configuration_with_text_like_numbers_round_trips():
    config = load_config(None, ["generation.engine={x: '1e5', y: '0o7', z: '12:30', w: '010', v: 'no'}"])
    assert validate(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {name: !!int abc}", ["'abc'", "int"]),
        ("run: {name: !!bool maybe}", ["'maybe'", "bool"]),
        ("run: &r {name: *r}", ["contains itself"]),
        ("runs: &r [*r]", ["contains itself"]),
        ("sft: &r {a: *r}", ["contains itself"]),
        ("runs: " + "[" * 5000 + "]" * 5000, ["deeply"]),
    ],
)
def test_valid_yaml_that_is_no_configuration_is_refused_in_a_sentence(tmp_path, text, words):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as refusal:
        load_config(file, [])
    assert str(file) in str(refusal.value) and all(word in str(refusal.value) for word in words)

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
    kwargs = "{date: 2024-07-26, enable_thinking: false, n: 10, x: 1e-3, time: 12:30, none: null, t: '7'}"
    assert load_config(None, [f"data.template_kwargs={kwargs}"]).data.template_kwargs == {
        "date": "2024-07-26", "enable_thinking": False, "n": 10, "x": 1e-3, "time": "12:30",
        "none": None, "t": "7",
    }  # fmt: skip


OPEN = {
    "0": 0, "7": 7, "-3": -3, "+7": 7, "0x1F": 31, "0o17": 15, "1e5": 100000.0, "5.0": 5.0, ".5": 0.5,
    "true": True, "False": False, "null": None, "~": None,
    "007": "007", "-01": "-01", "1.10": "1.10", "0.50": "0.50", "2.00": "2.00", "1_000": "1_000",
    "0.5": 0.5, "1_0.5": "1_0.5",
    "00.5": "00.5", "0b11": "0b11", "12:30:45": "12:30:45", "2026-02-30": "2026-02-30",
    "20260105_093000": "20260105_093000",
}  # fmt: skip
"""Texts where the schema leaves the type open, and their values: YAML 1.2's if it can be written so."""


@pytest.mark.parametrize(("text", "value"), OPEN.items())
def test_an_open_value_never_loses_what_was_typed(tmp_path, text, value):
    def same(found):
        return found == value and type(found) is type(value)

    for override in (f"data.template_kwargs={{a: {text}, b: [{text}]}}", f"data.template_kwargs.a={text}"):
        kwargs = load_config(None, [override]).data.template_kwargs
        assert all(same(item) for item in (kwargs["a"], *kwargs.get("b", [])))
    file = tmp_path / "c.yaml"
    file.write_text(
        f"generation: {{engine: {{additional_config: {{rope: {{a: {text}}}}}}}}}\n"
        f"sft: {{data.template_kwargs: {{a: {text}}}}}\n"
    )
    config = load_config(file)
    assert same(config.generation.engine["additional_config"]["rope"]["a"])
    assert same(config.sft["data.template_kwargs"]["a"])
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    file.write_text(f"data.template_kwargs.a: {{choice: [{text}]}}")
    assert same(read_space(file)["data.template_kwargs.a"]["choice"][0])


@pytest.mark.parametrize("text", ["yes", "No", "on", "OFF"])
def test_a_text_that_two_versions_of_yaml_read_differently_is_refused_where_the_type_is_open(tmp_path, text):
    with pytest.raises(InputError, match=rf"data\.template_kwargs\.a\.b={text}: .*'{text}' in quotes"):
        load_config(None, [f"data.template_kwargs={{a: {{b: {text}}}}}"])
    kwargs = load_config(None, [f"data.template_kwargs={{a: '{text}'}}"]).data.template_kwargs
    assert kwargs == {"a": text}
    for typed in (
        "training.tf32=%s",
        "training.deepspeed={zero_optimization: {overlap_comm: %s}}",
        "generation.engine.enable_lora=%s",
    ):
        assert load_config(None, [typed % text])
    with pytest.raises(InputError, match="trainin"):
        load_config(None, [f"trainin.tf32={text}"])
    file = tmp_path / "space.yaml"
    file.write_text(f"data.template_kwargs.a: {{choice: [{text}]}}")
    with pytest.raises(InputError, match=rf"data\.template_kwargs\.a={text}: "):
        read_space(file)


@pytest.mark.parametrize("text", ["26 Jul #3", "Today: Monday", "*now*", "[open", "a, b"])
def test_an_open_override_is_a_text_as_typed(text):
    assert load_config(None, [f"data.template_kwargs.a={text}"]).data.template_kwargs == {"a": text}


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("training.max_steps=-007", "training.max_steps=-007"),
        ("training.max_steps=1.10", "training.max_steps=1.10"),
        ("training.max_grad_norm=-1.10", "training.max_grad_norm=-1.10"),
        ("training={max_steps: 00}", "training.max_steps=00"),
        ("training.deepspeed={stage: 007}", "training.deepspeed.stage=007"),
        ("training.deepspeed.bf16.enabled=007", "training.deepspeed.bf16.enabled=007"),
        ("evaluation.benchmarks.tasks=007", "evaluation.benchmarks.tasks='007'"),
        ("evaluation.benchmarks={limit: 1_0.5}", "evaluation.benchmarks.limit=1_0.5"),
        ("evaluation.judge={kind: llm, max_tokens: 01.50}", "evaluation.judge.max_tokens=01.50"),
        ("generation.engine={max_num_seqs: 007.5}", "generation.engine.max_num_seqs=007.5"),
        ("data.max_prompt_length=04_096", "data.max_prompt_length=04_096"),
        ("data.format=1.10", "data.format='1.10'"),
    ],
)
def test_messages_show_a_value_as_typed(override, shown):
    with pytest.raises(InputError) as caught:
        load_config(None, [override])
    assert len(caught.value.faults) == 1 and caught.value.faults[0].startswith(shown)


def test_numbers_are_plain_whatever_their_spelling(tmp_path):
    config = load_config(
        None,
        [
            "training.max_steps=007", "training.learning_rate=1.10e-6", "cluster.num_workers=[01, 02]",
            "generation.engine={max_num_seqs: 016, gpu_memory_utilization: 0.90}",
            "sft={training.epochs: 2.50}",
        ],
    )  # fmt: skip
    workers = config.cluster.num_workers
    assert isinstance(workers, list)
    values = [
        config.training.max_steps, config.training.learning_rate, *workers,
        *config.generation.engine.values(), *config.sft.values(),
    ]  # fmt: skip
    assert values == [7, 1.1e-6, 1, 2, 16, 0.9, 2.5]
    assert [type(value) for value in values] == [int, float, int, int, int, float, float]


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


def test_anchors_and_merge_keys_work(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("sft: &s {run.name: 007}\nrun: {<<: {name: 1e5}, seed: 3}\n", encoding="utf-8")
    config = load_config(file)
    assert (config.run.name, config.run.seed, config.sft) == ("1e5", 3, {"run.name": "007"})


def test_a_configuration_with_text_like_numbers_round_trips():
    config = load_config(None, ["generation.engine={x: '1e5', y: '0o7', z: '12:30', w: '010', v: 'no'}"])
    assert validate(yaml.safe_load(to_yaml(config))) == config

"""Mappings that the schema leaves open: overrides replace alternatives, malformed values name their keys."""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tbpo_ray.config.engine_options import ENGINE_KINDS
from tbpo_ray.config.loading import load_config, stage_config, to_tree, to_yaml, validate
from tbpo_ray.config.open_values import BENCHMARK_TYPES, ENGINE_REFUSED, JUDGE_KEYS, JUDGE_TYPES
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.harness import BenchmarkSettings
from tbpo_ray.evaluation.llm_judge import LlmSettings

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "jobs" / "configs").glob("*.yaml"))
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ZERO = "training.deepspeed.zero_optimization"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_an_override_replaces_an_alternative_of_a_shipped_file(file):
    override = "training.deepspeed={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}"
    training = load_config(file, [override]).training
    assert (training.deepspeed, training.zero_stage, training.offloads) == (OFFLOAD, 2, True)
    judge = "evaluation.judge={kind: llm, url: 'http://h/v1', model: 007}"
    assert load_config(file, [judge]).evaluation.judge == {
        "kind": "llm", "url": "http://h/v1", "model": "007",
    }  # fmt: skip


def test_alternatives_replace_each_other_in_both_directions(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "training: {deepspeed: {gradient_clipping: 2, "
        "zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}}\n"
        "evaluation: {judge: {function: 'a:b'}}\n"
    )
    for override in ("training.deepspeed={stage: 3}", "training.deepspeed.stage=3"):
        assert load_config(file, [override]).training.deepspeed == {"gradient_clipping": 2, "stage": 3}
    kept = load_config(file, [f"{ZERO}.stage=1"]).training.deepspeed
    assert kept["zero_optimization"] == {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    config = load_config(None, ["training.deepspeed={stage: 3}"])
    assert stage_config(config, {"training.deepspeed": OFFLOAD}).training.deepspeed == OFFLOAD
    judge = ["evaluation.judge.url=http://h", "evaluation.judge.model=m", "evaluation.judge.kind=llm"]
    for order in (judge, judge[::-1]):
        assert load_config(file, order).evaluation.judge == {
            "kind": "llm", "url": "http://h", "model": "m",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("{zero_optimization: true}", f"{ZERO}=True"),
        ("{zero_optimization: null}", f"{ZERO}=None"),
        ("{zero_optimization: [1]}", f"{ZERO}=[1]"),
        ("{zero_optimization: {stage: auto}}", f"{ZERO}.stage='auto'"),
        ("{zero_optimization: {stage: 7}}", f"{ZERO}.stage=7"),
        ("{zero_optimization: {stage: 2.0}}", f"{ZERO}.stage=2.0"),
        ("{zero_optimization: {stage: 2, offload_optimizer: true}}", f"{ZERO}.offload_optimizer=True"),
        ("{zero_optimization: {stage: 2, offload_optimizer: cpu}}", f"{ZERO}.offload_optimizer='cpu'"),
        ("{zero_optimization: {stage: 2, offload_optimizer: {}}}", f"{ZERO}.offload_optimizer.device"),
        (
            "{zero_optimization: {stage: 3, offload_param: {device: gpu}}}",
            f"{ZERO}.offload_param.device='gpu'",
        ),
        ("{zero_optimization: {stage: 3, offload_param: {device: nvme}}}", f"{ZERO}.offload_param.nvme_path"),
        ("{zero_optimization: {stage: 2, offload_optimiser: {device: cpu}}}", f"{ZERO}.offload_optimizer"),
        ("{zero_optimization: {stage: 2, reduce_bucket_size: auto}}", f"{ZERO}.reduce_bucket_size='auto'"),
        ("{zero_optimization: {stage: 2, overlap_comm: 1}}", f"{ZERO}.overlap_comm=1"),
        ("{zero_optimisation: {stage: 3}}", ZERO),
        ("{stage: auto}", "training.deepspeed.stage='auto'"),
        ("{stage: 2.0}", "training.deepspeed.stage=2.0"),
        ("{stage: true}", "training.deepspeed.stage=True"),
        ("{stage: 4}", "training.deepspeed.stage=4"),
        ("{stage: 2, zero_optimization: {stage: 2}}", "training.deepspeed"),
        ("{stage: 2, offload_optimizer: {device: cpu}}", f"{ZERO}.offload_optimizer"),
        ("{bf16: true}", "training.deepspeed.bf16=True"),
        ("{bf16: {enabled: auto}}", "training.deepspeed.bf16.enabled='auto'"),
        ("{gradient_clipping: auto}", "training.deepspeed.gradient_clipping='auto'"),
        ("{train_batch_size: 8}", "training.pairs_per_step"),
        ("{gradient_accumulation_steps: 4}", "training.deepspeed.gradient_accumulation_steps=4"),
        ("{optimizer: {type: Adam}}", "training.optimizer"),
        ("{zero_force_ds_cpu_optimizer: true}", "training.deepspeed.zero_force_ds_cpu_optimizer=True"),
        ("{zero_optimization: {stage: 2, zenflow: {topk_ratio: 0.1}}}", f"{ZERO}.zenflow="),
        (
            "{zero_optimization: {stage: 3, offload_optimizer: {device: cpu, super_offload: true}}}",
            f"{ZERO}.offload_optimizer.super_offload=True",
        ),
        (
            "{zero_optimization: {stage: 3, offload_optimizer: {device: cpu, ratio: 0.5}}}",
            f"{ZERO}.offload_optimizer.ratio=0.5",
        ),
        ("{stage: 3, prescale_gradients: true}", "training.deepspeed.prescale_gradients=True"),
        ("{stage: 3, gradient_predivide_factor: 2}", "training.deepspeed.gradient_predivide_factor=2"),
        ("stage", "training.deepspeed='stage'"),
        ("[2]", "training.deepspeed=[2]"),
    ],
)
def test_a_malformed_deepspeed_mapping(value, key):
    with pytest.raises(InputError) as caught:
        load_config(None, [f"training.deepspeed={value}"])
    assert any("training.deepspeed" in fault and key in fault for fault in caught.value.faults)


@pytest.mark.parametrize(
    "value",
    [
        "{stage: 0}",
        "{stage: null}",
        "{stage: 2, prescale_gradients: true, gradient_predivide_factor: 2}",
        "{zero_optimization: {stage: 3, reduce_bucket_size: 5e8, stage3_max_live_parameters: 1e9}}",
        "{zero_optimization: {stage: 2, offload_optimizer: null, overlap_comm: true}}",
        "{zero_optimization: {stage: 2, offload_optimizer: {device: none}}}",
        "{stage: 2, gradient_clipping: 0.5, data_types: {grad_accum_dtype: fp32}, some_new_key: 1}",
    ],
)
def test_a_valid_deepspeed_mapping(value):
    assert load_config(None, [f"training.deepspeed={value}"])


def test_the_stage_may_be_left_to_the_memory_plan():
    training = load_config(None, ["training.deepspeed.stage=null"]).training
    assert training.deepspeed == load_config(None, []).training.deepspeed == {"stage": None}
    assert training.leaves_stage_open and training.zero_stage == 1
    assert not load_config(None, ["training.deepspeed.stage=2"]).training.leaves_stage_open


@pytest.mark.parametrize(
    ("value", "fault", "remedy"),
    [
        ("{fp16: {enabled: true}}", "fp16.enabled=True", "training.precision=bf16 or fp32"),
        ("{amp: {enabled: true}}", "amp.enabled=True", "training.precision=bf16 or fp32"),
        ("{torch_autocast: {enabled: true}}", "torch_autocast.enabled=True", "training.precision=bf16"),
        ("{bf16: {enabled: false}}", "bf16.enabled=False", "training.precision=fp32"),
    ],
)
def test_a_deepspeed_option_that_contradicts_the_precision(value, fault, remedy):
    with pytest.raises(InputError) as refusal:
        load_config(None, [f"training.deepspeed={value}", "training.precision=bf16"])
    assert f"training.deepspeed.{fault}" in str(refusal.value) and remedy in str(refusal.value)


def test_deepspeed_options_that_agree_with_the_precision_are_accepted():
    agreeing = "{bf16: {enabled: false}, fp16: {enabled: false}}"
    training = load_config(None, ["training.precision=fp32", f"training.deepspeed={agreeing}"]).training
    assert training.deepspeed == {"bf16": {"enabled": False}, "fp16": {"enabled": False}}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("evaluation.judge=llm", "evaluation.judge='llm'"),
        ("evaluation.judge={kind: oracle}", "evaluation.judge.kind='oracle'"),
        ("evaluation.judge={kind: [llm]}", "evaluation.judge.kind=['llm']"),
        ("evaluation.judge.kind.x=1", "evaluation.judge.kind={'x': 1}"),
        ("evaluation.judge={kind: reward_model, model: {a: b}}", "evaluation.judge.model={'a': 'b'}"),
        ("generation.engine=fast", "generation.engine='fast'"),
        ("generation.engine={model: other}", "generation.engine.model='other'"),
        ("generation.engine={tensor_parallel_size: 2}", "generation.tensor_parallel"),
        ("generation.engine={max_num_seqs: many}", "generation.engine.max_num_seqs='many'"),
        ("generation.engine={gpu_memory_utilisation: 0.5}", "generation.engine.gpu_memory_utilization"),
        ("generation.engine={enforce_eager: 1}", "generation.engine.enforce_eager=1"),
        ("generation.engine={load_format: dummy}", "generation.engine.load_format='dummy': not supported"),
        ("model.lora=small", "model.lora='small'"),
        ("model.lora={target_modules: {a: b}}", "model.lora.target_modules={'a': 'b'}"),
        ("data.template_kwargs={messages: 1}", "data.template_kwargs"),
        ("data.template_kwargs=x", "data.template_kwargs='x'"),
        ("data.template_kwargs={'': 1}", "data.template_kwargs={'': 1}"),
        ("data.template_kwargs={a b: 1}", "data.template_kwargs={'a b': 1}"),
        ("generation.engine={1: 2}", "generation.engine.1: must be the name"),
        ("data.template_kwargs.=1", "override 'data.template_kwargs.=1'"),
        (".a=1", "override '.a=1'"),
        ("training..tf32=true", "override 'training..tf32=true'"),
        ("data.template_kwargs={a: {b: .nan}}", "data.template_kwargs.a.b=nan"),
        ("data.template_kwargs={a: [1, -.inf]}", "data.template_kwargs.a=[1, -inf]"),
        ("training.deepspeed={gradient_clipping: .nan}", "training.deepspeed.gradient_clipping=nan"),
        ("run.name.x=1", "run.name={'x': 1}"),
    ],
)
def test_other_malformed_mappings(override, key):
    with pytest.raises(InputError) as caught:
        load_config(None, [override])
    assert any(key in fault for fault in caught.value.faults), caught.value.faults


@pytest.mark.parametrize("name", sorted(ENGINE_REFUSED))
def test_engine_options_that_sample_from_something_else_are_refused(name):
    with pytest.raises(InputError, match=rf"generation\.engine\.{name}='?x'?: not supported, since samples"):
        load_config(None, [f"generation.engine={{{name}: x}}"])


def test_weights_are_loaded_in_every_format_that_reads_them():
    for value in ("safetensors", "auto", "null"):
        engine = load_config(None, [f"generation.engine={{load_format: {value}}}"]).generation.engine
        assert engine == {"load_format": None if value == "null" else value}


@pytest.mark.parametrize(
    ("judge", "fault"),
    [
        ("{kind: llm, foo: 1}", "foo: unknown key; the nearest known one is evaluation.judge."),
        ("{kind: llm, pool: p, concurency: 1}", "concurency: unknown key; the nearest known one is "
         "evaluation.judge.concurrency"),
        ("{kind: llm, function: f}", "function: unknown key; .* (kind: llm)"),
        ("{kind: reward_model, modell: m}", "modell: unknown key; the nearest known one is "
         "evaluation.judge.model"),
        ("{kind: checker, url: u}", "url: unknown key; .* (kind: checker)"),
        ("{kind: implicit, model: m}", "model: unknown key; .* (kind: implicit)"),
        ("{url: 'http://h'}", "url: unknown key; .* (kind: checker)"),
    ],
)  # fmt: skip
def test_settings_that_a_kind_of_judge_does_not_have(judge, fault):
    pattern = re.escape("evaluation.judge." + fault).replace(r"\.\*", ".*")
    with pytest.raises(InputError, match=pattern):
        load_config(None, [f"evaluation.judge={judge}"])


def test_every_kind_of_judge_accepts_the_keys_that_its_class_reads():
    assert set(JUDGE_KEYS["llm"]) == set(LlmSettings.model_fields)
    assert {key for keys in JUDGE_KEYS.values() for key in keys} | {"kind"} == set(JUDGE_TYPES)


def test_settings_of_judges_and_benchmarks_have_the_types_of_their_models():
    for model, types in ((LlmSettings, JUDGE_TYPES), (BenchmarkSettings, BENCHMARK_TYPES)):
        for name, field in model.model_fields.items():
            assert types[name] == field.annotation, name


def test_benchmark_settings_of_a_wrong_type():
    for override, key in (
        ("{tasks: arc}", "evaluation.benchmarks.tasks='arc'"),
        ("{tasks: [{a: b}]}", "evaluation.benchmarks.tasks=[{'a': 'b'}]"),
        ("{shots: 5}", "evaluation.benchmarks.shots=5"),
        ("{shots: {arc: many}}", "evaluation.benchmarks.shots.arc='many'"),
        ("{limit: all}", "evaluation.benchmarks.limit='all'"),
        ("{task: [arc]}", "evaluation.benchmarks.task: unknown key"),
    ):
        with pytest.raises(InputError) as caught:
            load_config(None, [f"evaluation.benchmarks={override}"])
        assert caught.value.faults[0].startswith(key)


def _vllm_annotations() -> Iterator[tuple[str, str]]:
    """Names and types of the fields of the installed vLLM's engine arguments, without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    file = Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs"):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield field.target.id, ast.unparse(field.annotation).removesuffix(" | None")


def test_engine_options_have_the_types_of_vllm():
    simple: dict[str, Any] = {
        "str": str, "int": int, "float": float, "bool": bool, "list[str]": list[str],
        "list[int]": list[int], "str | list[str]": str | list[str], "bool | str": bool | str,
        "set[str]": list[str], "dict": dict, "dict[str, Any]": dict, "dict[str, str]": dict,
    }  # fmt: skip
    found = dict(_vllm_annotations())
    assert len(found) > 100
    wrong = {
        name: kind
        for name, kind in found.items()
        if kind in simple and not name.startswith("_") and ENGINE_KINDS.get(name) != simple[kind]
    }
    assert wrong == {}
    assert set(ENGINE_KINDS) - set(found) == {"swap_space"}  # of older versions


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name, kind in ENGINE_KINDS.items()
        if kind is str and name not in ("model", "load_format", *ENGINE_REFUSED)
    ),
)
def test_a_text_of_an_engine_is_taken_as_typed(name):
    assert load_config(None, [f"generation.engine={{{name}: 007}}"]).generation.engine == {name: "007"}


FULL: dict[str, Any] = {
    "run": {"name": "a", "output_dir": "b", "seed": 1},
    "model": {
        "name_or_path": "m", "reference": "r", "revision": "c", "attention": "eager",
        "lora": {"r": 8, "alpha": 16, "dropout": 0.1, "target_modules": ["q_proj"]},
    },
    "data": {
        "train": [{"source": "x", "weight": 2.0}, {"source": "y"}],
        "eval": [{"source": "z", "weight": 1}],
        "max_length": 64, "max_prompt_length": 32, "quarantine_limit": 0.1,
        "template_kwargs": {"enable_thinking": False},
    },
    "objective": {
        "name": "tbpo_q", "beta": 0.1, "bregman": {"generator": "sba", "lam": 0.0, "scale": 4.0},
        "state_baseline": {"kind": "learned", "center": False, "clip": 1.0},
    },
    "training": {
        "epochs": 1.0, "max_steps": 3, "precision": "fp32", "optimizer": "adamw",
        "deepspeed": {
            "gradient_clipping": 1.0,
            "bf16": {"enabled": False},
            "zero_optimization": {
                "stage": 3, "overlap_comm": True, "reduce_bucket_size": 100,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
                "offload_param": {"device": "nvme", "nvme_path": "/x", "buffer_count": 5},
            },
        },
    },
    "cluster": {
        "num_workers": [1, 2], "use_gpu": "auto", "resources_per_worker": {"CPU": 1.0},
        "labels": {"train": {"zone": "a"}},
    },
    "tracking": {"uri": "http://h", "experiment": "e"},
    "generation": {
        "max_tokens": 8, "engines": [1, 2],
        "engine": {
            "max_num_seqs": 4, "dtype": "float32", "additional_config": {"a": 1},
            "cudagraph_capture_sizes": [1],
        },
    },
    "evaluation": {
        "prompts": "p", "policies": {"a": "b"}, "slice_by": ["c"], "baseline": "a",
        "judge": {
            "kind": "llm", "url": "http://h", "model": "m", "max_tokens": 3, "temperature": 0.5,
            "both_orders": True, "prompt_file": "f",
        },
        "benchmarks": {"tasks": ["arc"], "shots": {"arc": 3}, "limit": 2, "include_path": "d"},
    },
    "tune": {"trials": 2, "metric": ["a", "b"], "mode": ["max", "min"], "scheduler": "asha"},
    "compare": {"promote": {"model_name": "m", "metric": "x", "at_least": 0.5}, "output": "o"},
    "sft": {"training": {"max_steps": 2}},
    "runs": ["a", "b"],
}  # fmt: skip
"""A configuration in which every kind of nested value occurs."""
JUNK: tuple[Any, ...] = (
    None, True, 0, -7, 1.5, float("nan"), 10**30, "", "junk", [], ["junk"], [1], [[]], [None], [{"a": "b"}],
    {}, {"junk": 1}, {"stage": "junk"}, {"source": []}, {"kind": ["junk"]}, {"a": {"b": {"c": []}}},
)  # fmt: skip


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _replaced(path: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    tree = copy.deepcopy(FULL)
    place: Any = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = copy.deepcopy(junk)
    return tree


@pytest.mark.parametrize("path", _places(FULL), ids=lambda path: ".".join(map(str, path)))
def test_junk_anywhere_is_refused_by_its_key_or_accepted_whole(path):
    keys = [".".join(str(part) for part in path[:size]) for size in range(1, len(path) + 1)]
    refused = 0
    for junk in JUNK:
        try:
            config = validate(_replaced(path, junk))
        except InputError as error:
            refused += 1
            assert all(fault.startswith(keys[0]) for fault in error.faults), (junk, error.faults)
            # A list may contradict another list of its section, which is then named.
            nearest = keys[-2:] if path[:2] != ("tune", "metric") else keys
            assert any(key in fault for fault in error.faults for key in nearest), (junk, error.faults)
        else:
            again = validate(to_tree(config))  # a default such as 600 is then 600.0
            assert repr(validate(to_tree(again))) == repr(again)
    assert refused or path[0] == "sft" or path[1] == "template_kwargs" or "additional_config" in path


@pytest.mark.parametrize("section", sorted(FULL))
def test_junk_in_a_file_is_refused_by_its_key_or_accepted_whole(section, tmp_path):
    file = tmp_path / "c.yaml"
    for junk in JUNK:
        file.write_text(yaml.safe_dump({section: junk}))
        try:
            config = load_config(file)
        except InputError as error:
            assert all(fault.startswith(section) for fault in error.faults), (junk, error.faults)
        else:
            file.write_text(to_yaml(config), encoding="utf-8")
            assert to_yaml(load_config(file)) == to_yaml(config)

"""Mappings that the schema leaves open: overrides replace alternatives, malformed values name their keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from tbpo_ray.config.loading import load_config, stage_config
from tbpo_ray.errors import InputError

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
        ("{stage: true}", "training.deepspeed.stage=True"),
        ("{stage: null}", "training.deepspeed.stage=None"),
        ("{stage: 4}", "training.deepspeed.stage=4"),
        ("{stage: 2, zero_optimization: {stage: 2}}", "training.deepspeed"),
        ("{stage: 2, offload_optimizer: {device: cpu}}", f"{ZERO}.offload_optimizer"),
        ("{bf16: true}", "training.deepspeed.bf16=True"),
        ("{bf16: {enabled: auto}}", "training.deepspeed.bf16.enabled='auto'"),
        ("{gradient_clipping: auto}", "training.deepspeed.gradient_clipping='auto'"),
        ("{train_batch_size: 8}", "training.pairs_per_step"),
        ("{gradient_accumulation_steps: 4}", "training.deepspeed.gradient_accumulation_steps=4"),
        ("{optimizer: {type: Adam}}", "training.optimizer"),
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
        "{zero_optimization: {stage: 3, reduce_bucket_size: 5e8, stage3_max_live_parameters: 1e9}}",
        "{zero_optimization: {stage: 2, offload_optimizer: null, overlap_comm: true}}",
        "{zero_optimization: {stage: 2, offload_optimizer: {device: none}}}",
        "{stage: 2, gradient_clipping: 0.5, data_types: {grad_accum_dtype: fp32}, some_new_key: 1}",
    ],
)
def test_a_valid_deepspeed_mapping(value):
    assert load_config(None, [f"training.deepspeed={value}"])


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
        ("model.lora=small", "model.lora='small'"),
        ("model.lora={target_modules: {a: b}}", "model.lora.target_modules={'a': 'b'}"),
        ("data.template_kwargs={messages: 1}", "data.template_kwargs"),
        ("data.template_kwargs=x", "data.template_kwargs='x'"),
        ("run.name.x=1", "run.name={'x': 1}"),
    ],
)
def test_other_malformed_mappings(override, key):
    with pytest.raises(InputError) as caught:
        load_config(None, [override])
    assert any(key in fault for fault in caught.value.faults), caught.value.faults

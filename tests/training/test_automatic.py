"""ZeRO stage, recomputing activations and the budget of tokens, chosen by the memory plan."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tbpo_ray.config.loading import to_yaml
from tbpo_ray.errors import InputError
from tbpo_ray.models.preflight import ModelFacts
from tbpo_ray.training import memory_plan
from tbpo_ray.training.automatic import STAGES, describe_defaults, resolve_automatic
from tbpo_ray.training.batch import PairBatch
from tbpo_ray.training.memory_plan import GIB, plan_memory
from tbpo_ray.training.memory_trace import StepMemory
from tbpo_ray.training.resume_checks import adopt_resolved, refuse_changes
from tbpo_ray.training.run_plan import RunPlan
from tbpo_ray.workflows.trainer import ALLOCATOR_NAMES, KEEP_MEMORY, worker_environment
from tests.training.test_memory_plan import LENGTHS, plan

WORKERS = 4
FIXED = (
    f"cluster.num_workers={WORKERS}",
    "training.micro_batch_pairs=4",
)


WEIGHTS = 100_000
FACTS = ModelFacts("nowhere")


def planted_step(plan: RunPlan, facts: ModelFacts, batch: Callable[[], PairBatch]) -> StepMemory:
    """A step whose activations are known without running it."""
    per_token = 500 if plan.config.training.recomputes else 2000
    return StepMemory(
        weights=4 * WEIGHTS,
        trained=4 * WEIGHTS,
        parameters=WEIGHTS,
        trained_parameters=WEIGHTS,
        largest_layer=WEIGHTS // 5,
        reference=0,
        head=0,
        activations=per_token * batch().input_ids.numel(),
    )


@pytest.fixture(autouse=True)
def quick_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "trace_step", planted_step)
    # The model is large beside what stage 3 gathers at a time.
    monkeypatch.setattr(memory_plan, "LIVE_ELEMENTS", 0)


def needs(stage: int, recompute: bool) -> int:
    chosen = plan(
        *FIXED,
        f"training.deepspeed={{stage: {stage}}}",
        f"training.activation_checkpointing={str(recompute).lower()}",
    )
    return plan_memory(chosen, FACTS, LENGTHS).total


def resolved(available: int, *overrides: str) -> Any:
    limit = f"cluster.device_memory_gib={available / GIB!r}"
    return resolve_automatic(plan(*FIXED, limit, *overrides), FACTS, LENGTHS)


def test_the_lowest_stage_that_fits_is_chosen_and_recomputing_comes_last():
    sizes = {
        (recompute, stage): needs(stage, recompute)
        for recompute, stage in itertools.product((False, True), STAGES)
    }
    assert len({*sizes.values()}) == 6
    for available in sizes.values():
        found, notes = resolved(available)
        expected = next(key for key, size in sizes.items() if size <= available)
        training = found.config.training
        assert (training.activation_checkpointing, training.deepspeed) == (
            expected[0],
            {"stage": expected[1]},
        )
        assert [note.partition(":")[0] for note in notes] == [
            "training.deepspeed.stage",
            "training.activation_checkpointing=auto",
        ]
        assert "GiB by the memory plan" in notes[0]
    least = min(sizes.values())
    with pytest.raises(InputError, match=r"a worker needs .* offload_optimizer") as refusal:
        resolved(least // 2)
    assert "stage: 3}, which divides" not in str(refusal.value)


def test_a_value_that_is_set_is_kept():
    found, notes = resolved(needs(2, True), "training.activation_checkpointing=true")
    assert (found.config.training.zero_stage, len(notes)) == (2, 1)
    found, notes = resolved(needs(3, True), "training.deepspeed={stage: 3}")
    assert found.config.training.deepspeed == {"stage": 3}
    assert found.config.training.recomputes and len(notes) == 1
    both = ("training.deepspeed={stage: 0}", "training.activation_checkpointing=false")
    chosen = plan(*both)
    assert resolve_automatic(chosen, FACTS, LENGTHS) == (chosen, ())


def test_a_budget_of_tokens_is_chosen_for_the_stage():
    automatic = ("training.micro_batch_pairs=null", "training.micro_batch_tokens=auto")
    large, notes = resolved(10 * needs(1, False), *automatic)
    assert large.config.training.zero_stage == 1 and len(notes) == 3
    available = needs(3, False)
    small, _ = resolved(available, *automatic)
    assert small.config.training.zero_stage > 1
    assert small.config.training.token_budget <= large.config.training.token_budget
    assert plan_memory(small, FACTS, LENGTHS).total <= available


def test_half_is_left_for_activations_that_cannot_be_computed(monkeypatch):
    def failing(*arguments):
        return replace(planted_step(*arguments), activations=0, failure="planted")

    monkeypatch.setattr(memory_plan, "trace_step", failing)
    states = needs(2, False)
    found, notes = resolved(2 * states)
    assert found.config.training.zero_stage == 2 and "planted" in notes[0]
    found, notes = resolved(states)
    assert found.config.training.zero_stage == 3 and found.config.training.recomputes
    assert "need the least memory" in notes[0]


def test_without_a_known_memory_nothing_changes():
    found, notes = resolve_automatic(plan(), FACTS, LENGTHS)
    assert found.config.training.deepspeed == {"stage": 1}
    assert found.config.training.activation_checkpointing is False and notes == ()
    _, notes = resolve_automatic(plan("cluster.use_gpu=true"), FACTS, LENGTHS)
    assert "cluster.device_memory_gib" in notes[0]


def test_a_resumed_run_keeps_what_was_chosen_on_another_device(tmp_path: Path):
    found, _ = resolved(needs(3, True))
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(to_yaml(found.config))
    again = adopt_resolved(plan(*FIXED, "cluster.device_memory_gib=100").config, tmp_path)
    assert again.training.deepspeed == {"stage": 3} and again.training.recomputes
    refuse_changes(again, tmp_path)
    # The user may change both, since only rounding depends on them, but nothing else of DeepSpeed.
    other = plan(*FIXED, "training.deepspeed={stage: 2}", "training.activation_checkpointing=false")
    assert adopt_resolved(other.config, tmp_path) == other.config
    refuse_changes(other.config, tmp_path)
    clipped = plan(*FIXED, "training.deepspeed={stage: 2, gradient_clipping: 3}").config
    with pytest.raises(InputError, match=r"training\.deepspeed\.gradient_clipping=3"):
        refuse_changes(adopt_resolved(clipped, tmp_path), tmp_path)
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored["training"]["deepspeed"] == {"stage": 3}


def test_communication_overlaps_on_gpus_only():
    from tbpo_ray.training.deepspeed_engine import deepspeed_config

    for use_gpu in (True, False):
        config = plan(f"cluster.use_gpu={str(use_gpu).lower()}").config
        assert deepspeed_config(config)["zero_optimization"]["overlap_comm"] is use_gpu
        assert bool(describe_defaults(config)) is use_gpu
    own = plan("cluster.use_gpu=true", "training.deepspeed={zero_optimization: {overlap_comm: false}}").config
    assert deepspeed_config(own)["zero_optimization"]["overlap_comm"] is False
    assert describe_defaults(own)["overlap_comm"] == "false"


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_offloading_to_a_disk_needs_its_library(monkeypatch, part):
    from tbpo_ray.training.deepspeed_engine import check_offload_library, import_deepspeed

    import_deepspeed(torch.device("cpu"))
    from deepspeed.ops.op_builder import AsyncIOBuilder

    zero = f"{{stage: 3, {part}: {{device: nvme, nvme_path: /disk}}}}"
    config = plan(f"training.deepspeed={{zero_optimization: {zero}}}").config
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(InputError, match=rf"{part}\.device=nvme: .*libaio"):
        check_offload_library(config)
    check_offload_library(plan().config)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    check_offload_library(config)


@pytest.mark.parametrize(
    ("use_gpu", "driver", "job", "expected"),
    [
        (True, {}, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "a:b"}, {}, {"PYTORCH_CUDA_ALLOC_CONF": "a:b"}),
        (True, {"PYTORCH_ALLOC_CONF": "a:b"}, {}, {"PYTORCH_ALLOC_CONF": "a:b"}),
        (True, {}, {"env_vars": {"PYTORCH_ALLOC_CONF": "a:b"}}, {}),
        (False, {}, {}, KEEP_MEMORY),
    ],
    ids=["default", "old name", "new name", "job", "cpu"],
)
def test_gpu_workers_get_segments_that_expand_unless_the_user_decides(
    monkeypatch, use_gpu, driver, job, expected
):
    import ray

    for name in ALLOCATOR_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in driver.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=job))
    assert worker_environment(plan(f"cluster.use_gpu={str(use_gpu).lower()}").config) == expected

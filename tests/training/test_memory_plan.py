"""The memory plan: a step on tensors without values, ZeRO's arithmetic, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.models.preflight import ModelFacts
from tbpo_ray.training.estimate import _format_checkpoints
from tbpo_ray.training.memory_plan import (
    CUDA_CONTEXT,
    GIB,
    check_fits,
    device_memory,
    dummy_batch,
    fewest_workers,
    kv_cache_bytes,
    largest_micro_batch,
    plan_memory,
    resolve_budget,
)
from tbpo_ray.training.memory_trace import StorageCounter, trace_step
from tbpo_ray.training.resume_checks import adopt_resolved
from tbpo_ray.training.run_plan import make_schedule, resolve_run, with_budget
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.step import PreferenceStep

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
LENGTHS = np.random.default_rng(0).poisson((40, 30, 30), (64, 3))
FP32 = (
    "objective.name=dpo",
    "training.precision=fp32",
    "training.pairs_per_step=16",
    "cluster.use_gpu=false",
)


@pytest.fixture
def facts(tmp_path) -> ModelFacts:
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "llama")
    return ModelFacts(str(tmp_path / "llama"))


def plan(*overrides: str) -> Any:
    return resolve_run(load_config(None, [*FP32, *overrides]))


def test_a_storage_counts_from_its_creation_until_it_is_freed():
    with StorageCounter() as counter:
        first = torch.zeros(1000)
        view = first[10:]
        second = first * 2
        assert counter.live == counter.peak == 8000
        del first
        assert counter.live == 8000  # the view keeps it
        del view, second
        assert counter.live == 0 and counter.peak == 8000
    weight = torch.zeros(1000)
    counter = StorageCounter()
    counter.ignore([weight])
    with counter:
        transposed = weight.view(10, 100).t()
        assert counter.live == 0 and transposed.shape == (100, 10)


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.micro_batch_tokens=400",),
        ("training.micro_batch_pairs=4",),
        ("training.micro_batch_pairs=4", "training.shared_prompt=false"),
        ("training.micro_batch_tokens=400", "training.activation_checkpointing=true"),
        ("training.micro_batch_tokens=400", "objective.name=sft"),
    ],
)
def test_a_traced_step_creates_what_the_real_step_creates(facts, overrides):
    """The real step on real tensors, counted in the same way, has the same peak."""
    chosen = plan(*overrides)
    largest = largest_micro_batch(make_schedule(chosen, LENGTHS), LENGTHS, 1)
    traced = trace_step(chosen, facts, lambda: dummy_batch(chosen, largest))
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_config(facts.config, attn_implementation="sdpa")
    if chosen.config.training.recomputes:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    scorer = PairScorer(network).train()
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    step, batch = PreferenceStep(chosen.objective), dummy_batch(chosen, largest)
    counter = StorageCounter()
    for p in network.parameters():
        counter.ignore([p, p.grad])
    counter.ignore(network.buffers())
    with counter:
        loss, _ = step(scorer, batch)
        loss.backward()
    assert traced.failure is None
    assert traced.activations == pytest.approx(counter.peak, rel=0.02)
    assert traced.weights == 4 * sum(p.numel() for p in network.parameters())


@pytest.mark.heavy
def test_activations_grow_with_tokens_and_shrink_with_checkpointing(facts):
    small, large, recomputed = (
        plan_memory(plan(f"training.micro_batch_tokens={tokens}", *more), facts, LENGTHS, workers=1)
        for tokens, more in ((300, ()), (900, ()), (900, ("training.activation_checkpointing=true",)))
    )
    assert small.tokens <= 300 < large.tokens <= 900
    assert large.parts["activations"] > 2 * small.parts["activations"]
    assert recomputed.parts["activations"] < 0.8 * large.parts["activations"]
    assert recomputed.fixed == large.fixed


@pytest.mark.heavy
def test_states_follow_from_the_stage_and_the_number_of_workers(facts):
    n = sum(p.numel() for p in facts.skeleton.parameters())

    def parts(workers: int, *overrides: str) -> dict[str, int]:
        return plan_memory(
            plan("training.micro_batch_pairs=2", *overrides), facts, LENGTHS, workers=workers
        ).parts

    alone = parts(1, "training.deepspeed={stage: 3}")
    assert (alone["weights"], alone["gradients"], alone["master and optimizer"]) == (4 * n, 4 * n, 4 * n)
    assert alone["communication buckets"] == alone["gathered weights"] == 0
    for stage, gradients, weights in ((1, 4 * n, 4 * n), (2, n, 4 * n), (3, n, n)):
        found = parts(4, f"training.deepspeed={{stage: {stage}}}", "training.optimizer=adamw")
        assert found["master and optimizer"] == pytest.approx(12 * n / 4, rel=1e-3)
        assert found["gradients"] == pytest.approx(gradients, rel=1e-3)
        assert found["weights"] == pytest.approx(weights, rel=1e-3)
        assert (found["gathered weights"] > 0) is (stage == 3)
    bf16 = parts(1, "training.precision=bf16")
    assert (bf16["weights"], bf16["gradients"], bf16["master and optimizer"]) == (2 * n, 6 * n, 8 * n)
    offloaded = plan(
        "training.micro_batch_pairs=2",
        "training.deepspeed={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}",
    )
    memory = plan_memory(offloaded, facts, LENGTHS, workers=2)
    assert memory.parts["master and optimizer"] == memory.update == 0
    assert memory.host["offloaded"] == pytest.approx(8 * n / 2, rel=1e-3)
    assert (memory.checkpoint, memory.checkpoints) == (8 * n, 3 * 8 * n)


def test_a_checkpoint_in_the_background_is_one_copy_in_the_host_s_memory(facts):
    n = sum(p.numel() for p in facts.skeleton.parameters())

    def copied(*overrides: str) -> int:
        chosen = plan("training.micro_batch_pairs=2", "training.deepspeed={stage: 1}", *overrides)
        return plan_memory(chosen, facts, LENGTHS, workers=2).host["checkpoint being written"]

    assert copied() == 0  # on the CPU it is written from where it is
    assert copied("training.async_checkpoints=true") == pytest.approx(8 * n / 2, rel=1e-3)
    assert copied("cluster.use_gpu=true") == pytest.approx(8 * n / 2, rel=1e-3)
    assert copied("cluster.use_gpu=true", "training.async_checkpoints=false") == copied(
        "cluster.use_gpu=true"
    )


def test_the_plan_says_how_many_checkpoints_of_which_size(facts):
    chosen = plan("training.micro_batch_pairs=2", "training.keep_best=1", "training.best_metric=loss")
    memory = plan_memory(chosen, facts, LENGTHS)
    text = "\n".join(_format_checkpoints(chosen.config, memory, 103))
    assert "6, every 20 steps, written while training waits; kept: the latest 2, the best 1" in text
    for count in (1, 4, 6):  # each; kept and one being written; in all
        assert f"{count * memory.checkpoint} bytes" in text
    waiting = _format_checkpoints(plan("cluster.use_gpu=true").config, memory, 5)
    assert "5, every 1 steps, written while training continues" in waiting[0]


def test_a_live_reference_counts_whole_and_an_adapter_does_not(facts):
    live = plan_memory(plan("training.reference_scores=live", "training.micro_batch_pairs=2"), facts, LENGTHS)
    assert live.parts["reference"] == live.parts["weights"]
    lora = plan("training.reference_scores=live", "training.micro_batch_pairs=2", "model.lora.r=4")
    adapter = plan_memory(lora, facts, LENGTHS)
    assert adapter.parts["reference"] == 0 and adapter.parts["gradients"] < 0.2 * adapter.parts["weights"]


def test_what_cannot_fit_is_refused_with_the_calculation(facts):
    small = plan("training.micro_batch_tokens=900", "cluster.device_memory_gib=0.001")
    with pytest.raises(InputError) as refusal:
        check_fits(small, plan_memory(small, facts, LENGTHS))
    (fault,) = refusal.value.faults
    assert fault.startswith("training.micro_batch_tokens=900: a worker needs")
    assert "cluster.device_memory_gib" in fault and "training.deepspeed={stage: 3}" in fault
    large = plan("training.micro_batch_tokens=900", "cluster.device_memory_gib=1")
    check_fits(large, plan_memory(large, facts, LENGTHS))
    on_gpu = plan("training.micro_batch_tokens=900", "cluster.device_memory_gib=1", "cluster.use_gpu=true")
    with pytest.raises(InputError, match="CUDA context"):
        check_fits(on_gpu, plan_memory(on_gpu, facts, LENGTHS))
    assert CUDA_CONTEXT > GIB


def test_a_budget_that_is_too_large_names_one_that_fits(facts):
    chosen = plan("training.micro_batch_tokens=900", "training.pairs_per_step=64")
    memory = plan_memory(chosen, facts, LENGTHS)
    available = (memory.fixed + 0.5 * memory.parts["activations"]) / GIB
    tight = plan(
        "training.micro_batch_tokens=900",
        "training.pairs_per_step=64",
        f"cluster.device_memory_gib={available}",
    )
    with pytest.raises(InputError, match=r"at most about (\d+) tokens") as refusal:
        check_fits(tight, memory)
    assert "stage: 3" not in str(refusal.value)


@pytest.mark.heavy
def test_auto_takes_what_fits_and_a_resumed_run_keeps_it(facts, tmp_path):
    automatic = ("training.micro_batch_tokens=auto", "training.pairs_per_step=640")
    with pytest.raises(InputError, match=r"micro_batch_tokens=auto: .*cluster\.device_memory_gib"):
        resolve_budget(plan(*automatic), facts, LENGTHS)
    budgets = []
    for gib in (0.01, 0.02):
        chosen = resolve_budget(plan(*automatic, f"cluster.device_memory_gib={gib}"), facts, LENGTHS)
        budgets.append(chosen.config.training.token_budget or 0)
        assert plan_memory(chosen, facts, LENGTHS).total <= gib * GIB
    assert budgets[0] < budgets[1]
    with pytest.raises(InputError, match="more than the"):
        resolve_budget(plan(*automatic, "cluster.device_memory_gib=0.0001"), facts, LENGTHS)
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("training: {micro_batch_tokens: 777, packing: false}\n")
    again = adopt_resolved(plan(*automatic).config, tmp_path)
    assert (again.training.micro_batch_tokens, again.training.packing) == (777, False)
    other = plan("training.micro_batch_tokens=5").config
    assert adopt_resolved(other, tmp_path).training.micro_batch_tokens == 5
    assert adopt_resolved(other, tmp_path / "none") is other


def test_steps_can_be_counted_before_a_budget_is_known():
    automatic = plan("training.micro_batch_tokens=auto", "training.epochs=2")
    assert make_schedule(with_budget(automatic), LENGTHS).steps_total == 8


def test_a_step_that_depends_on_values_is_planned_without_activations(tmp_path):
    MixtralConfig(**SIZES, num_local_experts=4).save_pretrained(tmp_path / "moe")
    memory = plan_memory(plan("training.micro_batch_pairs=2"), ModelFacts(str(tmp_path / "moe")), LENGTHS)
    assert memory.parts["weights"] > 0
    assert (memory.failure is None) is (memory.parts["activations"] > 0)


def test_the_fewest_workers_that_fit_share_the_states(facts):
    many = (
        "training.micro_batch_tokens=200",
        "cluster.num_workers=[1,64]",
        "training.precision=bf16",
        "training.deepspeed={stage: 1}",
    )
    memory = plan_memory(plan(*many), facts, LENGTHS, workers=64)
    n = sum(p.numel() for p in facts.skeleton.parameters())
    # bf16 weights, bf16 and fp32 gradients, a bucket, and an eighth of the fp32 weights and their average.
    eighth = (2 + 6 + 4 + 8 / 8) * n + memory.parts["activations"]
    chosen = plan(*many, f"cluster.device_memory_gib={(eighth + n // 100) / GIB}")
    assert fewest_workers(chosen, memory) == 8
    assert fewest_workers(plan(*many), memory) is None


def test_the_memory_of_a_device_is_what_is_configured():
    assert device_memory(plan("cluster.device_memory_gib=2").config) == 2 * GIB
    assert device_memory(plan().config) is None


def test_the_cache_of_an_engine_counts_keys_and_values_of_all_layers(facts):
    assert kv_cache_bytes(plan().config, facts.config, 100) == 2 * 2 * 2 * 16 * 4 * 100

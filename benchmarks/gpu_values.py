"""Sections 1 and 2 of `gpu_check`: values and gradients against the CPU, and waits for the device."""

from __future__ import annotations

import copy
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_parts import (
    SMALL,
    TINY,
    Budget,
    Machine,
    Row,
    Shape,
    collated,
    full_precision,
    llama,
    micro_batches,
    preference_step,
    relative_error,
    training_config,
    training_parts,
)
from benchmarks.lengths import sample_lengths
from benchmarks.output_layer import Case, blockwise, make_inputs
from tbpo_ray.config.objective import BASELINE_KINDS, OBJECTIVES
from tbpo_ray.objectives import build_objective
from tbpo_ray.training.batch import BatchLayout, PairBatch
from tbpo_ray.training.readback import Readback
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.single_process import train_local

FP32_LIMIT = 1e-4
"""Largest difference between devices in fp32, relative to the largest value."""
BF16_LIMIT = 5e-2
"""The same in bf16, whose kernels round their sums differently on every device."""
SUMS_LIMIT = 1e-3
"""The output layer on bf16 inputs against the formula in fp64 on the same inputs: its sums are in fp32."""

SECTIONS: dict[str, dict[str, Any]] = {name: {"name": name} for name in OBJECTIVES} | {
    f"tbpo_a {kind}": {"name": "tbpo_a", "state_baseline": {"kind": kind}}
    for kind in BASELINE_KINDS
    if kind != "k3_sampled"  # other draws on every device
}


def values(machine: Machine, budget: Budget) -> Iterator[Row]:
    """Objectives, blockwise path and scorer on the device against the CPU."""
    with full_precision():
        yield from _output_layer(machine)
        shape = TINY if machine.quick else SMALL
        pairs = 3 if machine.quick else 8
        cpu = llama(shape, torch.device("cpu"))
        names = ["tbpo_q", "tbpo_a exact_kl", "sft"] if machine.quick else list(SECTIONS)
        for name in names:
            for dtype in (torch.float32, torch.bfloat16):
                if budget.is_spent:
                    yield {"case": name, "result": "skipped: the section's time is up"}
                    return
                yield _step_against_cpu(machine, cpu, shape, name, dtype, pairs)
        for shared in (True, False):
            yield _layout_against_cpu(machine, cpu, shape, pairs, shared=shared)


def _output_layer(machine: Machine) -> Iterator[Row]:
    tokens, width, vocabulary = (40, 32, 600) if machine.quick else (2048, 1024, 32_000)
    outputs = ("logp", "entropy", "kl")
    for dtype in ("float32", "bfloat16"):
        for frozen in (False, True):
            x = make_inputs(Case(outputs, frozen, tokens, width, vocabulary, dtype, str(machine.device)))
            found = blockwise(x, outputs)
            torch.stack(found).sum().backward()
            gradient = x.hidden.grad
            exact = copy.copy(x)
            exact.hidden = x.hidden.detach().double().requires_grad_()
            exact.weight = x.weight.detach().double()
            assert x.ref_hidden is not None and x.ref_weight is not None
            exact.ref_hidden, exact.ref_weight = x.ref_hidden.double(), x.ref_weight.double()
            expected = _in_double(exact, outputs)
            torch.stack(expected).sum().backward()
            errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
            assert gradient is not None and exact.hidden.grad is not None
            limit = FP32_LIMIT if dtype == "float32" else SUMS_LIMIT
            yield {
                "case": f"token_log_probs, weight {'frozen' if frozen else 'trained'}, against fp64",
                "dtype": dtype,
                "value_error": max(errors),
                # bf16 gradients are rounded to bf16 when they are handed on.
                "gradient_error": relative_error(gradient, exact.hidden.grad),
                "limit": limit,
                "ok": max(errors) <= limit,
            }


def _in_double(x: Any, outputs: tuple[str, ...]) -> list[Tensor]:
    """The formula of `output_layer.full_logits` in fp64."""
    logp = torch.log_softmax(x.hidden @ x.weight.T, -1)
    ref = torch.log_softmax(x.ref_hidden @ x.ref_weight.T, -1)
    found = {
        "logp": logp.gather(-1, x.labels[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "kl": (ref.exp() * (ref - logp)).sum(-1),
    }
    return [found[name] for name in outputs]


def _run(model: Any, section: dict[str, Any], width: int, pairs: PairBatch, reference: Any) -> list[Tensor]:
    """Loss, metrics and gradients of one step."""
    scorer = PairScorer(model).train()
    scorer.zero_grad(set_to_none=True)
    step, head = preference_step(section, width, pairs.labels.device, reference)
    loss, metrics = step(scorer, pairs)
    loss.backward()
    trained = [scorer, *([head] if head is not None else [])]
    gradients = [p.grad for module in trained for p in module.parameters() if p.grad is not None]
    named = torch.stack([metrics[name].to(loss.dtype) for name in sorted(metrics)])
    return [loss, named, torch.cat([gradient.reshape(-1).float() for gradient in gradients])]


def _step_against_cpu(
    machine: Machine, cpu: Any, shape: Shape, name: str, dtype: torch.dtype, pairs: int
) -> Row:
    objective = build_objective(SECTIONS[name])
    lengths = sample_lengths("hh_rlhf", 64)[:pairs].clip(2, 96)
    sides = 2 if objective.needs_rejected else 1
    found = []
    for device in (torch.device("cpu"), machine.device):
        model = copy.deepcopy(cpu).to(device, dtype)
        reference = None
        if objective.needs_kl or objective.needs_reverse_kl:
            reference = PairScorer(llama(shape, torch.device("cpu"), seed=1).to(device, dtype)).eval()
            reference.requires_grad_(False)
        pair_batch = collated(lengths, shape.vocabulary, device, sides=sides, chunks=True)
        found.append(_run(model, SECTIONS[name], shape.width, pair_batch, reference))
    errors = [relative_error(there, here) for here, there in zip(*found, strict=True)]
    limit = FP32_LIMIT if dtype == torch.float32 else BF16_LIMIT
    return {
        "case": f"step of {name}",
        "dtype": str(dtype).removeprefix("torch."),
        "value_error": max(errors[:2]),
        "gradient_error": errors[2],
        "limit": limit,
        "ok": max(errors) <= limit,
    }


def _layout_against_cpu(machine: Machine, cpu: Any, shape: Shape, pairs: int, *, shared: bool) -> Row:
    lengths = sample_lengths("ultrafeedback", 64)[:pairs] // (16 if machine.quick else 1)
    found = []
    for device in (torch.device("cpu"), machine.device):
        scorer = PairScorer(copy.deepcopy(cpu).to(device)).eval()
        found.append(scorer.reference_logps(collated(lengths, shape.vocabulary, device, shared=shared)))
    error = relative_error(found[1], found[0])
    return {
        "case": f"log-probs of {'shared' if shared else 'separate'} rows",
        "dtype": "float32",
        "value_error": error,
        "limit": FP32_LIMIT,
        "ok": error <= FP32_LIMIT,
    }


def syncs(machine: Machine, budget: Budget) -> Iterator[Row]:
    """Real training steps while every synchronization but the step's one reading is an error."""
    shape = TINY if machine.quick else SMALL
    lengths = sample_lengths("hh_rlhf", 64).clip(2, 200)
    batches = [[lengths[at : at + 2], lengths[at + 2 : at + 4]] for at in (0, 4)]
    for name in ("tbpo_q", "tbpo_a exact_kl", "tbpo_a k3_sampled", "dpo", "sft"):
        if budget.is_spent:
            yield {"case": name, "result": "skipped: the section's time is up"}
            return
        for shared in (True, False):
            yield _steps_without_syncs(machine, shape, name, batches, shared=shared)


def _steps_without_syncs(
    machine: Machine, shape: Shape, name: str, batches: list[list[np.ndarray]], *, shared: bool
) -> Row:
    section = {"name": "tbpo_a", "state_baseline": {"kind": "k3_sampled"}}
    section = SECTIONS.get(name, section)
    objective = build_objective(section)
    scorer = PairScorer(llama(shape, machine.device, torch.bfloat16)).train()
    reference = None
    if objective.needs_kl or objective.needs_samples:
        reference = PairScorer(llama(shape, machine.device, torch.bfloat16, seed=1)).eval()
        reference.requires_grad_(False)
    layout = BatchLayout(2 if objective.needs_rejected else 1, 0, shared, objective.compares_to_shorter)
    parts = training_parts(scorer, section, shape.width, layout, reference)
    config = training_config(section, optimizer="rmsprop")

    def steps(count: int) -> None:
        train_local(config, parts, micro_batches(batches[:count], shape.vocabulary), count)

    row: Row = {"case": f"{name}, {'shared' if shared else 'separate'} rows", "micro_batches_per_step": 2}
    steps(1)  # libraries load and allocate on first use
    reads = 0
    with _errors_on_sync(machine) as counted:
        try:
            steps(2)
            reads = counted[0]
        except RuntimeError as error:
            return row | {"result": f"{error} at {_last_frame(error)}", "ok": False}
    if not machine.is_cuda:
        return row | {"reads_per_step": reads / 2, "result": "not watched: no such mode on the CPU"}
    return row | {"reads_per_step": reads / 2, "result": "no other synchronization", "ok": reads == 2}


@contextmanager
def _errors_on_sync(machine: Machine) -> Iterator[list[int]]:
    """Within the block, CUDA calls that synchronize raise, except while a step reads its numbers.

    Yields the number of these readings, in a list.
    """
    read, counted = Readback.read, [0]

    def allowed(self: Readback) -> None:
        counted[0] += not self.is_read
        if machine.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        read(self)
        if machine.is_cuda:
            torch.cuda.set_sync_debug_mode("error")

    Readback.read = allowed  # type: ignore[method-assign]
    if machine.is_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield counted
    finally:
        Readback.read = read  # type: ignore[method-assign]
        if machine.is_cuda:
            torch.cuda.set_sync_debug_mode("default")


def _last_frame(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "tbpo_ray" in f.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"


def repeat(machine: Machine, budget: Budget) -> Iterator[Row]:
    """The same steps twice: whether the weights are equal bit for bit, with PyTorch's deterministic kernels
    and without."""
    shape = TINY if machine.quick else SMALL
    lengths = sample_lengths("ultrafeedback", 64)[:16] // (16 if machine.quick else 1)
    batches = [[lengths[at : at + 4]] for at in (0, 4, 8, 12)]
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    try:
        for deterministic in (False, True):
            for shared in (True, False):
                if budget.is_spent:
                    return
                torch.use_deterministic_algorithms(deterministic, warn_only=True)
                found = [_weights_after(machine, shape, batches, shared=shared) for _ in range(2)]
                yield {
                    "case": f"{'shared' if shared else 'separate'} rows",
                    "deterministic_kernels": "on" if deterministic else "off",
                    "weights": "equal" if torch.equal(*(flat for flat, _ in found)) else "differ",
                    "seconds_per_step": min(seconds for _, seconds in found),
                }
    finally:
        torch.use_deterministic_algorithms(False)
        if before is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]


def _weights_after(
    machine: Machine, shape: Shape, batches: list[list[np.ndarray]], *, shared: bool
) -> tuple[Tensor, float]:
    """All weights after a step per batch, and the median seconds of a step."""
    section = {"name": "tbpo_a", "state_baseline": {"kind": "k3"}}
    scorer = PairScorer(llama(shape, machine.device, torch.bfloat16)).train()
    parts = training_parts(scorer, section, shape.width, BatchLayout(2, 0, shared, True))
    config = training_config(section, optimizer="rmsprop")
    marks = [time.perf_counter()]
    train_local(
        config,
        parts,
        micro_batches(batches, shape.vocabulary),
        len(batches),
        lambda *_: marks.append(time.perf_counter()),
    )
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in scorer.parameters()])
    return flat, float(np.median(np.diff(marks)))

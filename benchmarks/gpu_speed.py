"""Sections 3 and 4 of `gpu_check`: pairs per second, MFU and memory of whole training steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.full_logits import FullLogitsScorer
from benchmarks.gpu_parts import (
    ONE_BILLION,
    TINY,
    Budget,
    Machine,
    Row,
    Shape,
    llama,
    micro_batches,
    sorted_batches,
    training_config,
    training_parts,
)
from tbpo_ray.objectives import build_objective
from tbpo_ray.training.batch import BatchLayout
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.single_process import train_local

K3 = {"name": "tbpo_a", "state_baseline": {"kind": "k3"}}
DPO = {"name": "dpo"}
PAIRS_PER_BATCH = {"hh_rlhf": 32, "ultrafeedback": 8}
"""About 6,000 positions in a micro-batch."""


@dataclass(frozen=True)
class Variant:
    """One way to run a training step; the defaults are this project's."""

    section: dict[str, Any] = field(default_factory=lambda: K3)
    shared: bool = True
    truncated: bool = True
    in_order: bool = True
    live_reference: bool = False
    full_logits: bool = False
    checkpointing: bool = False


VARIANTS: dict[str, Variant] = {
    "TBPO-A k3": Variant(),
    "TBPO-Q": Variant({"name": "tbpo_q"}),
    "DPO": Variant(DPO),
    "TBPO-A k3, separate rows": Variant(shared=False),
    "TBPO-A k3, answers whole": Variant(truncated=False),
    "TBPO-A k3, random order": Variant(in_order=False),
    "TBPO-A k3, live reference": Variant(live_reference=True),
    "TBPO-A k3, full logits": Variant(full_logits=True),
    "TBPO-A k3, activation checkpointing": Variant(checkpointing=True),
    "DPO, plain loop": Variant(
        DPO, shared=False, truncated=False, in_order=False, live_reference=True, full_logits=True
    ),
}


@dataclass
class Bench:
    """A policy and a frozen reference, built once and shared by all variants."""

    machine: Machine
    shape: Shape
    policy: Any
    frozen: Any

    @classmethod
    def build(cls, machine: Machine) -> Bench:
        shape = TINY if machine.quick else ONE_BILLION
        dtype = torch.bfloat16
        policy = llama(shape, machine.device, dtype)
        return cls(machine, shape, policy, llama(shape, machine.device, dtype, seed=1).requires_grad_(False))

    def measure(self, variant: Variant, kind: str, seconds: float) -> Row:
        """Steps of one micro-batch for about `seconds`, after two that warm up."""
        machine, quick = self.machine, self.machine.quick
        per_batch = 2 if quick else PAIRS_PER_BATCH[kind]
        batches = sorted_batches(kind, per_batch * (2 if quick else 8), per_batch, in_order=variant.in_order)
        if quick:
            batches = [(lengths // 16).clip(2) for lengths in batches]
        objective = build_objective(variant.section)
        truncated = variant.truncated and objective.compares_to_shorter
        kind_of_scorer = FullLogitsScorer if variant.full_logits else PairScorer
        scorer = kind_of_scorer(self.policy).train()
        if variant.checkpointing:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        reference = kind_of_scorer(self.frozen).eval() if variant.live_reference else None
        layout = BatchLayout(2, 0, variant.shared, truncated)
        parts = training_parts(scorer, variant.section, self.shape.width, layout, reference)
        config = training_config(variant.section, optimizer="rmsprop")
        # The longest first, so that the allocator has grown when the clock starts.
        longest = max(range(len(batches)), key=lambda i: int(batches[i].sum()))
        batches = [batches[longest], *batches]
        marks: list[float] = []

        def on_step(step: int, row: dict[str, float]) -> None:
            if len(marks) == 1:
                machine.reset_peak(keep_cache=True)
            marks.append(time.perf_counter())
            if len(marks) > 3 and marks[-1] - marks[1] > seconds:
                raise _TimeUpError

        limit = 4 if quick else 1 + 6 * (len(batches) - 1)
        machine.reset_peak()
        try:
            train_local(
                config, parts, micro_batches(batches, self.shape.vocabulary, 1, limit), limit, on_step
            )
        except _TimeUpError:
            pass
        finally:
            self.policy.gradient_checkpointing_disable()
            self.policy.zero_grad(set_to_none=True)
        steps = [batches[step % len(batches)] for step in range(2, len(marks))]
        return self._figures(variant, steps, marks[-1] - marks[1], truncated=truncated)

    def _figures(self, variant: Variant, steps: list[np.ndarray], elapsed: float, *, truncated: bool) -> Row:
        lengths = np.concatenate(steps)
        if truncated:
            shorter = lengths[:, 1:].min(axis=1)
            lengths = np.column_stack([lengths[:, 0], shorter, shorter])
        row: Row = {
            "pairs_per_second": len(lengths) / elapsed,
            "seconds_per_step": elapsed / len(steps),
            "steps": len(steps),
            "peak_gib": _gib(self.machine.peak_bytes()),
        }
        if self.machine.peak_flops:
            needed = float(self.useful_flops(lengths).sum())
            row["useful_tflops"] = needed / elapsed / 1e12
            row["mfu"] = needed / elapsed / self.machine.peak_flops
        return row

    def useful_flops(self, lengths: np.ndarray) -> np.ndarray:
        """[N] floating-point operations that the pairs need at least, forward and backward.

        Every token of prompt and answers goes through the layers once, answer tokens through the output
        layer: 6 operations per parameter and token; attention adds 12 layers x width for each key that a
        token sees. Repeated prompts, padding, whole-row logits, recomputation and a live reference do not
        count, so that variants are compared on the same work.
        """
        shape = self.shape
        answers = lengths[:, 1:].sum(axis=1)
        layers = 6.0 * shape.body_parameters * lengths.sum(axis=1)
        output = 6.0 * shape.width * shape.vocabulary * answers
        seen = lengths[:, 0] ** 2 / 2 + (lengths[:, 0, None] * lengths[:, 1:] + lengths[:, 1:] ** 2 / 2).sum(
            1
        )
        return np.asarray(layers + output + 12.0 * shape.layers * shape.width * seen)


class _TimeUpError(Exception):
    """Ends the training loop of a measurement."""


def training(machine: Machine, budget: Budget) -> Iterator[Row]:
    """Pairs per second, MFU and peak memory: this project's step, each switch off, and the plain loop.

    bf16 weights and optimizer state, one micro-batch a step; without ZeRO's fp32 master weights.
    """
    bench = Bench.build(machine)
    names = ["TBPO-A k3", "TBPO-Q", "DPO, plain loop"] if machine.quick else list(VARIANTS)
    share = budget.seconds / (2 * len(names)) / 2
    for kind in PAIRS_PER_BATCH:
        for name in names:
            if budget.is_spent:
                yield {"case": f"{kind}: {name}", "result": "skipped: the section's time is up"}
                continue
            row: Row = {"case": f"{kind}: {name}"}
            try:
                row |= bench.measure(VARIANTS[name], kind, share)
            except torch.OutOfMemoryError:
                row["result"] = "out of memory"
                machine.reset_peak()
            yield row
    yield {"case": "TRL's DPOTrainer", "result": _trl_result()}


def _trl_result() -> str:
    try:
        from trl import DPOTrainer
    except ImportError as error:
        return f"not run: {error}"
    return f"not run: {DPOTrainer.__module__} is there; run `jobs/benchmark.py --only training` beside it"


def memory(machine: Machine, budget: Budget) -> Iterator[Row]:
    """Peak memory of a step at five shapes, foretold on tensors without memory and measured.

    `planned` is traced as if on the CPU, as `--dry-run` does on any machine; `traced` as if on this GPU.
    """
    from benchmarks.gpu_memory import foretell, one_step

    base = TINY if machine.quick else Shape(128_256, 2048, 8, 32, 8, 8192)
    long = 64 if machine.quick else 2048
    cases: list[tuple[str, Shape, int, int, Variant]] = [
        ("short rows", base, 8, long // 8, Variant()),
        ("long rows", base, 2, long, Variant()),
        ("long rows, activation checkpointing", base, 2, long, Variant(checkpointing=True)),
        ("small vocabulary", Shape(base.vocabulary // 4, *_rest(base)), 4, long // 2, Variant()),
        ("full logits", base, 2, long // 4, Variant(full_logits=True)),
    ]
    for name, shape, pairs, length, variant in cases:
        if budget.is_spent:
            yield {"case": name, "result": "skipped: the section's time is up"}
            continue
        lengths = np.tile([length // 2, length // 4, length // 4], (pairs, 1))
        began = time.perf_counter()
        planned = foretell(torch.device("cpu"), shape, lengths, variant)
        row: Row = {
            "case": name,
            "planned_gib": _gib(planned),
            "seconds_to_plan": time.perf_counter() - began,
        }
        if not machine.is_cuda:
            yield row | {"result": "not measured: the CPU's allocator does not count"}
            continue
        traced = foretell(machine.device, shape, lengths, variant)
        machine.reset_peak()
        one_step(machine.device, shape, lengths, variant)
        measured = machine.peak_bytes()
        assert measured is not None
        yield row | {
            "traced_gib": _gib(traced),
            "measured_gib": _gib(measured),
            "error_of_plan": planned / measured - 1,
            "error_of_trace": traced / measured - 1,
        }


def _rest(shape: Shape) -> tuple[int, int, int, int, int]:
    return shape.width, shape.layers, shape.heads, shape.key_value_heads, shape.intermediate


def _gib(value: float | None) -> float | None:
    return None if value is None else value / 2**30

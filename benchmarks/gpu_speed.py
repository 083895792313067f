"""Sections 3 and 4 of `gpu_check`: pairs per second, MFU and memory of whole training steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    training_config,
    training_parts,
)
from benchmarks.lengths import sample_lengths
from tbpo_ray.objectives import build_objective
from tbpo_ray.training.batch import BatchLayout
from tbpo_ray.training.components import TrainingComponents
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.single_process import train_local

K3 = {"name": "tbpo_a", "state_baseline": {"kind": "k3"}}
DPO = {"name": "dpo"}
PAIRS_PER_STEP = {"hh_rlhf": 64, "ultrafeedback": 32}
STEPS = 4
"""Steps in a round. Measurements are of whole rounds, so that every variant sees the same pairs."""
MICRO_BATCH_TOKENS = 16_384
"""Positions of a micro-batch, padding included."""


@dataclass(frozen=True)
class Variant:
    """One way to run a training step; the defaults are this project's."""

    section: dict[str, Any] = field(default_factory=lambda: K3)
    shared: bool = True
    truncated: bool = True
    in_order: bool = True
    micro_pairs: int | None = None
    """Pairs in a micro-batch; None: as many as MICRO_BATCH_TOKENS hold."""
    live_reference: bool = False
    full_logits: bool = False
    checkpointing: bool = False
    liger: bool = False
    compiled: bool = False
    cudnn: bool = False
    """With cuDNN's attention, which builds a plan for every new shape."""

    @property
    def cuts_answers(self) -> bool:
        return self.truncated and build_objective(self.section).compares_to_shorter

    def cut(self, lengths: np.ndarray) -> np.ndarray:
        """[n, 3] lengths with the longer answer cut to the shorter one, if the variant does that."""
        if not self.cuts_answers:
            return lengths
        shorter = lengths[:, 1:].min(axis=1)
        return np.column_stack([lengths[:, 0], shorter, shorter])

    def micro_batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Distribute the pairs of a step, [n, 3], over micro-batches."""
        cut = self.cut(lengths)
        rows = cut.sum(axis=1) if self.shared else cut[:, 0] + cut[:, 1:].max(axis=1)
        order = np.argsort(rows, kind="stable") if self.in_order else np.arange(len(rows))
        found: list[np.ndarray] = []
        first = 0
        for last in range(1, len(order) + 1):
            positions = (last + 1 - first) * rows[order[first : last + 1]].max() * (1 if self.shared else 2)
            full = (
                positions > MICRO_BATCH_TOKENS
                if self.micro_pairs is None
                else last - first == self.micro_pairs
            )
            if full or last == len(order):
                found.append(lengths[order[first:last]])
                first = last
        return found


VARIANTS: dict[str, Variant] = {
    "TBPO-A k3": Variant(),
    "TBPO-Q": Variant({"name": "tbpo_q"}),
    "DPO": Variant(DPO),
    "TBPO-A k3, separate rows": Variant(shared=False),
    "TBPO-A k3, answers whole": Variant(truncated=False),
    "TBPO-A k3, random order": Variant(in_order=False, micro_pairs=16),
    "TBPO-A k3, live reference": Variant(live_reference=True),
    "TBPO-A k3, full logits": Variant(full_logits=True),
    "TBPO-A k3, activation checkpointing": Variant(checkpointing=True),
    "DPO, plain loop": Variant(
        DPO,
        shared=False,
        truncated=False,
        in_order=False,
        micro_pairs=8,
        live_reference=True,
        full_logits=True,
    ),
    "TBPO-A k3, Liger's layers": Variant(liger=True),
    "TBPO-Q, Liger's layers": Variant({"name": "tbpo_q"}, liger=True),
    "DPO, Liger's layers": Variant(DPO, liger=True),
    "TBPO-A k3, cuDNN's attention": Variant(cudnn=True),
    "TBPO-A k3, compiled layers": Variant(compiled=True),
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
        """Whole rounds of steps for about `seconds`, after two steps that warm up."""
        machine = self.machine
        parts, steps = self.parts(variant), self.steps(variant, kind)
        torch.backends.cuda.enable_cudnn_sdp(variant.cudnn)
        config = training_config(variant.section, optimizer="rmsprop")
        # The longest first, so that the allocator has grown when the clock starts.
        longest = max((lengths for step in steps for lengths in step), key=lambda x: int(x.sum(1).max()))
        stream = [[longest], steps[0]] + steps * (1 if machine.quick else 8)
        marks: list[float] = []

        def on_step(step: int, row: dict[str, float]) -> None:
            marks.append(time.perf_counter())
            if len(marks) == 2:
                machine.reset_peak(keep_cache=True)
            rounds, inside = divmod(len(marks) - 2, len(steps))
            if rounds and not inside and marks[-1] - marks[1] > seconds:
                raise _TimeUpError

        machine.reset_peak()
        before = machine.allocated_bytes() or 0.0
        try:
            train_local(config, parts, micro_batches(stream, self.shape.vocabulary), len(stream), on_step)
        except _TimeUpError:
            pass
        finally:
            torch.backends.cuda.enable_cudnn_sdp(False)
            self.policy.gradient_checkpointing_disable()
            self.policy.zero_grad(set_to_none=True)
        row = self._figures(variant, stream[2 : len(marks)], marks[-1] - marks[1])
        return row | {"steps_gib": gib(above(machine.peak_bytes(), before))}

    def parts(self, variant: Variant) -> TrainingComponents:
        kind_of_scorer = FullLogitsScorer if variant.full_logits else PairScorer
        scorer = kind_of_scorer(self.policy).train()
        if variant.checkpointing:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        reference = kind_of_scorer(self.frozen).eval() if variant.live_reference else None
        layout = BatchLayout(2, 0, variant.shared, variant.cuts_answers)
        return training_parts(scorer, variant.section, self.shape.width, layout, reference)

    def steps(self, variant: Variant, kind: str) -> list[list[np.ndarray]]:
        """For each step of a round, the lengths [pairs, 3] of its micro-batches."""
        return [variant.micro_batches(lengths) for lengths in step_lengths(kind, quick=self.machine.quick)]

    def _figures(self, variant: Variant, steps: list[list[np.ndarray]], elapsed: float) -> Row:
        lengths = np.concatenate([batch for step in steps for batch in step])
        row: Row = {
            "pairs_per_second": len(lengths) / elapsed,
            "seconds_per_step": elapsed / len(steps),
            "micro_batches_per_step": sum(map(len, steps)) / len(steps),
            "steps": len(steps),
        }
        if self.machine.peak_flops:
            needed = float(self.useful_flops(variant.cut(lengths)).sum())
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


def step_lengths(kind: str, *, quick: bool) -> list[np.ndarray]:
    """Lengths [pairs, 3] of the pairs of each step of a round, the same for every trainer."""
    pairs, count = (4, 2) if quick else (PAIRS_PER_STEP[kind], STEPS)
    lengths = sample_lengths(kind, pairs * count)
    if quick:
        lengths = (lengths // 16).clip(2)
    return [lengths[at::count] for at in range(count)]


class _TimeUpError(Exception):
    """Ends the training loop of a measurement."""


def training(machine: Machine, budget: Budget) -> Iterator[Row]:
    """Pairs per second, MFU and peak memory: this project's step, each switch off, and the plain loop.

    bf16 weights and optimizer state; without ZeRO's fp32 master weights. `steps_gib`
    is what steps take at their peak beyond the weights of policy and reference: gradients, optimizer state
    and activations.
    """
    bench = Bench.build(machine)
    names = ["TBPO-A k3", "TBPO-Q", "DPO, plain loop"] if machine.quick else list(VARIANTS)
    share = budget.seconds / (2 * len(names)) / 2
    for kind in PAIRS_PER_STEP:
        for name in names:
            if budget.is_spent:
                yield {"case": f"{kind}: {name}", "result": "skipped: the section's time is up"}
                continue
            row: Row = {"case": f"{kind}: {name}"}
            try:
                with layers_changed(bench.policy, VARIANTS[name]):
                    row |= bench.measure(VARIANTS[name], kind, share)
            except torch.OutOfMemoryError:
                row["result"] = "out of memory"
            except Exception as error:  # a compiler or a carried package can fail in its own ways
                row["result"] = f"not run: {type(error).__name__}: {str(error)[:160]}"
            machine.reset_peak()
            yield row


@contextmanager
def layers_changed(model: Any, variant: Variant) -> Iterator[None]:
    """Within the block, the model's layers run with Liger's kernels, or compiled."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    if variant.liger:
        from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    if variant.compiled:
        for layer in model.get_decoder().layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        yield
    finally:
        vars(modeling_llama).update(before)
        for module in model.modules():
            module.__dict__.pop("forward", None)


def memory(machine: Machine, budget: Budget) -> Iterator[Row]:
    """Peak memory of a step at five shapes, foretold on tensors without memory and measured.

    `planned` is traced as if on the CPU, as `--dry-run` does on any machine; `traced` as if on this GPU.
    """
    from benchmarks.gpu_memory import foretell, one_step

    base = TINY if machine.quick else Shape(128_256, 2048, 8, 32, 8, 8192)
    long = 64 if machine.quick else 2048
    cases: list[tuple[str, Shape, int, int, Variant]] = [
        ("short rows", base, 64, long // 8, Variant()),
        ("long rows", base, 8, long, Variant()),
        ("long rows, activation checkpointing", base, 32, long, Variant(checkpointing=True)),
        ("small vocabulary", Shape(base.vocabulary // 4, *_rest(base)), 16, long // 2, Variant()),
        ("full logits", base, 16, long // 4, Variant(full_logits=True)),
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
            "planned_gib": gib(planned),
            "seconds_to_plan": time.perf_counter() - began,
        }
        if not machine.is_cuda:
            yield row | {"result": "not measured: the CPU's allocator does not count"}
            continue
        traced = foretell(machine.device, shape, lengths, variant)
        machine.reset_peak()
        before = machine.allocated_bytes()
        one_step(machine.device, shape, lengths, variant)
        measured = above(machine.peak_bytes(), before)
        assert measured is not None
        yield row | {
            "traced_gib": gib(traced),
            "measured_gib": gib(measured),
            "error_of_plan": planned / measured - 1,
            "error_of_trace": traced / measured - 1,
        }


def _rest(shape: Shape) -> tuple[int, int, int, int, int]:
    return shape.width, shape.layers, shape.heads, shape.key_value_heads, shape.intermediate


def above(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base


def gib(value: float | None) -> float | None:
    return None if value is None else value / 2**30

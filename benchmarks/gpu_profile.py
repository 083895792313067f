"""Section `profile` of `gpu_check`: what a training step at the 1B shape spends its time on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch.profiler

from benchmarks.gpu_parts import Budget, Machine, Row, micro_batches, training_config
from benchmarks.gpu_speed import K3, PAIRS_PER_STEP, Bench, Variant
from tbpo_ray.training.single_process import train_local

WARM_UP, RECORDED = 2, 3
SHOWN = 25
WAITS = ("Synchronize", "cudaMemcpy")
"""Calls in which the host waits for the device."""


def profile(machine: Machine, budget: Budget) -> Iterator[Row]:
    """The kernels that take most of the device's time, per step, of one step."""
    bench = Bench.build(machine)
    for kind in PAIRS_PER_STEP:
        if budget.is_spent:
            yield {"case": kind, "result": "skipped: the section's time is up"}
            continue
        found, seconds = _record(bench, kind)
        yield from _rows(machine, kind, found, seconds)


def _record(bench: Bench, kind: str) -> tuple[torch.profiler.profile, float]:
    """The profile of some steps, and the seconds that they took."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.machine.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    marks: list[float] = []

    def on_step(step: int, row: dict[str, float]) -> None:
        bench.machine.synchronize()
        if step == WARM_UP:
            profiler.start()
        if step >= WARM_UP:
            marks.append(time.perf_counter())
        if step == WARM_UP + RECORDED:
            profiler.stop()

    parts = bench.parts(Variant())
    steps = bench.steps(Variant(), kind)[:1] * (WARM_UP + RECORDED)
    config = training_config(K3, optimizer="rmsprop")
    train_local(config, parts, micro_batches(steps, bench.shape.vocabulary), len(steps), on_step)
    bench.policy.zero_grad(set_to_none=True)
    return profiler, marks[-1] - marks[0]


def _rows(machine: Machine, kind: str, found: torch.profiler.profile, seconds: float) -> Iterator[Row]:
    events: list[Any] = list(found.key_averages())
    on_device = [event for event in events if event.self_device_time_total and not event.self_cpu_time_total]
    on_device = [event for event in on_device if "#" not in event.key]  # spans of several kernels
    timed = on_device if machine.is_cuda else events
    cost = {id(event): _own(machine, event) / RECORDED / 1e3 for event in timed}
    waited = sum(e.self_cpu_time_total for e in events if any(name in e.key for name in WAITS))
    yield {
        "case": f"{kind}: a step",
        "milliseconds": 1e3 * seconds / RECORDED,
        "kernels": sum(event.count for event in timed) / RECORDED,
        "device_milliseconds": sum(cost.values()),
        "host_waits_milliseconds": waited / RECORDED / 1e3,
    }
    for event in sorted(timed, key=lambda event: -cost[id(event)])[:SHOWN]:
        yield {
            "case": f"{kind}: {event.key[:90]}",
            "milliseconds": cost[id(event)],
            "kernels": event.count / RECORDED,
        }


def _own(machine: Machine, event: Any) -> float:
    """Microseconds."""
    return float(event.self_device_time_total if machine.is_cuda else event.self_cpu_time_total)

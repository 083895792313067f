"""Runs two training steps of a shape in this process and prints its peak memory; see `memory_plan`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""Freed tensors are returned to the system at once, so that the resident size is what is in use."""


def peak_of(payload: dict[str, Any]) -> int:
    """Bytes of the largest resident size during two steps, beyond that before them."""
    import torch

    from benchmarks.memory_plan import lengths, plan_of
    from tbpo_ray.models.load import add_lora, load_model
    from tbpo_ray.training.memory_plan import dummy_batch, largest_micro_batch
    from tbpo_ray.training.memory_trace import build_head
    from tbpo_ray.training.optim import build_optimizer
    from tbpo_ray.training.run_plan import make_schedule
    from tbpo_ray.training.scorer import PairScorer
    from tbpo_ray.training.step import PreferenceStep

    plan = plan_of(payload)
    largest = largest_micro_batch(make_schedule(plan, lengths()), lengths(), 1)

    def train(batch: Any) -> None:
        network: Any = load_model(payload["model"], dtype=plan.dtype)
        if plan.config.training.recomputes:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        if plan.config.model.lora is not None:
            network = add_lora(network, plan.config.model.lora)
        scorer = PairScorer(network).train()
        head = build_head(plan, scorer)
        step = PreferenceStep(plan.objective, head, "adapter_off" if plan.adapter_off_reference else None)
        optimizer = build_optimizer(scorer.parameters(), plan.config.training)
        head_optimizer = torch.optim.AdamW(head.parameters()) if head is not None else None
        for _ in range(2):
            for _ in range(2):
                loss, _ = step(scorer, batch)
                (loss / len(largest)).backward()  # type: ignore[no-untyped-call]
                del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if head_optimizer is not None:
                head_optimizer.step()
                head_optimizer.zero_grad(set_to_none=True)

    torch.manual_seed(0)
    batch = dummy_batch(plan, largest)
    train(dummy_batch(plan, largest[:1]))  # what libraries allocate once
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # resets the largest resident size
    train(batch)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if not MALLOC.items() <= os.environ.items():
        # The allocator reads its settings at the start of a process.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.memory_loop", sys.argv[-1]],
            os.environ | MALLOC,
        )
    print(json.dumps({"peak_bytes": peak_of(json.loads(sys.argv[-1]))}))

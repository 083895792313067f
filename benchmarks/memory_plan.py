"""The memory plan of a step against the peak of the process that runs it, on the CPU.

Each shape runs in a process of its own: two micro-batches and an optimizer step, twice. The measured peak is
the largest resident size of the process beyond what it had after its imports and a step of a tiny model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import run_child
from benchmarks.pairs import LARGE_VOCABULARY, MODEL, TINY, Size, build_model
from benchmarks.tables import table
from tbpo_ray.config.loading import load_config
from tbpo_ray.config.schema import Config
from tbpo_ray.models.preflight import ModelFacts
from tbpo_ray.training.memory_plan import plan_memory
from tbpo_ray.training.run_plan import resolve_run

GOAL = 0.1
"""The largest relative deviation of the plan from the measurement."""
_SMALL_VOCABULARY = Size(vocabulary=4096)
"""With checkpointing the peak is where the embedding's gradient is made. It is mostly zeros, whose pages the
system never fills on a CPU, so the embedding is kept small here."""
SHAPES: dict[str, tuple[Size, list[str]]] = {
    "packed rows, TBPO-Q": (MODEL, ["training.micro_batch_tokens=1024"]),
    "padded rows, DPO, AdamW": (
        MODEL,
        ["objective.name=dpo", "training.micro_batch_pairs=4", "training.optimizer=adamw"],
    ),
    "separate rows, SFT": (
        MODEL,
        ["objective.name=sft", "training.micro_batch_pairs=4", "training.shared_prompt=false"],
    ),
    "activation checkpointing": (
        _SMALL_VOCABULARY,
        ["training.micro_batch_tokens=2048", "training.activation_checkpointing=true"],
    ),
    "LoRA, TBPO-A, 128k vocabulary": (
        LARGE_VOCABULARY,
        ["objective.name=tbpo_a", "model.lora.r=16", "training.micro_batch_tokens=1024"],
    ),
}
"""Model sizes and overrides."""
_PAIR = (120, 100, 110)
"""Tokens of prompt, chosen and rejected, on average."""


def run(config: Config, *, quick: bool = False) -> list[dict[str, Any]]:
    """Plan and measure each shape.

    Args:
        quick: tiny models, to check that the benchmark runs.

    Returns:
        Rows with `shape`, `predicted_bytes`, `measured_bytes`, and `seconds` that the plan took.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="tbpo-memory-") as name:
        for index, (shape, (size, overrides)) in enumerate(SHAPES.items()):
            model = Path(name) / f"model-{index}"
            build_model(model, TINY if quick else size)
            payload = {"model": str(model), "overrides": [f"model.name_or_path={model}", *overrides]}
            began = time.perf_counter()
            predicted = predict(payload)
            seconds = time.perf_counter() - began
            measured = run_child(["-m", "benchmarks.memory_loop"], payload)["peak_bytes"]
            rows.append(
                {
                    "shape": shape,
                    "predicted_bytes": predicted,
                    "measured_bytes": int(measured),
                    "seconds": seconds,
                }
            )
    return rows


def plan_of(payload: dict[str, Any]) -> Any:
    """The resolved configuration of a shape: one fp32 worker on the CPU."""
    base = [
        "training.precision=fp32",
        "training.pairs_per_step=16",
        "cluster.use_gpu=false",
        "training.length_batches=false",
    ]
    return resolve_run(load_config(None, [*base, *payload["overrides"]]))


def lengths() -> np.ndarray:
    """[N, 3] lengths of the pairs."""
    return np.random.default_rng(0).poisson(_PAIR, (64, 3))


def predict(payload: dict[str, Any]) -> int:
    """Bytes of the peak by the memory plan."""
    return plan_memory(plan_of(payload), ModelFacts(payload["model"]), lengths()).total


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table."""
    cells = []
    for row in rows:
        off = row["predicted_bytes"] / row["measured_bytes"] - 1
        cells.append(
            [
                row["shape"],
                f"{row['predicted_bytes'] / 2**20:,.0f}",
                f"{row['measured_bytes'] / 2**20:,.0f}",
                f"{off:+.1%}",
                f"within {GOAL:.0%}: {'reached' if abs(off) <= GOAL else 'missed'}",
                f"{row['seconds']:.1f}",
            ]
        )
    head = ["shape", "planned, MiB", "measured, MiB", "plan over measurement", "goal", "seconds to plan"]
    intro = (
        "Peak memory of one fp32 worker on the CPU: weights, gradients, optimizer state and the activations "
        "of the largest micro-batch. Planned on tensors without values, measured as the process's largest "
        "resident size."
    )
    return f"{intro}\n\n{table(head, cells)}"

"""What the sections of `gpu_check` share: the machine, models with random weights, batches, a training step.

Needs torch, transformers, NumPy and pydantic only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tbpo_ray.config.schema import Config
from tbpo_ray.data.reader import MicroBatch
from tbpo_ray.objectives import build_objective, build_state_baseline
from tbpo_ray.training.batch import BatchLayout, PairBatch, collate_columns
from tbpo_ray.training.components import TrainingComponents
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.step import PreferenceStep

Row = dict[str, Any]
"""One line of a section's table: figures by name."""


@dataclass(frozen=True)
class Machine:
    """Where the check runs, and how much of it."""

    device: torch.device
    quick: bool
    """Tiny sizes, to try the script itself."""
    peak_flops: float | None = None
    """Dense bf16 matmul rate of the card, for MFU; None if it is not known."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def reset_peak(self, *, keep_cache: bool = False) -> None:
        """Start to measure the peak; `keep_cache` leaves the allocator its blocks, which take time to get."""
        if self.is_cuda:
            if not keep_cache:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> float | None:
        """The allocator's peak since `reset_peak`; None on the CPU, whose allocator does not count."""
        return float(torch.cuda.max_memory_allocated()) if self.is_cuda else None

    def allocated_bytes(self) -> float | None:
        """What the allocator holds now; None on the CPU."""
        return float(torch.cuda.memory_allocated()) if self.is_cuda else None

    def seconds(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """Median seconds of `work` after one warm-up."""
        times = []
        for _ in range((1 if self.quick else repeats) + 1):
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return sorted(times[1:])[len(times[1:]) // 2]


@dataclass
class Budget:
    """The seconds that a section may take."""

    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @property
    def is_spent(self) -> bool:
        return self.left <= 0


@dataclass(frozen=True)
class Shape:
    """A Llama shape with tied embeddings."""

    vocabulary: int = 1024
    width: int = 64
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    intermediate: int = 128

    @property
    def body_parameters(self) -> int:
        """Parameters that every position goes through, without embedding and output layer."""
        kept = self.width * self.width * self.key_value_heads // self.heads
        return self.layers * (2 * self.width**2 + 2 * kept + 3 * self.width * self.intermediate)


TINY = Shape()
SMALL = Shape(vocabulary=16_000, width=256, layers=4, heads=8, key_value_heads=4, intermediate=704)
ONE_BILLION = Shape(128_256, 2048, 16, 32, 8, 8192)
"""The shape of Llama 3.2 1B."""


def llama(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    attention: str = "sdpa",
) -> Any:
    """A model with random weights, built on its device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    config._attn_implementation = attention
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def pair_columns(
    lengths: np.ndarray, vocabulary: int, *, chunks: bool = False
) -> dict[str, list[np.ndarray]]:
    """Columns of prepared pairs: random tokens, reference log-probs, weights, chunks. lengths [N, 3]"""
    rng = np.random.default_rng(0)
    columns: dict[str, list[np.ndarray]] = {}
    for at, name in enumerate(("prompt", "chosen", "rejected")):
        columns[f"{name}_ids"] = [rng.integers(0, vocabulary, n) for n in lengths[:, at]]
    for name in ("chosen", "rejected"):
        sizes = [len(ids) for ids in columns[f"{name}_ids"]]
        columns[f"{name}_ref_logps"] = [rng.normal(-3, 1, n).astype(np.float32) for n in sizes]
        columns[f"{name}_weights"] = [rng.uniform(0.5, 1.5, n).astype(np.float32) for n in sizes]
        if chunks:
            columns[f"{name}_chunks"] = [np.arange(n) // 16 for n in sizes]
    return columns


def collated(
    lengths: np.ndarray,
    vocabulary: int,
    device: torch.device,
    *,
    shared: bool = True,
    truncated: bool = False,
    sides: int = 2,
    chunks: bool = False,
) -> PairBatch:
    layout = BatchLayout(sides, 0, shared, truncated)
    return collate_columns(pair_columns(lengths, vocabulary, chunks=chunks), layout).to(device)


def preference_step(
    section: dict[str, Any], width: int, device: torch.device, reference: Any = None
) -> tuple[PreferenceStep, nn.Module | None]:
    """The step of an objective, and its learned baseline head, whose weights do not depend on the device."""
    objective = build_objective(section)
    head = None
    if objective.learned_baseline:
        torch.manual_seed(1)
        head = build_state_baseline(objective.state_baseline, width)
        assert head is not None
        for parameter in head.parameters():  # the last layers start at zero, which would hide the head
            nn.init.normal_(parameter, std=0.05)
        head.to(device)
    return PreferenceStep(objective, head, reference, seed=1), head


def training_parts(
    scorer: PairScorer, section: dict[str, Any], width: int, layout: BatchLayout, reference: Any = None
) -> TrainingComponents:
    step, head = preference_step(section, width, next(scorer.parameters()).device, reference)
    return TrainingComponents(scorer, step, head, layout)


def training_config(section: dict[str, Any], **training: Any) -> Config:
    """The configuration of a run with the settings that the single-process loop reads."""
    return Config.model_validate(
        {
            "model": {"name_or_path": "random weights"},
            "data": {"train": "random tokens"},
            "objective": section,
            "training": {"learning_rate": 1e-6, "scheduler": "constant", **training},
        }
    )


def micro_batches(
    steps: Sequence[Sequence[np.ndarray]], vocabulary: int, repeats: int = 1
) -> Iterator[MicroBatch]:
    """The stream of a single rank over the lengths of the micro-batches of each step."""
    prepared = [[(lengths, pair_columns(lengths, vocabulary)) for lengths in step] for step in steps]
    for number in range(repeats * len(steps)):
        step = prepared[number % len(steps)]
        pairs = sum(len(lengths) for lengths, _ in step)
        for index, (lengths, columns) in enumerate(step):
            found = dict(columns)
            prompt, chosen, rejected = (found.pop(f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
            ids = np.arange(len(lengths))
            yield MicroBatch(number, index, len(step), pairs, ids, prompt, chosen, rejected, found)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

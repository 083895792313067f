"""The peak memory of a training step, foretold by running it on tensors without memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.full_logits import FullLogitsScorer
from benchmarks.gpu_parts import Shape, collated, llama, preference_step
from tbpo_ray.training.memory_trace import StorageCounter
from tbpo_ray.training.scorer import PairScorer


def one_step(device: torch.device, shape: Shape, lengths: np.ndarray, variant: Any) -> None:
    """A forward and backward pass and the update of bf16 weights, everything built inside."""
    policy = llama(shape, device, torch.bfloat16)
    if variant.checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    scorer = (FullLogitsScorer if variant.full_logits else PairScorer)(policy).train()
    step, _ = preference_step(variant.section, shape.width, device)
    batch = collated(lengths, shape.vocabulary, device, shared=variant.shared, truncated=True)
    optimizer = torch.optim.RMSprop(scorer.parameters(), lr=1e-6, foreach=False)
    loss, _ = step(scorer, batch)
    loss.backward()
    optimizer.step()


def foretell(device: torch.device, shape: Shape, lengths: np.ndarray, variant: Any) -> float:
    """Peak bytes of `one_step`, without the memory and mostly without the time that it takes.

    Args:
        device: what the tensors without memory claim to be on: the CPU, as in the plan of a run, or a GPU,
            whose kernels and blocks need other amounts.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), StorageCounter() as counter:
        one_step(device, shape, lengths, variant)
    return float(counter.peak)

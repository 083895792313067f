"""Gradient norms and sums are the same in each layout: ZeRO stage, workers, precision, clipping."""

from __future__ import annotations

from itertools import product

import pytest

from tests.training.test_deepspeed_engine import in_group

pytestmark = pytest.mark.e2e

SMALL = 64
"""Micro-batches whose gradients a bf16 sum would lose: 1 + 2^-9 rounds to 1."""
LAYOUTS = list(product(("fp32", "bf16"), (0, 1, 2, 3), ("null", "0.5")))


def norms(rank, world):
    """In each layout, the gradient norms of two steps and the update of the second one."""
    import torch

    from tbpo_ray.config.loading import load_config
    from tbpo_ray.training.deepspeed_engine import Engine

    found = []
    for precision, stage, clip in LAYOUTS:
        settings = [
            f"training.deepspeed={{stage: {stage}}}",
            f"training.precision={precision}",
            f"training.max_grad_norm={clip}",
        ]
        layer = torch.nn.Linear(8, 8, bias=False)
        engine = Engine(layer, load_config(None, settings), torch.device("cpu"))
        row = torch.ones(1, 8, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        measured = []
        for _ in range(2):
            for index in range(1 + SMALL):
                # All of the large gradient is on rank 0, so that a bf16 mean of the ranks loses the rest.
                scale = 1.0 if index == 0 and rank == 0 else 2.0**-9
                engine.backward(engine(row).float().sum() * scale, last=index == SMALL)
            measured.append(engine.step(0.0))
        found.append(measured)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_the_gradient_norm_is_that_of_the_fp32_sum_before_clipping(tmp_path, world):
    entry = (1 + SMALL * 2.0**-9 + (world - 1) * (1 + SMALL) * 2.0**-9) / world
    for found in in_group(tmp_path, world, norms):
        for layout, measured in zip(LAYOUTS, found, strict=True):
            assert measured == pytest.approx([8 * entry] * 2, rel=1e-5), layout

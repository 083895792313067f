"""The check for non-finite gradients, and where ranks reduce."""

from __future__ import annotations

import pytest
import torch

from tbpo_ray.training.distributed import collective_device
from tbpo_ray.training.optim import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found_at_any_position(dtype: torch.dtype, size: int, bad: float) -> None:
    values = torch.randn(size).to(dtype) * (torch.finfo(dtype).max / 100)
    for place in {0, size // 2, size - 1}:
        broken = values.clone()
        broken[place] = bad
        assert all_finite(values) and not all_finite(broken)


def test_with_nccl_the_ranks_reduce_on_the_gpu_whatever_is_offloaded(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for backend, device in (("gloo", "cpu"), ("nccl", "cuda:1")):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda backend=backend: backend)
        assert collective_device() == torch.device(device)


def test_an_empty_tensor_is_finite() -> None:
    assert all_finite(torch.zeros(0))

"""The second device itself: what an accelerator refuses it refuses, and what waits for one it records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tbpo_ray.objectives import objective as objective_module
from tbpo_ray.objectives.types import masked_mean
from tbpo_ray.training.metrics_file import MetricSums
from tests.device.second_device import NAME, MixedDevicesError, SecondDevice
from tests.device.step_cases import batch, parts

WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "cpu, not blocking": lambda x: x.to("cpu", non_blocking=True),
    "copy to a host tensor": lambda x: torch.zeros(3).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.index_put_((x > 0,), torch.zeros((), device=x.device)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.long().abs()),
    "tensor from the host": lambda x: torch.tensor([1.0], device=x.device),
    "blocking copy from the host": lambda x: torch.ones(3).to(x.device),
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "copy that does not block": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "factory": lambda x: torch.full((3,), 2.0, device=x.device) + x.new_zeros(3),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "number on the host": lambda x: x * torch.tensor(2.0),
    "index": lambda x: x[torch.arange(2, device=x.device)],
    "clip": lambda x: torch.nn.utils.get_total_norm([x]),
}
MIXED: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: x + torch.ones(3),
    "stack": lambda x: torch.stack([x[0], torch.tensor(1.0)]),
    "cat": lambda x: torch.cat([x, torch.ones(3)]),
    "matmul": lambda x: x @ torch.ones(3),
    "index": lambda x: x.index_select(0, torch.tensor([0])),
    "number of the device into a host tensor": lambda x: torch.ones(3).add_(x[0]),
}


def values(device: SecondDevice) -> Tensor:
    return torch.tensor([3.0, -1.0, 2.0]).to(device.device)


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_recorded(device: SecondDevice, name: str) -> None:
    x = values(device)
    with device.recording() as syncs:
        WAITS[name](x)
    assert len(syncs) == 1
    assert "test_second_device.py" in syncs[0].where


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not(device: SecondDevice, name: str) -> None:
    x = values(device)
    with device.recording() as syncs:
        assert FREE[name](x).device.type == NAME
    assert not syncs


@pytest.mark.parametrize("name", MIXED)
def test_two_devices_in_one_operation_are_refused(device: SecondDevice, name: str) -> None:
    with pytest.raises(MixedDevicesError):
        MIXED[name](values(device))


def test_results_in_place_views_and_gradients_are_those_of_the_cpu(device: SecondDevice) -> None:
    x = torch.randn(4, 3).to(device.device)
    expected = x.cpu().clone()
    x.view(-1)[2:5].mul_(2).add_(1)
    expected.view(-1)[2:5].mul_(2).add_(1)
    assert torch.equal(x.cpu(), expected)
    layer = torch.nn.Linear(3, 2)
    (layer(expected).square().sum()).backward()
    wanted = layer.weight.grad
    layer.zero_grad(set_to_none=True)
    device.move(layer)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None and wanted is not None
    assert torch.equal(layer.weight.grad.cpu(), wanted)


def test_tied_parameters_stay_tied(device: SecondDevice) -> None:
    scorer = parts({"name": "dpo"}, move=device.move).scorer
    model: Any = scorer.model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_other_tests_of_the_process_see_no_accelerator(device: SecondDevice) -> None:
    assert not torch.accelerator.is_available()


# Three faults of the kind that a reader overlooks; each was in the code, or nearly.


def test_a_planted_stack_of_host_and_device_scalars_is_found(
    device: SecondDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tbpo_ray.training.readback import Readback

    def packed(self: MetricSums, readback: Readback) -> None:
        assert self._sums is not None
        readback.add("metrics", torch.stack([*self._sums.double(), torch.tensor(float(self.pairs)).double()]))

    monkeypatch.setattr(MetricSums, "offer", packed)
    found, sums = parts({"name": "dpo"}, move=device.move), MetricSums()
    pairs = batch().to(device.device)
    sums.add(*found.step(found.scorer, pairs), pairs.pairs)
    with pytest.raises(MixedDevicesError, match="stack"):
        sums.offer(Readback(device.device))


def test_a_planted_sum_over_two_devices_is_found(
    device: SecondDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(tensor: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(tensor, mask) + torch.zeros(tensor.shape[0])

    monkeypatch.setattr(objective_module, "masked_mean", planted)
    found = parts({"name": "tbpo_a", "state_baseline": {"kind": "k3"}}, move=device.move)
    with pytest.raises(MixedDevicesError, match="add"):
        found.step(found.scorer, batch().to(device.device))


def test_a_planted_item_in_the_step_is_found(device: SecondDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    mean = objective_module.mean

    def planted(per_pair: Tensor, *counted: Any) -> Tensor:
        return mean(per_pair, *counted) if per_pair.sum().item() < float("inf") else per_pair.sum()

    monkeypatch.setattr(objective_module, "mean", planted)
    found = parts({"name": "dpo"}, move=device.move)
    pairs = batch().to(device.device)
    with device.recording() as syncs:
        found.step(found.scorer, pairs)
    assert [sync.what for sync in syncs] == ["reading a value (aten._local_scalar_dense.default)"]
    assert "planted" in syncs[0].where

"""The parts of the training loop around the step, on a second device: one reading per optimizer step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tbpo_ray.config.schema import Config
from tbpo_ray.data.reader import MicroBatch
from tbpo_ray.training.batch import BatchLayout
from tbpo_ray.training.components import TrainingComponents
from tbpo_ray.training.host_copy import HostCopy
from tbpo_ray.training.optim import HeadOptimizer, NonFiniteGradientError, build_optimizer
from tbpo_ray.training.readback import Readback
from tbpo_ray.training.saver import Cadence
from tbpo_ray.training.single_process import train_local
from tbpo_ray.training.state import fill_module, fragment_tensors, load_fragments
from tests.device.second_device import NAME, SecondDevice
from tests.device.step_cases import VOCAB, batch, parts

LEARNED = {"name": "tbpo_q", "state_baseline": {"hidden": 16}}
ONE_READING = ["copying to the host"]


def config(section: dict[str, Any], **training: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"name_or_path": "none"},
            "data": {"train": "none"},
            "objective": section,
            "training": {"learning_rate": 1e-5, "scheduler": "constant", **training},
        }
    )


def stream(steps: int) -> list[MicroBatch]:
    """Two micro-batches a step."""
    rng = np.random.default_rng(0)
    found = []
    for step in range(steps):
        for index in range(2):
            columns = [[rng.integers(0, VOCAB, rng.integers(2, 9)) for _ in range(3)] for _ in range(3)]
            extras = {
                f"{side}_ref_logps": [rng.normal(-3, 1, len(ids)).astype(np.float32) for ids in columns[at]]
                for at, side in ((1, "chosen"), (2, "rejected"))
            }
            prompt, chosen, rejected = columns
            ids = np.arange(3)
            found.append(MicroBatch(step, index, 2, 6, ids, prompt, chosen, rejected, extras))
    return found


def trained(
    section: dict[str, Any], steps: int, device: SecondDevice | None, **training: Any
) -> tuple[list[dict[str, float]], list[list[str]], Any]:
    """Rows of metrics, the synchronizations of each step, and the parts."""
    found = parts(section, move=device.move if device is not None else lambda module: module)
    components = TrainingComponents(found.scorer, found.step, found.head, BatchLayout(2, 0, True, True))
    rows: list[dict[str, float]] = []
    waits: list[list[str]] = []
    settings = config(section, **training)
    if device is None:
        train_local(settings, components, stream(steps), steps, lambda step, row: rows.append(row))
        return rows, waits, found
    with device.recording() as syncs:

        def on_step(step: int, row: dict[str, float]) -> None:
            rows.append(row)
            waits.append([sync.what for sync in syncs])
            syncs.clear()

        train_local(settings, components, stream(steps), steps, on_step)
    return rows, waits, found


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
@pytest.mark.parametrize("section", [LEARNED, {"name": "dpo"}])
def test_a_step_reads_from_the_device_once(
    device: SecondDevice, section: dict[str, Any], optimizer: str
) -> None:
    rows, waits, found = trained(section, 3, device, optimizer=optimizer)
    assert waits == [ONE_READING] * 3
    expected, _, here = trained(section, 3, None, optimizer=optimizer)
    assert rows == [pytest.approx(row, rel=1e-3, abs=1e-4) for row in expected]
    start = parts(section)
    for a, b, c in zip(found.modules(), here.modules(), start.modules(), strict=True):
        before = weights(c)
        assert not torch.equal(weights(b), before)
        assert agrees(weights(a) - before, weights(b) - before)


def weights(module: torch.nn.Module) -> torch.Tensor:
    """All weights of a module on the host, flat."""
    return torch.cat([p.detach().cpu().reshape(-1) for p in module.parameters()])


def agrees(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Close on the whole: where a gradient is nearly 0, rounding decides the sign of an update."""
    return bool((found - expected).norm() <= 0.02 * expected.norm() + 1e-7)


def test_a_step_that_is_not_finite_is_refused_on_any_device(device: SecondDevice) -> None:
    for at in (None, device):
        found = parts({"name": "dpo"}, move=at.move if at is not None else lambda module: module)
        optimizer: Any = build_optimizer(found.scorer.parameters(), config({"name": "dpo"}).training)
        place = at.device if at is not None else torch.device("cpu")
        loss, _ = found.step(found.scorer, batch().to(place))
        loss.backward()
        readback = Readback(place)
        readback.add("loss", loss * float("inf"), guarded=True)
        optimizer.readback = readback
        before = [p.detach().cpu().clone() for p in found.scorer.parameters()]
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()
        assert all(torch.equal(a, b.cpu()) for a, b in zip(before, found.scorer.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_is_found_among_others(device: SecondDevice) -> None:
    weights = [torch.nn.Parameter(torch.ones(3).to(device.device)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.ones(3).to(device.device)
    optimizer: Any = build_optimizer(weights, config({"name": "dpo"}, on_nonfinite="skip").training)
    optimizer.step()
    weights[1].grad = torch.tensor([1.0, float("nan"), 1.0]).to(device.device)
    moved = weights[0].detach().cpu().clone()
    with device.recording() as syncs:
        optimizer.step()
    assert [sync.what for sync in syncs] == ONE_READING
    assert optimizer.skipped == 1 and torch.equal(weights[0].detach().cpu(), moved)
    assert float(moved[0]) != 1.0


def test_evaluation_reads_once(device: SecondDevice) -> None:
    from tbpo_ray.training.metrics_file import MetricSums

    found, sums = parts({"name": "dpo"}, move=device.move), MetricSums()
    with torch.no_grad(), device.recording() as syncs:
        for _ in range(3):
            pairs = batch().to(device.device)
            sums.add(*found.step(found.scorer, pairs), pairs.pairs)
        row = sums.reduce(device.device)
    assert [sync.what for sync in syncs] == ONE_READING
    assert row["loss"] > 0 and "rewards/accuracy" in row


def test_flags_of_rank_0_travel_with_the_reading(device: SecondDevice) -> None:
    now = [0.0]
    cadence = Cadence(5.0, rank=0, clock=lambda: now[0])
    for passed, due in ((1.0, False), (5.0, True), (6.0, False), (11.0, True)):
        now[0] = passed
        readback = Readback(device.device)
        with device.recording() as syncs:
            cadence.offer(readback)
            assert cadence.due(readback) is due
        assert [sync.what for sync in syncs] == ONE_READING


def engine(scorer: Any, optimizer: Any) -> Any:
    """What a checkpoint reads of an engine without ZeRO."""
    names = {id(p): n for n, p in scorer.named_parameters()}
    return SimpleNamespace(
        module=scorer, client_optimizer=optimizer, optimizer=optimizer, names=names, stage=0
    )


def host_copy(
    tensors: dict[str, torch.Tensor], device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Copies in host memory of their own, as a checkpoint takes them."""
    copies = HostCopy(torch.device(device)).take({"file": tensors})["file"]
    return {name: value.clone() for name, value in copies.items()}


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_checkpoints_travel_between_devices(device: SecondDevice, tmp_path: Path, optimizer: str) -> None:
    """Copies are on the host, and continue on either device with the same weights and optimizer state."""
    settings = config({"name": "dpo"}, optimizer=optimizer).training

    def stepped(at: SecondDevice | None, file: Path | None = None) -> Any:
        found = parts({"name": "dpo"}, move=at.move if at is not None else lambda module: module)
        made = engine(found.scorer, build_optimizer(found.scorer.parameters(), settings))
        if file is not None:
            load_fragments(made, [file])
        loss, _ = found.step(found.scorer, batch().to(at.device if at is not None else "cpu"))
        loss.backward()
        made.client_optimizer.step()
        return made

    first = host_copy(fragment_tensors(stepped(device)), device.device)
    assert first and all(type(value) is torch.Tensor for value in first.values())
    assert {value.device.type for value in first.values()} == {"cpu"}
    file = tmp_path / "optimizer-0000.safetensors"
    save_file(first, file)
    here, there = (host_copy(fragment_tensors(stepped(at, file))) for at in (None, device))
    assert here.keys() == there.keys() and len(here) == len(first)
    assert all(agrees(there[name], value) for name, value in here.items())
    assert any(not torch.equal(here[name], value) for name, value in first.items())
    target = parts({"name": "dpo"}, move=device.move).scorer
    fill_module(target, [file])
    weight = next(target.parameters())
    assert weight.device.type == NAME
    assert torch.equal(weight.detach().cpu().view(-1), next(v for k, v in first.items() if "master" in k))


def test_a_copy_of_a_checkpoint_does_not_change_with_the_weights(device: SecondDevice) -> None:
    found = parts({"name": "dpo"}, move=device.move)
    made = engine(found.scorer, build_optimizer(found.scorer.parameters(), config({"name": "dpo"}).training))
    loss, _ = found.step(found.scorer, batch().to(device.device))
    loss.backward()
    made.client_optimizer.step()
    live, copy = {"file": fragment_tensors(made)}, HostCopy(device.device)
    assert {value.device.type for value in live["file"].values()} <= {NAME, "cpu"}
    with device.recording() as syncs:
        copies = copy.take(live)["file"]
        copy.hold_updates()
    # Nothing but the copies, one for each tensor of the device, in one place.
    on_device = [name for name, value in live["file"].items() if value.device.type == NAME]
    assert [sync.what for sync in syncs] == ONE_READING * len(on_device) and on_device
    assert {sync.where.split(":")[0] for sync in syncs} == {"tbpo_ray/training/host_copy.py"}
    copy.wait()
    kept = {name: value.clone() for name, value in copies.items()}
    with torch.no_grad():
        for parameter in found.scorer.parameters():
            parameter.add_(1)
    made.client_optimizer.step()
    assert all(torch.equal(copies[name], value) for name, value in kept.items())
    memory = next(iter(copies.values())).untyped_storage().data_ptr()
    again = copy.take({"file": fragment_tensors(made)})["file"]
    assert {value.untyped_storage().data_ptr() for value in again.values()} == {memory}
    assert any(not torch.equal(again[name], value) for name, value in kept.items())
    for name, value in fragment_tensors(made).items():
        assert torch.equal(again[name], value.cpu()), name


def test_the_head_and_its_optimizer_are_saved_and_loaded(device: SecondDevice, tmp_path: Path) -> None:
    found = parts(LEARNED, move=device.move)
    assert found.head is not None
    optimizer = HeadOptimizer(found.head, 1e-2)
    loss, _ = found.step(found.scorer, batch(truncate=True).to(device.device))
    loss.backward()
    readback = Readback(device.device)
    optimizer.offer(readback)
    with device.recording() as syncs:
        optimizer.step(readback)
    assert [sync.what for sync in syncs] == ONE_READING
    live = optimizer.state_dict()
    assert {value.device.type for value in live.values()} <= {NAME, "cpu"}
    saved = host_copy(live, device.device)
    assert {value.device.type for value in saved.values()} == {"cpu"}
    save_file(saved, tmp_path / "head.safetensors")
    other = parts(LEARNED, move=device.move)
    assert other.head is not None
    again = HeadOptimizer(other.head, 1e-2)
    again.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert {p.device.type for p in other.head.parameters()} == {NAME}
    for name, value in again.state_dict().items():
        assert torch.equal(value.cpu(), saved[name]), name
    # The loaded state is usable: it updates the weights on their device.
    loss, _ = other.step(other.scorer, batch(truncate=True).to(device.device))
    loss.backward()
    readback = Readback(device.device)
    again.offer(readback)
    again.step(readback)
    assert not torch.equal(again.state_dict()["head.head.0.weight"].cpu(), saved["head.head.0.weight"])


def test_reference_scores_and_the_self_check(device: SecondDevice) -> None:
    from tbpo_ray.training.self_check import CheckPairs, check_scoring

    rng = np.random.default_rng(0)
    sizes = {"prompt_ids": 6, "chosen_ids": 5, "rejected_ids": 7}
    columns = {name: [rng.integers(0, VOCAB, size + k) for k in range(3)] for name, size in sizes.items()}
    layout = BatchLayout(2, 0, True, False)
    model = parts({"name": "dpo"}, move=device.move).scorer.model
    _, choice = check_scoring(model, CheckPairs(columns, columns), layout, key="model.name_or_path=none")
    assert (choice.attention, choice.shared_prompt, choice.sentences) == ("sdpa", True, ())

    here = parts({"name": "dpo"}).scorer.eval()
    there = parts({"name": "dpo"}, move=device.move).scorer.eval()
    with device.recording() as syncs:
        found = there.reference_logps(batch().to(device.device))
    assert not syncs
    torch.testing.assert_close(found.cpu(), here.reference_logps(batch()), rtol=1e-4, atol=1e-5)

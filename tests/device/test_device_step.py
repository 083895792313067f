"""The training step on a second device: the values of the CPU, and not one wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tbpo_ray.config.objective import BASELINE_KINDS, GENERATORS, OBJECTIVES
from tbpo_ray.objectives import build_objective
from tbpo_ray.training import pair_attention
from tests.device.second_device import NAME, SecondDevice
from tests.device.step_cases import Parts, batch, gemma, llama, parts

SECTIONS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in OBJECTIVES},
    **{
        f"tbpo_a {kind}": {"name": "tbpo_a", "state_baseline": {"kind": kind, "hidden": 16}}
        for kind in BASELINE_KINDS
    },
    **{f"bpo {name}": {"name": "bpo", "bregman": {"generator": name}} for name in GENERATORS},
    **{f"dpo {ties}": {"name": "dpo", "ties": ties} for ties in ("rao_kupper", "davidson", "drop")},
    "dpo token_mean": {"name": "dpo", "normalization": "token_mean"},
    "tis_dpo with the policy's KL": {"name": "tis_dpo", "alpha": 0.5},
    "arc_bpo advantage": {"name": "arc_bpo", "arc": {"shape": "advantage"}},
    "dpo with the NLL": {"name": "dpo", "nll_weight": 0.2},
    "dpo wpo": {"name": "dpo", "pair_weights": "wpo"},
    "tdpo2 wpo": {"name": "tdpo2", "pair_weights": "wpo"},
    "tbpo_a wpo": {"name": "tbpo_a", "pair_weights": "wpo", "wpo_alignment": "none"},
    "dpo with margins": {"name": "dpo", "pair_margins": "data"},
    "dpo with weights": {"name": "dpo", "pair_weights": "data"},
    # With e^-S as large as it is at random, a small beta keeps the gradients within the tolerances.
    "dpo forward_kl": {"name": "dpo", "beta": 1e-4, "f_divergence": {"kind": "forward_kl"}},
    "dpo js": {"name": "dpo", "f_divergence": {"kind": "js"}},
    "dpo alpha": {"name": "dpo", "f_divergence": {"kind": "alpha"}},
    "dpo with a lighter tail": {"name": "dpo", "ld_alpha": 0.3},
    "dpo without a tail": {"name": "dpo", "ld_alpha": 0},
    "tbpo_a centered and clipped": {"name": "tbpo_a", "state_baseline": {"center": True, "clip": 0.5}},
    "tbpo_q with smoothed labels": {"name": "tbpo_q", "label_smoothing": 0.1},
}


def run(found: Parts, pairs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, metrics = found.step(found.scorer, pairs, 5)
    (loss / pairs.pairs).backward()
    return loss, metrics


def agree(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def compare(device: SecondDevice, section: dict[str, Any], pairs: Any, **options: Any) -> None:
    """Both devices give the same loss, metrics and gradients, and the second one is never waited for."""
    here = parts(section, **options)
    loss, metrics = run(here, pairs)
    there = parts(section, **options, move=device.move)
    moved = pairs.to(device.device)
    with device.recording() as syncs:
        device_loss, device_metrics = run(there, moved)
    assert [str(sync) for sync in syncs] == []
    assert device_loss.device.type == NAME
    assert {value.device.type for value in device_metrics.values()} == {NAME}
    agree(device_loss.cpu(), loss.detach())
    agree({name: value.cpu() for name, value in device_metrics.items()}, metrics)
    expected = here.gradients()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    agree(there.gradients(), expected)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_objective(device: SecondDevice, name: str) -> None:
    section = SECTIONS[name]
    objective = build_objective(section)
    sides = 2 if objective.needs_rejected else 1
    needs_model = objective.needs_kl or objective.needs_reverse_kl or objective.needs_samples > 0
    pairs = batch(sides=sides, truncate=objective.compares_to_shorter, ties="ties" in section)
    compare(device, section, pairs, reference="live" if needs_model else "cached")


@pytest.mark.parametrize("reference", ["cached", "live", "adapter_off"])
@pytest.mark.parametrize("shared", [True, False])
def test_every_reference_and_layout(device: SecondDevice, reference: str, shared: bool) -> None:
    compare(device, {"name": "dpo"}, batch(shared=shared), reference=reference)


@pytest.mark.parametrize("rows", ["separate", "shared", "packed"])
@pytest.mark.parametrize("model", [gemma, llama])
@pytest.mark.parametrize("gathered", [True, False])
def test_windows_masks_and_gathered_rows(
    device: SecondDevice, monkeypatch: pytest.MonkeyPatch, model: Any, rows: str, gathered: bool
) -> None:
    monkeypatch.setattr(pair_attention, "gather_cost", lambda _: 0 if gathered else 10**9)
    pairs = batch(shared=rows != "separate", packed=rows == "packed")
    compare(device, {"name": "tbpo_a", "state_baseline": {"kind": "k3"}}, pairs, model=model)


def test_eager_attention_in_shared_rows(device: SecondDevice) -> None:
    compare(device, {"name": "dpo"}, batch(), model=lambda: llama("eager"))


def test_activation_checkpointing(device: SecondDevice) -> None:
    def model() -> Any:
        policy = llama()
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        return policy

    compare(device, {"name": "dpo"}, batch(), model=model)


def test_a_step_without_pairs(device: SecondDevice) -> None:
    from tbpo_ray.training.batch import collate

    empty: Any = torch.zeros(0, dtype=torch.int64).numpy()
    pairs = collate([torch.zeros(1).long().numpy()], [[empty], [empty]], pad_id=0, shared=True,
                    truncate_to_shorter=True, ref_logps=[[empty], [empty]])  # fmt: skip
    found = parts({"name": "dpo"}, move=device.move)
    with device.recording() as syncs:
        loss, _ = run(found, pairs.to(device.device))
    assert not syncs
    assert float(loss) == 0.0

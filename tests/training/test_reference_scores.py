"""Cached reference scores serve only what they were computed for."""

from __future__ import annotations

from typing import Any

import pytest

from tbpo_ray.config.loading import digest, load_config
from tbpo_ray.models.tiny import build_tiny
from tbpo_ray.training import reference_scores
from tbpo_ray.training.reference_scores import describe_machine, scoring_machine
from tbpo_ray.training.run_plan import resolve_run


class Prepared:
    fingerprint = "0123"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(build_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def identity(model: str, *overrides: str, **machine: str) -> str:
    prepared: Any = Prepared()
    plan = resolve_run(load_config(None, overrides))
    here = describe_machine(gpu=False) | machine
    return digest(reference_scores._identity(plan, prepared, model, None, here))


def test_scores_of_one_kind_of_machine_or_kernel_never_serve_another(model):
    others = [
        identity(model),
        identity(model, device="cuda"),
        identity(model, device="cuda", kernel="NVIDIA H100 80GB HBM3 sm_90"),
        identity(model, kernel="x86_64 AVX2"),
        identity(model, torch="2.0"),
        identity(model, "model.attention=eager"),
        identity(model, "training.precision=fp32"),
        identity(model, "training.shared_prompt=false"),
    ]
    assert len(set(others)) == len(others)
    assert identity(model, "training.learning_rate=0.1") == others[0]


def test_the_attention_in_effect_counts_and_not_the_requested_one(model, monkeypatch):
    from tbpo_ray.models.attention import AttentionChoice

    eager = identity(model, "model.attention=eager")
    monkeypatch.setattr(reference_scores, "choose_attention", lambda *_: AttentionChoice("eager", "reason"))
    assert identity(model, "model.attention=sdpa") == eager


def test_a_private_cluster_without_gpus_scores_on_this_machine(monkeypatch):
    import torch

    monkeypatch.setattr(reference_scores, "is_private", lambda: True)
    found = scoring_machine(load_config(None, ["cluster.use_gpu=false"]))
    assert found["device"] == "cpu" and found["torch"] == torch.__version__
    assert torch.backends.cpu.get_cpu_capability() in found["kernel"]

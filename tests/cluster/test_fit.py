"""What the configuration leaves to the cluster to decide, and plans that never fit."""

from __future__ import annotations

import pytest

from tbpo_ray.cluster import fit
from tbpo_ray.cluster.capacity import Capacity, NodeKind
from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError


@pytest.fixture
def machine(monkeypatch):
    """A cluster with the given resources, without starting Ray."""

    def have(**resources: float) -> None:
        size = Capacity([NodeKind("machine", resources)])
        monkeypatch.setattr(fit, "capacities", lambda config: [size])

    return have


@pytest.mark.parametrize(
    ("resources", "gpus", "workers"), [({"CPU": 2}, False, 2), ({"CPU": 96, "GPU": 8}, True, 8)]
)
def test_auto_uses_the_available_resources(machine, resources, gpus, workers):
    machine(**resources)
    config = fit.fit_to_cluster(load_config(None, ["cluster.num_workers=[1, 8]"]))
    assert (config.cluster.use_gpu, config.cluster.max_workers) == (gpus, workers)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["cluster.num_workers=3"], ["3 x (1 CPU)", "2 CPU", "at most 2"]),
        (["cluster.use_gpu=true"], ["1 GPU", "0 GPU", "at most 0"]),
        (["cluster.num_workers=[4, 8]"], ["4 x (1 CPU)", "at most 2"]),
    ],
)
def test_a_plan_that_never_fits_is_refused_with_the_calculation(machine, override, words):
    machine(CPU=2.0)
    with pytest.raises(InputError) as caught:
        fit.fit_to_cluster(load_config(None, override))
    assert all(word in caught.value.faults[0] for word in words), caught.value.faults


def test_a_plan_that_fits_is_not_changed(machine):
    machine(CPU=2.0)
    settings = ["cluster.use_gpu=false", "cluster.num_workers=4", "cluster.resources_per_worker={CPU: 0.5}"]
    assert fit.fit_to_cluster(load_config(None, settings)) == load_config(None, settings)

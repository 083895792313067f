"""The memory of a worker's GPU is found out only where something depends on it."""

from __future__ import annotations

import pytest

from tbpo_ray.cluster.device import GIB, detect_device_memory
from tbpo_ray.config.loading import load_config

GPU = ("cluster.use_gpu=true",)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (GPU, 80.0),
        ((*GPU, "cluster.resources_per_worker={CPU: 1, GPU: 0.5}"), 40.0),
        ((*GPU, "cluster.device_memory_gib=24"), 24.0),
        ((*GPU, "training.deepspeed.stage=2", "training.activation_checkpointing=false"), None),
        ((*GPU, "training.deepspeed.stage=2", "training.activation_checkpointing=auto"), 80.0),
        (("cluster.use_gpu=false",), None),
    ],
    ids=["open", "shared", "set", "nothing open", "one open", "cpu"],
)
def test_the_memory_of_a_gpu_is_that_of_a_running_one(overrides, expected):
    config = load_config(None, list(overrides))
    assert detect_device_memory(config, lambda _: 80 * GIB).cluster.device_memory_gib == expected


def test_without_a_running_gpu_the_memory_stays_unknown():
    config = load_config(None, list(GPU))
    assert detect_device_memory(config, lambda _: None) is config

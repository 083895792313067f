"""How many engines `generation.engines` starts, on clusters that do not exist."""

from __future__ import annotations

from typing import Any

import pytest

from tbpo_ray.cluster.capacity import Capacity, NodeKind
from tbpo_ray.config.schema import GenerationConfig
from tbpo_ray.generation import engine_count as module
from tbpo_ray.generation.engine_count import EngineCount, EngineNodes, engine_count

POOL = {"pool": "generate"}
GPUS = Capacity(
    [
        NodeKind("train", {"CPU": 96.0, "GPU": 8.0}, 2, {"pool": "train"}),
        NodeKind("generate", {"CPU": 48.0, "GPU": 4.0}, 3, POOL),
    ]
)


@pytest.fixture
def free(monkeypatch):
    def have(size: Capacity) -> None:
        monkeypatch.setattr(module, "available", lambda: size)

    return have


@pytest.mark.parametrize(
    ("settings", "batches", "expected"),
    [
        ({}, 100, (4, 12)),  # three nodes of four GPUs, one of them up
        ({}, 6, (4, 6)),
        ({}, 1, (1, 1)),
        ({"tensor_parallel": 2}, 100, (2, 6)),
        ({"tensor_parallel": 2, "engine": {"pipeline_parallel_size": 2}}, 100, (1, 3)),
        ({"tensor_parallel": 8}, 100, (1, 1)),  # refused elsewhere, with the calculation
        ({"engines": 3}, 1, (3, 3)),
        ({"engines": [1, 4]}, 1, (1, 4)),
    ],
    ids=["gpus", "batches", "one-batch", "tensor", "pipeline", "never", "number", "range"],
)
def test_engines_on_gpus(free, settings: dict[str, Any], batches, expected):
    free(Capacity([NodeKind("generate", {"CPU": 48.0, "GPU": 4.0}, 1, POOL)]))
    nodes = EngineNodes(True, POOL, [Capacity([]), GPUS])
    count = engine_count(GenerationConfig(**settings), batches, nodes)
    assert (count.smallest, count.largest) == expected


def test_gpus_that_training_holds_are_not_free(free):
    free(Capacity([NodeKind("all", {"CPU": 48.0, "GPU": 1.0})]))
    nodes = EngineNodes(True, {}, [Capacity([NodeKind("all", {"CPU": 48.0, "GPU": 4.0})])])
    assert engine_count(GenerationConfig(), 9, nodes) == EngineCount(1, 4, 1)
    free(Capacity([NodeKind("all", {"CPU": 48.0})]))
    assert engine_count(GenerationConfig(), 9, nodes).smallest == 1


def test_without_gpus_there_is_one_engine_per_node(free):
    two = Capacity([NodeKind("a", {"CPU": 8.0}, 2), NodeKind("head", {"memory": 1.0})], 3)
    free(two)
    assert engine_count(GenerationConfig(), 9, EngineNodes(sizes=[two])) == EngineCount(2, 2, 1)
    assert engine_count(GenerationConfig(), 9, EngineNodes(labels=POOL, sizes=[two])).largest == 1
    assert str(EngineCount(1, 1, 1)) == "1 engine(s)" and str(EngineCount(1, 3, 1)) == "1 to 3 engines"


def test_explicit_engines_share_a_nodes_cores():
    assert engine_count(GenerationConfig(engines=[1, 4]), 9, EngineNodes()).per_node == 4

"""What all tests share: one Ray session, and whether the real preference data is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data" / "hh_rlhf_harmless_test.jsonl.gz"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of the real data where it is not beside the checkout."""
    if not REAL_DATA.is_file():
        absent = [item for item in items if item.get_closest_marker("shared")]
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private Ray cluster for the whole session; it disturbs no other one on the machine."""
    import ray

    from tbpo_ray.cluster import start_ray

    os.environ.pop("RAY_ADDRESS", None)
    start_ray(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of `builtin:tiny`, built once."""
    from tbpo_ray.models.tiny import build_tiny

    return str(build_tiny(tmp_path_factory.mktemp("models") / "tiny", seed=0))


@pytest.fixture(scope="session")
def real_data() -> Path:
    return REAL_DATA

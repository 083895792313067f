"""What all tests share: one Ray session, and whether the real preference data is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data" / "hh_rlhf_harmless_test.jsonl.gz"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of the real data where it is not beside the checkout; the second device comes first.

    Autograd starts a thread for each device that it finds at the first backward pass of a process, so one
    that appears later has none.
    """
    items.sort(key=lambda item: not item.path.is_relative_to(ROOT / "tests" / "device"))
    if not REAL_DATA.is_file():
        absent = [item for item in items if item.get_closest_marker("shared")]
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private Ray cluster for the whole session; it disturbs no other one on the machine."""
    import ray

    from tbpo_ray.cluster.session import start_ray

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


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> str:
    """A model of 0.1 M parameters with the tokenizer of `builtin:tiny`, for tests that train."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

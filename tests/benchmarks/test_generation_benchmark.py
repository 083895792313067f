"""The benchmark of sampling runs, and its figures make sense."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import generation
from benchmarks.generation import BEST, ONE, POOL
from benchmarks.pairs import MODEL
from benchmarks.sampling_loop import batches, pad_left
from tbpo_ray.config.schema import Config

MACHINE = {"processor": "p", "cores": 2, "load": 0.0, "versions": {}}


def test_batches_hold_prompts_of_similar_length() -> None:
    lengths = [5, 1, 4, 2, 3, 6]
    assert batches(lengths, 2, None) == [[1, 3], [4, 2], [0, 5]]
    assert batches(lengths, 4, 2) == [[1, 3, 4, 2], [0, 5]]
    assert batches(lengths, 1, 3) == [[3], [2], [5]]


def test_padding_is_on_the_left() -> None:
    ids, mask = pad_left([[7, 8, 9], [5]], 2)
    assert torch.equal(ids, torch.tensor([[7, 8, 9], [2, 2, 5]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 1], [0, 0, 1]]))


def test_only_batches_that_fit_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 x 8 layers x 384 x 4 bytes x 1000 tokens: 25 MB each, and a layer more while one is appended to.
    monkeypatch.setattr(
        generation.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2 * 1_000_000_000})
    )
    assert generation.fitting((8, 32, 128), MODEL, 1000) == [8, 32]
    assert generation.fitting((64, 128), MODEL, 1000) == [64]


def test_ratios_count_sampling_and_the_whole_process() -> None:
    def row(seconds: float, tokens: int, **more: float) -> dict[str, float]:
        return {
            "seconds": seconds,
            "cpu_seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            **more,
        }

    variants = {
        POOL: [row(10, 1000, process_seconds=30, start_seconds=15, manifest_tokens_per_second=40)],
        ONE: [row(10, 50, process_seconds=15, prompts=5)],
        BEST: [row(25, 1000, process_seconds=30, prompts=100)],
    }
    ratios = generation.ratios(variants, 100)
    assert ratios[ONE]["speed"]["ratio"] == 20 and ratios[BEST]["speed"]["ratio"] == 2.5
    assert ratios[ONE]["whole"]["ratio"] == (5 + 200) / 30 and ratios[BEST]["whole"]["ratio"] == 1
    text = generation.markdown(
        {
            "machine": MACHINE,
            "prompts": 100,
            "prompt_tokens": 112.0,
            "answer": 10,
            "parameters": 26_000_000,
            "batches": {8: 30.0, 32: 40.0},
            "best": 32,
            "variants": variants,
            "ratios": ratios,
        }
    )
    assert "20.00 [20.00, 20.00] | at least 10: reached" in text
    assert "its best batch (32)" in text and "2.50 [2.50, 2.50] | at least 3: missed" in text
    assert "8: 30, 32: 40" in text and "the 15.0 s" in text


@pytest.mark.e2e
@pytest.mark.slow
def test_quick_generation_run() -> None:
    result = json.loads(json.dumps(generation.run(Config(), quick=True)))
    (ours,), (one,) = result["variants"][POOL], result["variants"][ONE]
    # The tiny model ends an answer early once in two thousand tokens.
    assert 0.8 < ours["tokens"] / (result["prompts"] * result["answer"]) <= 1
    assert one["tokens"] == one["prompts"] * result["answer"]
    assert 0 < ours["seconds"] < ours["manifest_seconds"] < ours["process_seconds"]
    # No word of CPU seconds: two starts of an engine differ by more than so few tokens cost.
    assert result["ratios"][BEST]["speed"]["ratio"] > 0
    assert f"({result['best']})" in generation.markdown(result)

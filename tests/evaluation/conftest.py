"""Samples that no engine generated, for tests of what follows sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tbpo_ray.generation.samples import Sample


@pytest.fixture
def make_sample():
    def make(prompt: int, answer: str, number: int = 0, **overrides) -> Sample:
        tokens = [7 + ord(letter) % 50 for letter in answer]
        sample = Sample(
            prompt_id=f"{prompt:06d}",
            sample=number,
            prompt_text=f"copy: {answer}",
            prompt_token_ids=[1, 3, 4],
            answer=answer,
            token_ids=tokens,
            logprobs=[-0.5] * len(tokens),
            finish_reason="stop",
            metadata={"answer": answer},
            error="",
        )
        return replace(sample, **overrides)

    return make

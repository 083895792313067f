"""What scores and gradients have to be in every layout of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tbpo_ray.training import pair_attention
from tbpo_ray.training.batch import PairBatch, collate
from tbpo_ray.training.scorer import PairScorer
from tests.device.step_cases import VOCAB, gemma, llama


def mistral() -> MistralForCausalLM:
    """A model with the same window in all layers, which its configuration does not list."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=5,
    )  # fmt: skip
    return MistralForCausalLM(config)


MODELS = {"llama": llama, "eager": lambda: llama("eager"), "gemma3": gemma, "mistral": mistral}


def pairs(count: int = 5, seed: int = 0):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCAB, rng.integers(1, 12)) for _ in range(count)]
    answers = [[rng.integers(3, VOCAB, rng.integers(1, 10)) for _ in range(count)] for _ in range(2)]
    return prompts, answers


def plain_logps(model, prompt, answer) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
    logits = model(input_ids=ids).logits[0].log_softmax(-1)
    return torch.stack([logits[len(prompt) - 1 + t, token] for t, token in enumerate(answer)])


@pytest.fixture(params=["gathered", "masked"])
def attention(request, monkeypatch):
    """Shared rows with gathered attention, as for long rows, and with a mask, as for short ones."""
    monkeypatch.setattr(pair_attention, "gather_cost", lambda _: -1e9 if request.param == "gathered" else 1e9)


def check_plain_scores(model: Any, *, shared: bool, packed: bool = False, sides: int = 2) -> PairBatch:
    """Compare the scores of a batch with those of the plain formula, answer by answer."""
    prompts, answers = pairs()
    batch = collate(
        prompts, answers[:sides], pad_id=0, shared=shared, packed=packed, truncate_to_shorter=False
    )
    logp = PairScorer(model)(batch)[0]
    for side in range(sides):
        for b, prompt in enumerate(prompts):
            expected = plain_logps(model, prompt, answers[side][b])
            torch.testing.assert_close(logp[side, b, : len(expected)], expected, atol=2e-5, rtol=1e-5)
            assert not logp[side, b, len(expected) :].any()
    return batch


def check_gradients_agree(
    make: Callable[[], Any], layouts: Sequence[Mapping[str, Any]], *, checkpointed: bool
) -> None:
    """Compare the gradients of two layouts, given as arguments of `collate`."""
    prompts, answers = pairs()
    grads = []
    for layout in layouts:
        model = make().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logp = PairScorer(model)(collate(prompts, answers, pad_id=0, **layout))[0]
        (logp[0].sum() - 2 * logp[1].sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)

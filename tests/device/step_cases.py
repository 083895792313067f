"""Small models, batches and objectives that a training step is made of, on either device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tbpo_ray.config.schema import LoraConfig
from tbpo_ray.models.load import add_lora
from tbpo_ray.objectives import build_objective, build_state_baseline
from tbpo_ray.training.batch import PairBatch, collate
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.step import PreferenceStep

VOCAB = 61
PAIRS = 4


def llama(attention: str = "sdpa", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
        attn_implementation=attention,  # type: ignore[call-arg]
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gemma() -> Any:
    """Sliding windows in some layers, and soft-capped logits."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=5.0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def batch(
    *, shared: bool = True, packed: bool = False, sides: int = 2, truncate: bool = False, ties: bool = False
) -> PairBatch:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, rng.integers(3, 9)) for _ in range(PAIRS)]
    answers = [[rng.integers(0, VOCAB, rng.integers(2, 9)) for _ in range(PAIRS)] for _ in range(sides)]
    values = [[rng.normal(-3, 1, len(answer)) for answer in side] for side in answers]
    found = collate(
        prompts,
        answers,
        pad_id=0,
        shared=shared and sides == 2,
        packed=packed,
        truncate_to_shorter=truncate,
        ref_logps=values,
        weights=[[np.abs(value) / 3 for value in side] for side in values],
    )
    found.chunks = torch.arange(found.labels.shape[-1]).expand_as(found.labels) // 3
    found.pair_margins, found.pair_weights = torch.rand(2, PAIRS, generator=torch.Generator().manual_seed(0))
    if ties:
        found.tie = torch.tensor([True, *[False] * (PAIRS - 1)])
    return found


@dataclass
class Parts:
    """A step and the modules that it trains."""

    scorer: PairScorer
    step: PreferenceStep
    head: nn.Module | None

    def modules(self) -> list[nn.Module]:
        return [self.scorer, *([self.head] if self.head is not None else [])]

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {}
        for at, module in enumerate(self.modules()):
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    found[f"{at}.{name}"] = parameter.grad.cpu()
        return found


def parts(
    section: dict[str, Any],
    *,
    model: Callable[[], Any] = llama,
    reference: str = "cached",
    move: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Parts:
    """The parts of a step, moved by `move` to their device.

    Args:
        reference: `cached`, `live` or `adapter_off`.
    """
    objective = build_objective(section)
    policy = model()
    frozen: Any = None
    if reference == "adapter_off":
        policy = add_lora(policy, LoraConfig(r=4, dropout=0, target_modules=["q_proj", "lm_head"]))
        frozen = "adapter_off"
    elif reference == "live":
        frozen = PairScorer(model().requires_grad_(False)).eval()
        with torch.no_grad():
            for parameter in frozen.parameters():
                parameter.mul_(1.05)
        move(frozen)
    head = None
    if objective.learned_baseline:
        torch.manual_seed(2)
        head = build_state_baseline(objective.state_baseline, 32)
        assert head is not None
        # The last layers start at zero, which would hide the head from the values.
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.1)
        move(head)
    scorer = PairScorer(policy).train()
    move(scorer)
    return Parts(scorer, PreferenceStep(objective, head, frozen, seed=3), head)

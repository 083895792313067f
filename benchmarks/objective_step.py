"""Time of a TBPO training step relative to a DPO step on the same batch.

A decoder of plain torch layers, its output layer through `token_log_probs`, the objective, backward and
RMSprop (for TBPO-Q also the head and its AdamW). Every objective gets the same tokens: the answers are not
truncated to the shorter one, as TBPO allows, so that the ratio is about the objective alone.

Shapes: B pairs, T answer tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbpo_ray.objectives import TokenScores, build_objective, build_state_baseline, token_log_probs

VARIANTS: dict[str, dict] = {
    "dpo": {"name": "dpo"},
    "ipo": {"name": "ipo"},
    "simpo": {"name": "simpo"},
    "bpo": {"name": "bpo"},
    "bpo beta_family": {"name": "bpo", "bregman": {"generator": "beta_family", "a": 0.5, "b": 2.0}},
    "tdpo1": {"name": "tdpo1"},
    "tdpo2": {"name": "tdpo2"},
    "tis_dpo": {"name": "tis_dpo"},
    "tis_dpo alpha 0.5": {"name": "tis_dpo", "alpha": 0.5},
    "sepo": {"name": "sepo"},
    "t_reg": {"name": "t_reg"},
    "confpo": {"name": "confpo"},
    "tgdpo": {"name": "tgdpo"},
    "arc_bpo": {"name": "arc_bpo"},
    "dpo wpo": {"name": "dpo", "pair_weights": "wpo"},
    "tbpo_q": {"name": "tbpo_q"},
    "tbpo_a k3": {"name": "tbpo_a", "state_baseline": {"kind": "k3"}},
    "tbpo_a exact_kl": {"name": "tbpo_a"},
    "tbpo_q beta_family": {"name": "tbpo_q", "bregman": {"generator": "beta_family", "a": 0.5, "b": 2.0}},
}

QUICK_VARIANTS = ("dpo", "tis_dpo alpha 0.5", "tbpo_q", "tbpo_a exact_kl")


@dataclass(frozen=True)
class Size:
    """The model and the batch."""

    pairs: int = 4
    prompt: int = 64
    answer: int = 64
    hidden: int = 256
    layers: int = 2
    vocab: int = 16_000
    device: str = "cpu"


QUICK = Size(pairs=4, prompt=16, answer=32, hidden=128, layers=2, vocab=8_000)
CUDA = Size(pairs=16, prompt=256, answer=256, hidden=2048, layers=8, vocab=128_256, device="cuda")


class Decoder(nn.Module):
    """A small causal language model without its output layer: token ids [B, T] to hidden [B, T, H]."""

    def __init__(self, size: Size):
        super().__init__()
        self.embed = nn.Embedding(size.vocab, size.hidden)
        layer = nn.TransformerEncoderLayer(
            size.hidden, max(1, size.hidden // 64), 4 * size.hidden, dropout=0.0, batch_first=True
        )
        self.body = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.out = nn.Linear(size.hidden, size.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.body(self.embed(ids), mask=mask, is_causal=True)


def make_step(config: dict, size: Size) -> Callable[[], None]:
    """One optimizer step of an objective on a fixed random batch."""
    torch.manual_seed(0)
    policy, reference = Decoder(size).to(size.device), Decoder(size).to(size.device)
    reference.load_state_dict(policy.state_dict())
    objective = build_objective(config)
    head = build_state_baseline(objective.state_baseline, size.hidden) if objective.learned_baseline else None
    optimizers: list[torch.optim.Optimizer] = [torch.optim.RMSprop(policy.parameters(), lr=1e-6)]
    if head is not None:
        head.to(size.device)
        optimizers.append(torch.optim.AdamW(head.parameters(), lr=objective.state_baseline.lr))
    ids = torch.randint(size.vocab, (2 * size.pairs, size.prompt + size.answer), device=size.device)
    labels, inputs = ids[:, size.prompt :], ids[:, :-1]
    lengths = torch.randint(size.answer // 2, size.answer + 1, (2 * size.pairs, 1), device=size.device)
    mask = torch.arange(size.answer, device=size.device) < lengths
    weights = torch.rand(mask.shape, device=size.device) if objective.needs_weights else None
    chunks = (torch.arange(size.answer, device=size.device) // 16).expand(mask.shape)
    answer = slice(size.prompt - 1, None)
    with torch.no_grad():
        ref_hidden = reference(inputs)[:, answer]
        cached = token_log_probs(ref_hidden, reference.out.weight, labels, mask, want=("logp",)).logp

    divergence = ["kl"] * objective.needs_kl + ["reverse_kl"] * objective.needs_reverse_kl

    def step() -> None:
        hidden = policy(inputs)[:, answer]
        live = None
        if objective.needs_distribution:
            with torch.no_grad():
                live = reference(inputs)[:, answer]
        stats = token_log_probs(
            hidden,
            policy.out.weight,
            labels,
            mask,
            live,
            reference.out.weight,
            want=("logp", *divergence, *(["log_collision"] * objective.needs_collision)),
        )
        kl = stats.kl if objective.needs_kl else stats.reverse_kl
        c = head(hidden, kl) if head is not None else kl
        assert stats.logp is not None and cached is not None
        columns = {
            "logps": stats.logp,
            "ref_logps": cached,
            "mask": mask,
            "baseline": c,
            "weights": weights,
            "log_collision": stats.log_collision,
            "chunks": chunks if objective.needs_chunks else None,
        }
        halves = {name: (None, None) if v is None else v.chunk(2) for name, v in columns.items()}
        sides: dict[str, Any] = {
            f"{side}_{name}": half[i]
            for name, half in halves.items()
            for i, side in enumerate(("chosen", "rejected"))
        }
        objective(TokenScores(**sides)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def run(quick: bool = False) -> dict[str, dict[str, float]]:
    """Measure every variant in rounds.

    Returns:
        {variant: {seconds, ratio, cpu_ratio}}, medians over the rounds.

    A round times each variant once, in random order, after an untimed step (the previous variant may have
    left the allocator in another state), and divides by the DPO time of the same round. `cpu_ratio` divides
    CPU seconds of the process, which other programs on the machine disturb less; it means little on CUDA.
    """
    size = QUICK if quick else CUDA if torch.cuda.is_available() else Size()
    variants = {name: VARIANTS[name] for name in (QUICK_VARIANTS if quick else VARIANTS)}
    steps = {name: make_step(config, size) for name, config in variants.items()}
    for step in steps.values():
        step()
    names, rng = list(steps), random.Random(0)
    rounds: list[dict[str, tuple[float, float]]] = []
    for _ in range(4 if quick else 24):
        found = {}
        for name in rng.sample(names, len(names)):
            steps[name]()
            found[name] = timed(steps[name])
        rounds.append(found)

    def over_dpo(name: str, clock: int) -> float:
        return statistics.median(times[name][clock] / times["dpo"][clock] for times in rounds)

    return {
        name: {
            "seconds": statistics.median(times[name][0] for times in rounds),
            "ratio": over_dpo(name, 0),
            "cpu_ratio": over_dpo(name, 1),
        }
        for name in names
    }


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of one call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu

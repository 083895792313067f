"""The population optimum in a small tabular world, through the public interface.

5 states, 6 actions, a random Q; every ordered pair of (state, action) is a preference pair, weighted by its
Bradley-Terry probability, so there is no sampling noise. Under the token-level model the minimiser must be
pi* ~ pi_ref exp(Q / beta), whatever the generator: with a learned baseline for any score, with the exact KL
when the score is the advantage, and not without a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tbpo_ray.objectives import TokenScores, build_objective

STATES, ACTIONS, BETA = 5, 6, 0.5
LSIF_AS_RELEASED = SimpleNamespace(
    name="lsif as released",
    loss=lambda u: (2 * u).exp() - 2 * u.exp(),
    is_clamped=lambda u: torch.zeros_like(u, dtype=torch.bool),
)
GENERATORS: dict[str, dict] = {
    "logistic": {"generator": "logistic"},
    "sba, lam 0": {"generator": "sba", "lam": 0.0},
    "sba, lam 1": {"generator": "sba", "lam": 1.0},
    "lsif": {"generator": "lsif"},
    "lsif as released": {},
}
PLANE = [(1.0, 1.0), (2.0, 2.0), (0.5, 2.0), (-0.5, -0.5), (0.0, 0.5), (1.5, -1.0)]


@dataclass
class World:
    ref: Tensor  # log pi_ref [states, actions]
    q: Tensor
    optimum: Tensor  # log pi*

    def score(self, name: str) -> Tensor:
        """Q, or the advantage Q - E_ref Q."""
        mean = (self.ref.exp() * self.q).sum(1, keepdim=True)
        return self.q - mean if name == "advantage" else self.q

    def distance(self, policy: Tensor) -> float:
        """Mean over states of KL(pi* || policy)."""
        return (self.optimum.exp() * (self.optimum - policy)).sum(1).mean().item()


def make_world(seed: int = 0) -> World:
    rng = torch.Generator().manual_seed(seed)
    ref = torch.randn(STATES, ACTIONS, generator=rng, dtype=torch.float64).log_softmax(1)
    q = torch.randn(STATES, ACTIONS, generator=rng, dtype=torch.float64)
    return World(ref, q, (ref + q / BETA).log_softmax(1))


def fit(world: World, section: dict, score: str, variant: str) -> float:
    """Minimise the population loss from the reference; how far the policy ends from pi*."""
    name = "tbpo_a" if variant == "tbpo_a" else "tbpo_q"
    kind = {"tbpo_q": "learned", "tbpo_a": "exact_kl", "none": "none"}[variant]
    objective = build_objective(
        {"name": name, "beta": BETA, "bregman": section, "state_baseline": {"kind": kind}}
    )
    if not section:
        objective.generator = LSIF_AS_RELEASED  # type: ignore[assignment]
    index = torch.arange(STATES * ACTIONS)
    chosen, rejected = torch.cartesian_prod(index, index).unbind(1)
    values = world.score(score).flatten()
    weight = torch.sigmoid(values[chosen] - values[rejected]) / len(index)
    theta = world.ref.clone().requires_grad_()
    b = torch.zeros(STATES, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(len(chosen), 1, dtype=torch.bool)

    def loss() -> Tensor:
        policy = theta.log_softmax(1)
        c = b if variant == "tbpo_q" else (world.ref.exp() * (world.ref - policy)).sum(1)
        c = c.repeat_interleave(ACTIONS)
        sides = {}
        for side, at in (("chosen", chosen), ("rejected", rejected)):
            sides[f"{side}_logps"] = policy.flatten()[at, None]
            sides[f"{side}_ref_logps"] = world.ref.flatten()[at, None]
            sides[f"{side}_baseline"] = c[at, None]
            sides[f"{side}_mask"] = mask
        return (weight * objective(TokenScores(**sides)).per_pair_loss).sum()

    optimizer = torch.optim.LBFGS(
        [theta, b], max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return world.distance(theta.detach().log_softmax(1))


@pytest.mark.parametrize("score", ["q", "advantage"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_what_each_baseline_recovers(generator: str, score: str) -> None:
    world = make_world()
    before = world.distance(world.ref)
    assert before > 0.5
    section = GENERATORS[generator]
    found = {variant: fit(world, section, score, variant) for variant in ("tbpo_q", "tbpo_a", "none")}
    if generator == "lsif as released":
        assert all(distance == pytest.approx(before, rel=1e-6) for distance in found.values()), found
        return
    assert found["tbpo_q"] < 1e-8
    assert found["none"] > 0.02
    assert (found["tbpo_a"] < 1e-8) if score == "advantage" else (found["tbpo_a"] > 0.02)


@pytest.mark.parametrize("point", PLANE, ids=str)
def test_every_point_of_the_plane_has_the_same_optimum(point: tuple[float, float]) -> None:
    """Also where the loss is not convex in u, and its slope falls for tokens that the model gets wrong."""
    world = make_world()
    section = {"generator": "beta_family", "a": point[0], "b": point[1]}
    assert fit(world, section, "q", "tbpo_q") < 1e-8

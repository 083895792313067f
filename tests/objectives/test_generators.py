"""Generators: the identity they come from, continuity in lam, and large |u|."""

from __future__ import annotations

import math

import pytest
import torch

from tbpo_ray.errors import InputError
from tbpo_ray.objectives import GENERATORS, Generator, make_generator

U = torch.linspace(-4, 4, 33, dtype=torch.float64)


def all_generators() -> list[Generator]:
    lams = (-0.5, -1e-9, 0.0, 0.3, 1.0, 2.0)
    named = [name for name in GENERATORS if name != "beta_family"]
    return [make_generator(name, lam=lam) for name in named for lam in (lams if "ba" in name else (0.0,))]


every_generator = pytest.mark.parametrize("g", all_generators(), ids=lambda g: f"{g.name}{g.lam:g}")


def h(g: Generator, r: torch.Tensor) -> torch.Tensor:
    """The generator itself, as in the module's table."""
    if g.name == "logistic":
        return (r * r.log() - (1 + r) * (1 + r).log()) / 2
    if g.name == "kliep" or (g.name == "ba" and abs(g.lam) < 1e-6):
        return r * r.log() - r * (g.name == "kliep")
    if g.name == "lsif":
        return (r - 1) ** 2
    if g.name == "ba":
        return (r ** (1 + g.lam) - r) / g.lam
    if abs(g.lam) < 1e-6:
        return r * r.log() / g.scale
    return (r ** (1 + g.lam) - r) / (g.scale * g.lam * (1 + g.lam))


@every_generator
def test_is_the_density_ratio_matching_loss_of_its_generator(g: Generator) -> None:
    def slope(r: torch.Tensor) -> torch.Tensor:
        r = r.detach().requires_grad_()
        return torch.autograd.grad(h(g, r).sum(), r)[0]

    r = U.exp()
    identity = slope(r) * r - h(g, r) - slope(1 / r)
    difference = g.loss(U) - identity
    torch.testing.assert_close(difference, difference.mean().expand_as(U), rtol=1e-6, atol=1e-6)


@every_generator
def test_gradient(g: Generator) -> None:
    assert torch.autograd.gradcheck(g.loss, (U.clone().requires_grad_(),))


@pytest.mark.parametrize("name", ["ba", "sba"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_continuous_in_lam_through_zero(name: str, dtype: torch.dtype) -> None:
    u = U.to(dtype).requires_grad_()
    limit = make_generator(name, lam=0.0).loss(u)
    limit_grad = torch.autograd.grad(limit.sum(), u)[0]
    for size in (1e-6, 1e-9, 1e-12, 1e-15, 1e-18, 1e-24, 1e-320):
        for lam in (size, -size):
            value = make_generator(name, lam=lam).loss(u)
            grad = torch.autograd.grad(value.sum(), u)[0]
            near = max(1e3 * size, 1e-12 if dtype == torch.float64 else 1e-4)
            torch.testing.assert_close(value, limit, rtol=near, atol=near)
            torch.testing.assert_close(grad, limit_grad, rtol=near, atol=near)


@every_generator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_u_is_finite_and_counted(g: Generator, dtype: torch.dtype) -> None:
    u = torch.tensor([-1e30, -1e4, -200.0, -31.0, 0.0, 31.0, 200.0, 1e4, 1e30], dtype=dtype).requires_grad_()
    loss = g.loss(u)
    (grad,) = torch.autograd.grad(loss.sum(), u)
    assert loss.isfinite().all() and grad.isfinite().all() and loss.shape == u.shape
    clamped = g.is_clamped(u)
    if math.isinf(g.limit):
        assert not clamped.any()
    else:
        assert clamped.tolist() == [True] * 4 + [False] + [True] * 4
        assert not grad[clamped].any() and grad[4] != 0
    squared = (grad.float() ** 2).sum()
    assert g.name == "logistic" or squared.isfinite(), "a gradient norm must not overflow"


@every_generator
def test_smaller_u_is_better_and_nan_stays_nan(g: Generator) -> None:
    assert (g.loss(U).diff() > 0).all()
    assert g.loss(torch.tensor([float("nan")])).isnan().all()


def test_slope_at_zero_of_sba_is_that_of_logistic() -> None:
    u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    slopes = [
        torch.autograd.grad(make_generator(name, lam=lam).loss(u), u)[0].item()
        for name, lam in (("logistic", 0), ("sba", 0), ("sba", 0.7), ("sba", -0.3))
    ]
    assert slopes == pytest.approx([0.5] * 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "sbaa"}, ["sbaa", "did you mean sba"]),
        ({"name": "sba", "lam": -1}, ["objective.bregman.lam=-1", "greater than -1"]),
        ({"name": "ba", "lam": -2.5}, ["lam", "-2.5"]),
        ({"name": "kliep", "lam": -1}, ["lam"]),
        ({"name": "sba", "lam": float("nan")}, ["lam", "nan"]),
        ({"name": "sba", "lam": "x"}, ["lam", "'x'"]),
        ({"name": "sba", "scale": 0}, ["objective.bregman.scale=0", "greater than 0"]),
    ],
)
def test_bad_parameters(arguments: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        make_generator(arguments.pop("name"), **arguments)
    assert all(word in str(error.value) for word in words)

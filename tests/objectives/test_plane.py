"""The plane of proper losses: worked numbers, its named points, its theory, and a user's own loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tbpo_ray.errors import InputError
from tbpo_ray.objectives import Generator, build_objective, make_generator
from tbpo_ray.objectives import beta_family as plane

GOLDEN = json.loads((Path(__file__).parent / "golden_3.json").read_text())["plane"]
GRID = [(a, b) for a in (-1.5, -0.5, 0.0, 0.3, 1.0, 2.0, 3.0) for b in (-2.0, -1.0, -0.5, 0.0, 0.5, 2.0)]
every_point = pytest.mark.parametrize("point", GRID, ids=str)
U = torch.linspace(-4, 4, 33, dtype=torch.float64)


def at(point: tuple[float, float]) -> Generator:
    return make_generator("beta_family", a=point[0], b=point[1])


def value_and_slope(g: Generator, u: Tensor) -> tuple[Tensor, Tensor]:
    u = u.clone().requires_grad_()
    loss = g.loss(u)
    return loss.detach(), torch.autograd.grad(loss.sum(), u)[0]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"a{case['a']},b{case['b']}")
def test_golden(case: dict[str, Any]) -> None:
    u, loss, grad = (torch.tensor(case[k], dtype=torch.float64) for k in ("u", "loss", "grad"))
    g = at((case["a"], case["b"]))
    value, slope = value_and_slope(g, u)
    torch.testing.assert_close(value, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, grad, rtol=1e-12, atol=1e-15)
    # The closed forms, where there are any, and the quadrature are two ways to the same number.
    by_nodes = plane._quadrature(u, case["a"], case["b"], g.limit)
    torch.testing.assert_close(by_nodes, loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "lam", "factor", "point"),
    [
        ("logistic", 0.0, 1.0, (0, 0)),
        ("kliep", 0.0, 0.25, (0, -1)),
        ("lsif", 0.0, 0.125, (1, -2)),
        *(("sba", lam, 1.0, (lam, -1 - lam)) for lam in (-0.5, 0.0, 0.4, 1.0, 2.0)),
        *(("ba", lam, 0.25 / (1 + lam), (lam, -1 - lam)) for lam in (-0.5, 0.0, 0.4, 1.0)),
    ],
)
def test_every_named_generator_is_a_point(
    name: str, lam: float, factor: float, point: tuple[float, float]
) -> None:
    named, ours = value_and_slope(make_generator(name, lam=lam), U), value_and_slope(at(point), U)
    torch.testing.assert_close(ours[0], factor * (named[0] - named[0][16]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], factor * named[1], rtol=1e-12, atol=1e-12)


@every_point
def test_is_the_loss_of_its_generator(point: tuple[float, float]) -> None:
    """dloss/du = h''(R) R^2 + h''(1/R) / R with h''(R) = omega(c) / (1 + R)^3, scaled to 1/2 at u = 0."""

    def curvature(r: Tensor) -> Tensor:
        c = r / (1 + r)
        return c ** (point[0] - 1) * (1 - c) ** (point[1] - 1) / (1 + r) ** 3

    r = U.exp()
    slope = curvature(r) * r**2 + curvature(1 / r) / r
    torch.testing.assert_close(value_and_slope(at(point), U)[1], slope / slope[16] / 2)


@every_point
def test_facts(point: tuple[float, float]) -> None:
    g = at(point)
    value, slope = value_and_slope(g, U)
    assert value[16] == 0 and slope[16] == pytest.approx(0.5, abs=1e-14)
    assert (slope > 0).all() and (value.diff() > 0).all(), "smaller u is better"
    mirrored, mirrored_slope = value_and_slope(at(point[::-1]), U)  # type: ignore[arg-type]
    torch.testing.assert_close(mirrored, value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mirrored_slope, slope, rtol=1e-12, atol=0)
    step = 1e-5
    numerical = (g.loss(U + step) - g.loss(U - step)) / (2 * step)
    torch.testing.assert_close(slope, numerical, rtol=1e-7, atol=1e-9)


@every_point
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_u_is_finite_and_clamped(point: tuple[float, float], dtype: torch.dtype) -> None:
    g = at(point)
    assert g.limit == 30 / max(1, -point[0], -point[1])
    u = torch.tensor([-1e30, -1e4, -31, 0.5, 31, 1e4, 1e30, math.nan], dtype=dtype)
    value, slope = value_and_slope(g, u)
    wide = torch.promote_types(dtype, torch.float32)
    assert value.dtype == wide and value[:-1].isfinite().all() and slope[:-1].isfinite().all()
    assert slope[:-1].ne(0).tolist() == [False] * 3 + [True] + [False] * 3
    assert value[-1].isnan()
    exact = value_and_slope(g, torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(value[3].double(), exact[0][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((1, 1), math.log(2)),
        ((2, 2), math.log(1.5)),
        ((0, 0), math.inf),
        ((0, -1), math.inf),
        ((3, -0.5), math.inf),
        ((2, 0), math.inf),
    ],
)
def test_where_the_slope_begins_to_fall(point: tuple[float, float], expected: float) -> None:
    assert at(point).turning_point == pytest.approx(expected, abs=1e-9)


@every_point
def test_the_slope_only_falls_beyond_the_turning_point(point: tuple[float, float]) -> None:
    g = at(point)
    u = torch.linspace(-5, 0.99 * g.limit, 2001, dtype=torch.float64)
    slope = value_and_slope(g, u)[1]
    beyond = u > g.turning_point
    assert torch.equal(g.is_outlier(u), beyond)
    assert (slope[beyond].diff() < 0).all()
    assert beyond.any() or slope[-1] >= slope[-2]
    if beyond.any():
        before = u[~beyond][-1:] - torch.tensor([0.02, 0.0])
        rising = value_and_slope(g, before)[1]
        assert rising[1] > rising[0]


def test_the_share_of_outliers_is_a_metric() -> None:
    from objective_cases import random_scores

    scores = random_scores(pairs=40, grad=False)
    section = {"generator": "beta_family", "a": 1.0, "b": 1.0}
    out = build_objective({"name": "tbpo_a", "beta": 1.0, "bregman": section})(scores)
    assert scores.rejected_mask is not None
    u = (
        scores.rejected_logps - scores.rejected_ref_logps - scores.chosen_logps + scores.chosen_ref_logps
        + scores.rejected_baseline - scores.chosen_baseline
    )[scores.chosen_mask & scores.rejected_mask]  # fmt: skip
    share = (u > math.log(2)).double().mean().item()
    assert 0.1 < share < 0.9 and out.metrics["u/outlier_share"].item() == pytest.approx(share)
    assert "u/outlier_share" not in build_objective({"name": "tbpo_a"})(scores).metrics


# --- a loss of the user's own

SOURCE = """
import torch
from torch.nn.functional import softplus

def good(u):
    return softplus(u) + 0.1 * u

def hinge(u):
    return torch.relu(1 + u)

def falls(u):
    return softplus(u) - 0.6 * u

def explodes(u):
    return (u**3 / 50).exp()

def constant(u):
    return 0 * u

def scalar(u):
    return u.sum()

def pooled(u):
    return u - u.mean()

def broken(u):
    return u.undefined_method()

def no_gradient(u):
    return softplus(u.detach())

def stepped(u):
    return softplus(u) + (3 * u).round().detach()

def number(u):
    return 1.0

NOT_CALLABLE = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my losses.py"
    path.write_text(SOURCE)
    return path


def test_a_loss_of_the_users_own(file: Path) -> None:
    objective = build_objective({"name": "bpo", "bregman": {"generator": f"{file}:good"}})
    assert objective.generator is not None and objective.generator.limit == 20
    value, slope = value_and_slope(objective.generator, torch.tensor([0.0, 100.0], dtype=torch.bfloat16))
    torch.testing.assert_close(value, torch.tensor([math.log(2), 22.0]))
    torch.testing.assert_close(slope.float(), torch.tensor([0.6, 0.0]), rtol=1e-2, atol=0)
    make_generator(f"{file}:hinge")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("falls", ["not monotone", "u = -20"]),
        ("explodes", ["not finite"]),
        ("constant", ["does not increase"]),
        ("scalar", ["shape ()"]),
        ("pooled", ["not elementwise"]),
        ("broken", ["AttributeError", "undefined_method"]),
        ("no_gradient", ["no gradient"]),
        ("stepped", ["its gradient is not that of its values"]),
        ("number", ["returns float"]),
        ("NOT_CALLABLE", ["has no function NOT_CALLABLE"]),
        ("absent", ["has no function absent"]),
    ],
)
def test_a_function_that_is_no_loss_is_refused(file: Path, name: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        build_objective({"name": "bpo", "bregman": {"generator": f"{file}:{name}"}})
    text = str(error.value)
    assert text.startswith(f"objective.bregman.generator={file}:{name}: ") and "give a function" in text
    assert all(word in text for word in words), text


def test_a_file_that_is_missing_or_broken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        make_generator(f"{tmp_path}/none.py:loss")
    (tmp_path / "bad.py").write_text("import torch\nraise RuntimeError('no')\n")
    with pytest.raises(InputError, match="cannot be imported: RuntimeError: no"):
        make_generator(f"{tmp_path}/bad.py:loss")

"""The blockwise output layer against the plain full-logits formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbpo_ray.errors import InputError
from tbpo_ray.objectives import token_log_probs

B, T, H, V, K = 2, 4, 2, 7, 3
WANT = ("logp", "entropy", "kl")
EVERY = (*WANT, "reverse_kl")


def log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, scale: float
) -> Tensor:
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * scale
    return (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1)


def plain(
    hidden: Tensor,
    weight: Tensor,
    x: dict[str, Any],
    bias: Tensor | None = None,
    cap: float | None = None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """The same statistics from full logits. [B, T] each"""
    logp = log_softmax(hidden, weight, bias, cap, scale)
    with torch.no_grad():
        ref = log_softmax(x["ref_hidden"], x["ref_weight"], x.get("ref_bias"), cap, scale)
    label = x["labels"].clamp(0, V - 1)[..., None]
    every = {
        "logp": logp.gather(-1, label)[..., 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_collision": (2 * logp).logsumexp(-1),
        "kl": (ref.exp() * (ref - logp)).sum(-1),
        "reverse_kl": (logp.exp() * (logp - ref)).sum(-1),
        "ref_logp": ref.gather(-1, label)[..., 0],
    }
    return {name: torch.where(x["mask"], value, 0) for name, value in every.items()}


@pytest.fixture
def x() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    mask = torch.tensor([[True, True, True, False], [True, False, True, False]])
    labels = torch.randint(V, (B, T), generator=rng).masked_fill(~mask, -100)
    return {
        "hidden": normal(B, T, H),
        "weight": normal(V, H),
        "bias": normal(V),
        "labels": labels,
        "mask": mask,
        "ref_hidden": normal(B, T, H),
        "ref_weight": normal(V, H),
    }


def ours(hidden: Tensor, weight: Tensor, x: dict[str, Any], **options: Any) -> Any:
    options = {"want": WANT, "block_tokens": 2, "block_vocab": 3, **options}
    return token_log_probs(
        hidden, weight, x["labels"], x["mask"], x["ref_hidden"], x["ref_weight"], **options
    )


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "scaled": {"logit_scale": 0.3},
    "bias": {"bias": True},
    "all": {"softcap": 2.0, "logit_scale": 1.7, "bias": True},
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
frozen_or_not = pytest.mark.parametrize("frozen", [False, True], ids=["learning", "frozen"])


@every_layer
@frozen_or_not
@pytest.mark.parametrize("want_outputs", [WANT, EVERY, ("logp", "reverse_kl")], ids="+".join)
@pytest.mark.parametrize("blocks", [(2, 4), (None, None), (1, 1), (5, 7)], ids=str)
def test_values_and_gradients_equal_the_plain_formula(x, layer, frozen, blocks, want_outputs) -> None:
    options = {**layer, "want": want_outputs}
    bias = x["bias"].clone().requires_grad_(not frozen) if options.pop("bias", False) else None
    hidden = x["hidden"].requires_grad_()
    weight = x["weight"].requires_grad_(not frozen)
    leaves = [hidden] if frozen else [hidden, weight] + ([] if bias is None else [bias])
    stats = ours(hidden, weight, x, bias=bias, block_tokens=blocks[0], block_vocab=blocks[1], **options)
    ref_bias = None
    expected = plain(
        hidden,
        weight,
        x | {"ref_bias": ref_bias},
        bias,
        options.get("softcap"),
        options.get("logit_scale", 1.0),
    )
    rng = torch.Generator().manual_seed(5)
    names = want_outputs
    upstream = [torch.randn(B, T, generator=rng, dtype=torch.float64) for _ in names]
    for name in names:
        torch.testing.assert_close(getattr(stats, name), expected[name], rtol=0, atol=1e-12)
    got = torch.autograd.grad([getattr(stats, n) for n in names], leaves, upstream)
    want = torch.autograd.grad([expected[n] for n in names], leaves, upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@every_layer
@pytest.mark.parametrize("name", EVERY)
def test_gradcheck(x, layer, name) -> None:
    options = dict(layer)
    with_bias = options.pop("bias", False)
    leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
    leaves += [x["bias"].requires_grad_()] if with_bias else []

    def value(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return getattr(ours(hidden, weight, x, want=(name,), bias=bias, **options), name)

    def value_frozen(hidden: Tensor) -> Tensor:
        bias = x["bias"].detach() if with_bias else None
        return getattr(ours(hidden, x["weight"].detach(), x, want=(name,), bias=bias, **options), name)

    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradcheck(value_frozen, leaves[:1])


@frozen_or_not
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck_of_sampled_k3(x, frozen, softcap) -> None:
    weight = x["weight"].requires_grad_(not frozen)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(7)
        stats = ours(hidden, weight, x, want=("k3", "logp"), samples=K, generator=rng, softcap=softcap)
        return stats.k3 * 2 + stats.logp

    assert torch.autograd.gradcheck(value, (x["hidden"].requires_grad_(), weight))


def test_sampled_k3_is_unbiased_and_its_variance_falls_as_one_over_n(x) -> None:
    exact = ours(x["hidden"], x["weight"], x).kl
    repeat = 400
    many = {k: v.repeat(repeat, *[1] * (v.dim() - 1)) if "weight" not in k else v for k, v in x.items()}
    variances = []
    for n in (4, 64):
        rng = torch.Generator().manual_seed(n)
        k3 = ours(
            many["hidden"], x["weight"], many, want=("k3",), samples=n, generator=rng, block_tokens=500
        ).k3
        k3 = k3.reshape(repeat, B, T)
        variances.append(k3.var(0))
        error = (k3.mean(0) - exact).abs()
        assert (error <= 5 * (k3.var(0) / repeat).sqrt()).all()
    ratio = (variances[0] / variances[1])[x["mask"]]
    assert ((ratio > 8) & (ratio < 32)).all(), ratio  # 16 expected


def test_non_leaf_weight_and_tied_embeddings(x) -> None:
    """LoRA on the output layer makes the weight a non-leaf; tied embeddings add to its gradient."""
    base = x["weight"].requires_grad_()
    a, b = torch.randn(V, 2, dtype=torch.float64), torch.randn(2, H, dtype=torch.float64)
    a.requires_grad_(), b.requires_grad_()
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))

    def loss(statistics: Callable[..., Any]) -> tuple[Tensor, ...]:
        stats = statistics(nn.functional.embedding(tokens, base), base + a @ b)
        return torch.autograd.grad(sum((stats[n] ** 2).sum() for n in WANT), (base, a, b))

    got = loss(lambda hidden, weight: vars(ours(hidden, weight, x)))
    for g, e in zip(got, loss(lambda hidden, weight: plain(hidden, weight, x)), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-11)


@frozen_or_not
def test_weight_storage_may_be_swapped_between_forward_and_backward(x, frozen) -> None:
    """As ZeRO-3 does: the parameter is released after forward and gathered again before backward."""
    hidden, weight = x["hidden"].requires_grad_(), nn.Parameter(x["weight"], requires_grad=not frozen)
    leaves = [hidden] if frozen else [hidden, weight]
    expected = torch.autograd.grad(ours(hidden, weight, x).logp.sum(), leaves)
    stats = ours(hidden, weight, x)
    gathered, weight.data = weight.data.clone(), torch.empty(0, dtype=weight.dtype)
    weight.data = gathered
    for g, e in zip(torch.autograd.grad(stats.logp.sum(), leaves), expected, strict=True):
        assert torch.equal(g, e)


def test_only_masked_in_rows_are_read(x) -> None:
    hidden = x["hidden"].masked_fill(~x["mask"][..., None], float("nan")).requires_grad_()
    weight = x["weight"].requires_grad_()
    stats = ours(hidden, weight, x, want=EVERY)
    for name in EVERY:
        assert not getattr(stats, name)[~x["mask"]].any()
    sum(getattr(stats, name).sum() for name in EVERY).backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@frozen_or_not
def test_nothing_selected_is_a_zero_with_a_gradient(x, frozen) -> None:
    x["mask"] = torch.zeros_like(x["mask"])
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_(not frozen)
    stats = ours(hidden, weight, x, want=(*EVERY, "k3"), samples=2)
    sum(getattr(stats, name).sum() for name in (*EVERY, "k3")).backward()
    assert not hidden.grad.any()
    assert frozen or (weight.grad.shape == weight.shape and not weight.grad.any())


def test_the_reference_never_receives_a_gradient(x) -> None:
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    x["ref_hidden"].requires_grad_(), x["ref_weight"].requires_grad_()
    stats = ours(hidden, weight, x, want=("kl", "ref_logp"))
    assert not stats.ref_logp.requires_grad
    torch.testing.assert_close(stats.ref_logp, plain(hidden, weight, x)["ref_logp"], rtol=0, atol=1e-12)
    stats.kl.sum().backward()
    assert x["ref_hidden"].grad is None and x["ref_weight"].grad is None


def test_shared_layer_reference_and_default_outputs(x) -> None:
    same = token_log_probs(x["hidden"], x["weight"], x["labels"], x["mask"], x["hidden"])
    assert same.kl is not None and same.kl.abs().max() < 1e-14
    alone = token_log_probs(x["hidden"], x["weight"], x["labels"], x["mask"])
    assert (
        alone.kl is None
        and alone.entropy is not None
        and alone.logp is not None
        and not alone.logp.requires_grad
    )


@frozen_or_not
def test_outputs_without_gradient(x, frozen) -> None:
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_(not frozen)
    stats = ours(hidden, weight, x, no_grad=("entropy",))
    assert stats.logp.requires_grad and not stats.entropy.requires_grad
    leaves = [hidden] if frozen else [hidden, weight]
    got = torch.autograd.grad(stats.logp.sum() + stats.kl.sum(), leaves)
    expected = plain(hidden, weight, x)
    want = torch.autograd.grad(expected["logp"].sum() + expected["kl"].sum(), leaves)
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-12)


def test_a_frozen_layer_saves_one_vector_per_output_and_nothing_else(x) -> None:
    stats = ours(x["hidden"].requires_grad_(), x["weight"], x)
    node = next(n for n in nodes(stats.logp.grad_fn) if "TokenStatistics" in type(n).__name__)
    n = int(x["mask"].sum())
    assert [tuple(t.shape) for t in node.saved_tensors] == [(n, H)] * 3


def nodes(root: Any) -> list[Any]:
    """Every node of an autograd graph."""
    found, queue = [], [root]
    while queue:
        node = queue.pop()
        found.append(node)
        queue += [child for child, _ in node.next_functions if child is not None]
    return found


@pytest.mark.parametrize("dtypes", itertools.product([torch.bfloat16, torch.float32], repeat=2), ids=str)
@frozen_or_not
def test_half_precision_stays_close_and_autocast_changes_nothing(x, dtypes, frozen) -> None:
    hidden = x["hidden"].to(dtypes[0]).requires_grad_()
    weight = x["weight"].to(dtypes[1]).requires_grad_(not frozen)
    low = {k: v.to(dtypes[0]) if v.is_floating_point() else v for k, v in x.items()}
    stats = ours(hidden, weight, low, want=EVERY)
    expected = plain(
        hidden.double(), weight.double(), {k: v.double() if "ref" in k else v for k, v in low.items()}
    )
    near = 0.05 if torch.bfloat16 in dtypes else 1e-5
    leaves = [hidden] if frozen else [hidden, weight]
    got = torch.autograd.grad(sum(getattr(stats, n).sum() for n in EVERY), leaves)
    want = torch.autograd.grad(torch.stack([expected[n].sum() for n in EVERY]).sum(), leaves)
    for name in EVERY:
        assert getattr(stats, name).dtype == torch.float32
        torch.testing.assert_close(getattr(stats, name).double(), expected[name], rtol=near, atol=near)
    for g, e, leaf in zip(got, want, leaves, strict=True):
        assert g.dtype == leaf.dtype
        torch.testing.assert_close(g.double(), e.double(), rtol=near, atol=near)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = ours(hidden, weight, low, want=EVERY)
    torch.testing.assert_close(again.kl, stats.kl, rtol=0, atol=0)
    torch.testing.assert_close(again.reverse_kl, stats.reverse_kl, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_are_summed_in_float32(dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=rng).to(dtype) for n in (12, 50))
    labels, mask = torch.arange(12)[None], torch.ones(1, 12, dtype=torch.bool)
    stats: Any = token_log_probs(
        hidden[None], weight, labels, mask, -hidden[None], weight, want=WANT, block_vocab=16
    )
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    ref = (-hidden.double() @ weight.double().T).log_softmax(-1)
    # Logits of about 50 that are rounded to half precision would be wrong by 0.1.
    want = {
        "logp": logp.gather(-1, labels.T)[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "kl": (ref.exp() * (ref - logp)).sum(-1),
    }
    for name, value in want.items():
        torch.testing.assert_close(getattr(stats, name)[0].double(), value, rtol=1e-5, atol=1e-4)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[[3e4], [-3e4], [1e-4]]]).requires_grad_()
    weight = torch.linspace(-1, 1, V)[:, None].requires_grad_()
    labels, mask = torch.tensor([[0, 0, 5]]), torch.ones(1, 3, dtype=torch.bool)
    stats: Any = token_log_probs(hidden, weight, labels, mask, -hidden, weight, want=EVERY, block_vocab=4)
    sum(getattr(stats, n).sum() for n in EVERY).backward()
    assert stats.logp[0, 0].item() == pytest.approx(-6e4, rel=1e-5)
    assert stats.kl[0, 0].item() == pytest.approx(6e4, rel=1e-5)
    assert stats.reverse_kl[0, 0].item() == pytest.approx(6e4, rel=1e-5)
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_nan_stays_in_its_token(x) -> None:
    x["hidden"][0, 1] = float("nan")
    stats = ours(x["hidden"], x["weight"], x, want=EVERY)
    for name in EVERY:
        nan = getattr(stats, name).isnan()
        assert nan[0, 1] and nan.sum() == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.zeros(B, 3, dtype=torch.long)}, ["labels", "(2, 3)", "(2, 4)"]),
        ({"mask": torch.ones(B, 3, dtype=torch.bool)}, ["mask", "(2, 3)"]),
        ({"weight": torch.zeros(V, H + 1)}, ["weight", "[V, 2]"]),
        ({"ref_hidden": None}, ["ref_hidden", "kl"]),
        ({"ref_hidden": None, "want": ("reverse_kl",)}, ["ref_hidden", "reverse_kl"]),
        ({"ref_hidden": torch.zeros(B, 3, H)}, ["ref_hidden", "(2, 3, 2)"]),
        ({"ref_weight": torch.zeros(V + 1, H)}, ["ref_weight", "8", "7"]),
        ({"want": ("logp", "kll")}, ["kll", "entropy"]),
        ({"want": ("k3",)}, ["samples: 0", "1 or more"]),
        ({"softcap": -1.0}, ["softcap", "-1.0"]),
        ({"labels": torch.full((B, T), V)}, ["labels", "7", "0 to 6"]),
    ],
)
def test_bad_input(x, change, words) -> None:
    x |= {"want": WANT} | change
    del x["bias"]
    with pytest.raises(InputError) as error:
        token_log_probs(**x)
    assert all(word in str(error.value) for word in words), str(error.value)


@every_layer
@frozen_or_not
@pytest.mark.parametrize("blocks", [(2, 4), (None, None), (1, 1)], ids=str)
def test_the_collision_probability_has_no_gradient_and_leaves_the_others_alone(
    x, layer, frozen, blocks
) -> None:
    options = dict(layer)
    bias = x["bias"] if options.pop("bias", False) else None
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_(not frozen)
    expected = plain(hidden, weight, x, bias, options.get("softcap"), options.get("logit_scale", 1.0))
    found = {}
    for names in (("logp", "entropy", "kl"), ("logp", "entropy", "log_collision", "kl")):
        stats = ours(
            hidden, weight, x, bias=bias, want=names, block_tokens=blocks[0], block_vocab=blocks[1], **options
        )
        total = stats.logp.sum() + 0.3 * stats.entropy.sum() - 0.2 * stats.kl.sum()
        found[names] = (*(getattr(stats, name) for name in names[:2]), *torch.autograd.grad(total, hidden))
    assert not stats.log_collision.requires_grad
    torch.testing.assert_close(stats.log_collision, expected["log_collision"].detach())
    for before, after in zip(*found.values(), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_the_collision_probability_of_a_certain_state_is_one() -> None:
    hidden, weight = torch.eye(2)[None] * 1e4, torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    labels, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    for block in (1, 3):
        stats = token_log_probs(hidden, weight, labels, mask, want=("log_collision",), block_vocab=block)
        assert stats.log_collision is not None and stats.log_collision.tolist() == [[0.0, 0.0]]

"""One pass over the vocabulary in blocks: the sums behind log-prob, entropy, KL and their gradients.

A `Scan` keeps, per token, the running maximum, the normaliser and whatever sums the wanted outputs need (an
online softmax); all sums are shifted by the running maximum. See `blockwise` for the formulas.

Shapes: rows tokens of a block, C vocabulary block, H hidden, V vocabulary, K samples per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tbpo_ray.objectives.baseline import MAX_LOG_RATIO, k3

LOWEST = -1e30  # a running maximum to start from: finite, so that differences are never inf - inf

Layer = tuple[Tensor, Tensor, Tensor | None]  # hidden [N, H], weight [V, H], bias [V] or None


@dataclass(frozen=True)
class Plan:
    """How one call goes through the output layer.

    Attributes:
        want: outputs, in order, of logp, entropy, kl, k3, ref_logp.
        differentiable: those of them that carry a gradient.
        rows, cols: tokens and vocabulary entries in a block.
        scale, softcap: z = softcap * tanh(scale * (h W^T + b) / softcap).
        samples: reference tokens drawn per state, for k3.
        generator: where their randomness comes from.
        leave_behind: keep gradient vectors in forward; backward then recomputes nothing.
    """

    want: tuple[str, ...]
    differentiable: tuple[str, ...]
    rows: int
    cols: int
    scale: float = 1.0
    softcap: float | None = None
    samples: int = 0
    generator: torch.Generator | None = None
    save_gradients: bool = False


def blocks(size: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in at least float32; half-precision factors are multiplied as they are and summed in float32."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b).float()
    return torch.mm(a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place, a cast to b's dtype."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(product(a.to(b.dtype), b))


def logits(layer: Layer, rows: slice, cols: slice, plan: Plan) -> Tensor:
    """z of some tokens over a block of the vocabulary. [rows, C] at least float32"""
    hidden, weight, bias = layer
    z = product(hidden[rows], weight[cols].to(hidden.dtype).t())
    if bias is not None:
        z.add_(bias[cols])
    if plan.scale != 1.0:
        z.mul_(plan.scale)
    if plan.softcap is not None:
        z.div_(plan.softcap).tanh_().mul_(plan.softcap)
    return z


def softcap_slope(z: Tensor, plan: Plan) -> Tensor | None:
    """dz / d(scale * (h W^T + b)) where there is a soft cap. [rows, C]"""
    return None if plan.softcap is None else (z / plan.softcap).square_().neg_().add_(1)


def pick(z: Tensor, ids: Tensor, cols: slice, found: Tensor) -> Tensor:
    """`found` with z at the ids that lie in this block. z [rows, C], ids and found [rows, K]."""
    here = (ids >= cols.start) & (ids < cols.stop)
    return torch.where(here, z.gather(1, (ids - cols.start).clamp(0, z.shape[1] - 1)), found)


class Softmax:
    """Running maximum and normaliser of one distribution per token, all [rows, 1]."""

    def __init__(self, like: Tensor):
        self.top = like.new_full((like.shape[0], 1), LOWEST)
        self.total = like.new_zeros(like.shape[0], 1)

    def shift(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the maximum of a block and subtract it in place: z becomes z - top.

        Returns top_old - top_new and the factor exp of it that rescales earlier sums.
        """
        top = torch.maximum(self.top, z.amax(1, keepdim=True))
        step = self.top - top
        self.top = top
        z.sub_(top)
        return step, step.exp()

    @property
    def lse(self) -> Tensor:
        """log sum exp z. [rows, 1]"""
        return self.top + self.total.log()


class Scan:
    """One pass over the vocabulary for some tokens: the sums behind every wanted output.

    Attributes, all [rows, 1] unless said otherwise:
        p, q: running softmax of policy and reference.
        z_label, zq_label: their logits at the label.
        p_logp: sum of e^z z (entropy); cross: sum of e^zq (zq - z) (kl); both shifted by the maxima.
        pw, pzw, qw: sums of e^z W, e^z z W and e^zq W [rows, H], where gradient vectors are left behind.
        drawn: the reference's samples, for k3.
    """

    def __init__(self, policy: Layer, ref: Layer | None, labels: Tensor, rows: slice, plan: Plan):
        hidden, weight, _ = policy
        self.policy, self.ref, self.rows, self.plan = policy, ref, rows, plan
        self.ids = labels[rows, None]
        n, dtype = self.ids.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        self.zero = hidden.new_zeros(n, 1, dtype=dtype)
        self.z_label = self.zq_label = self.zero + torch.nan  # stays NaN for a label outside the vocabulary
        self.p_logp = self.cross = self.zero
        self.p, self.q = Softmax(self.zero), Softmax(self.zero)
        self.drawn = Reservoir(self.zero, plan) if "k3" in plan.want else None
        grads = plan.differentiable if plan.save_gradients else ()
        self.pw, self.pzw, self.qw = (
            hidden.new_zeros(n, hidden.shape[1], dtype=dtype) if needed else None
            for needed in (grads, "entropy" in grads, "kl" in grads)
        )
        for cols in blocks(weight.shape[0], plan.cols):
            self.take(cols)

    def take(self, cols: slice) -> None:
        """Add a block of the vocabulary to every sum. In place throughout: at most four [rows, C] live."""
        z = logits(self.policy, self.rows, cols, self.plan)
        self.z_label = pick(z, self.ids, cols, self.z_label)
        slope = softcap_slope(z, self.plan) if self.pw is not None else None
        zq = None if self.ref is None else logits(self.ref, self.rows, cols, self.plan)
        there = None
        if zq is not None:
            self.zq_label = pick(zq, self.ids, cols, self.zq_label)
            there = (z.clone(), zq.clone()) if self.drawn is not None else None
        step, keep = self.p.shift(z)
        if zq is not None:
            self.take_reference(zq, z, step, there, slope, cols)
        block = self.policy[1][cols]
        separate = "entropy" in self.plan.want
        e = z.exp() if separate else z.exp_()
        if separate:
            z.mul_(e)
            self.p_logp = keep * (self.p_logp + self.p.total * step) + z.sum(1, keepdim=True)
            if self.pzw is not None and self.pw is not None:
                self.pzw.addcmul_(step, self.pw).mul_(keep)
                add_product(self.pzw, sloped(z, slope), block)
        self.p.total = self.p.total * keep + e.sum(1, keepdim=True)
        if self.pw is not None:
            add_product(self.pw.mul_(keep), sloped(e, slope), block)

    def take_reference(
        self,
        zq: Tensor,
        z: Tensor,
        p_step: Tensor,
        there: tuple[Tensor, Tensor] | None,
        slope: Tensor | None,
        cols: slice,
    ) -> None:
        """The reference's half of `take`. zq: its raw logits; z: the policy's, shifted. [rows, C]"""
        step, keep = self.q.shift(zq)
        separate = "kl" in self.plan.want
        e = zq.exp() if separate else zq.exp_()
        if separate:
            cross = zq.sub_(z).mul_(e).sum(1, keepdim=True)
            self.cross = keep * (self.cross + self.q.total * (step - p_step)) + cross
        mass = e.sum(1, keepdim=True)
        self.q.total = self.q.total * keep + mass
        if self.drawn is not None:
            assert there is not None
            self.drawn.offer(e, mass / self.q.total, there, cols)
        if self.qw is not None:
            add_product(self.qw.mul_(keep), sloped(e, slope), self.policy[1][cols])

    def outputs(self) -> dict[str, Tensor]:
        """The wanted outputs. [rows] each"""
        p, q = self.p, self.q
        found = {"logp": self.z_label - p.lse}
        if "entropy" in self.plan.want:
            found["entropy"] = p.total.log() - self.p_logp / p.total
        if self.ref is not None:
            found["ref_logp"] = self.zq_label - q.lse
            found["kl"] = self.cross / q.total - q.total.log() + p.total.log()
        if self.drawn is not None:
            log_rho = self.drawn.log_rho(p.lse, q.lse)
            found["k3"] = k3(log_rho).mean(1, keepdim=True)
        return {name: found[name].squeeze(1) for name in self.plan.want}

    def pulls(self) -> tuple[Tensor, Tensor] | None:
        """Ids of the drawn tokens and (rho_i - 1)/K of each, what k3's gradient needs. [rows, K] both"""
        if self.drawn is None:
            return None
        log_rho = self.drawn.log_rho(self.p.lse, self.q.lse)
        rho = torch.where(log_rho > MAX_LOG_RATIO, 0, log_rho.exp())  # the clamp's gradient is 0
        return self.drawn.ids, (rho - 1) / log_rho.shape[1]

    def vectors(self) -> list[Tensor]:
        """d output / d hidden of each differentiable output, in their order. [rows, H] each"""
        assert self.pw is not None
        weight = self.policy[1]
        mean_p = self.pw / self.p.total  # sum p W
        found = {}
        for name in self.plan.differentiable:
            if name == "logp":
                found[name] = self.label_slope(self.z_label) * weight[self.ids[:, 0]] - mean_p
            elif name == "entropy":
                assert self.pzw is not None
                entropy = self.p.total.log() - self.p_logp / self.p.total
                found[name] = -(self.pzw / self.p.total + (entropy - self.p.total.log()) * mean_p)
            elif name == "kl":
                assert self.qw is not None
                found[name] = mean_p - self.qw / self.q.total
            elif name == "k3":
                assert self.drawn is not None
                ids, pull = self.pulls()  # type: ignore[misc]
                found[name] = -pull.sum(1, keepdim=True) * mean_p
                for k in range(ids.shape[1]):
                    slope = self.label_slope(self.drawn.z[:, k, None])
                    found[name] += pull[:, k, None] * slope * weight[ids[:, k]]
        return [found[name] * self.plan.scale for name in self.plan.differentiable]

    def label_slope(self, z: Tensor) -> Tensor:
        """The soft cap's slope at single logits; 1 without a cap. Same shape."""
        slope = softcap_slope(z, self.plan)
        return torch.ones_like(z) if slope is None else slope


def sloped(e: Tensor, slope: Tensor | None) -> Tensor:
    """e times the soft cap's slope, in place."""
    return e if slope is None else e.mul_(slope)


class Reservoir:
    """K tokens drawn from each reference distribution while it streams by in blocks.

    A draw is replaced by one from the new block with probability (mass of the block) / (mass so far),
    which leaves each of the K an exact, independent sample of the whole distribution.
    """

    def __init__(self, zero: Tensor, plan: Plan):
        n, self.generator = zero.shape[0], plan.generator
        self.ids = torch.zeros(n, plan.samples, dtype=torch.long, device=zero.device)
        self.z = zero.expand(n, plan.samples)
        self.zq = self.z

    def uniform(self) -> Tensor:
        """Fresh uniform numbers in [0, 1). [rows, K]"""
        return torch.rand(self.z.shape, generator=self.generator, device=self.z.device, dtype=self.z.dtype)

    def offer(self, e: Tensor, share: Tensor, there: tuple[Tensor, Tensor], cols: slice) -> None:
        """A block with unnormalised probabilities e, its share of the mass so far [rows, 1], and logits."""
        cumulative = e.cumsum(1)
        at = torch.searchsorted(cumulative, self.uniform() * cumulative[:, -1:], right=True)
        at.clamp_(max=e.shape[1] - 1)
        accept = self.uniform() < share
        self.ids = torch.where(accept, at + cols.start, self.ids)
        self.z = torch.where(accept, there[0].gather(1, at), self.z)
        self.zq = torch.where(accept, there[1].gather(1, at), self.zq)

    def log_rho(self, lse: Tensor, ref_lse: Tensor) -> Tensor:
        """log p(v_i) - log q(v_i) of the drawn tokens. [rows, K]"""
        return (self.z - lse) - (self.zq - ref_lse)

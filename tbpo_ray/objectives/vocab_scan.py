"""One pass over the vocabulary in blocks: the sums behind log-prob, entropy, KL and their gradients.

A `Scan` keeps the running maximum of each token, its normalizer, and the sums that the requested outputs need
(an online softmax); all sums are shifted by the running maximum. See `blockwise` for the formulas.

Shapes: rows tokens of a block, C vocabulary block, H hidden, V vocabulary, K samples per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tbpo_ray.objectives.baseline import MAX_LOG_RATIO, k3

LOWEST = -1e30  # a running maximum to start from: finite, so that differences are never inf - inf


@dataclass(frozen=True)
class LayerInputs:
    """Hidden states and the output layer that they go through.

    Attributes:
        hidden: [N, H]; [..., T, H] before the tokens are selected.
        weight: [V, H].
        bias: [V], or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def layer_learns(self) -> bool:
        """Whether weight or bias need a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def detach(self) -> LayerInputs:
        """The same values without a gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return LayerInputs(self.hidden.detach(), self.weight.detach(), bias)

    def select(self, index: Tensor) -> LayerInputs:
        """The hidden states of some tokens, counted over all leading dimensions."""
        flat = self.hidden.reshape(-1, self.hidden.shape[-1])
        return LayerInputs(flat.index_select(0, index), self.weight, self.bias)


@dataclass(frozen=True)
class ScanOptions:
    """How one call goes through the output layer.

    Attributes:
        outputs: requested outputs, in order, of logp, entropy, log_collision, kl, reverse_kl, k3,
            ref_logp.
        differentiable: those of them that carry a gradient.
        rows, cols: tokens and vocabulary entries in a block.
        scale, softcap: z = softcap * tanh(scale * (h W^T + b) / softcap).
        samples: reference tokens drawn per state, for k3.
        generator: source of their randomness.
        save_gradients: compute gradient vectors in forward; backward then recomputes nothing.
    """

    outputs: tuple[str, ...]
    differentiable: tuple[str, ...]
    rows: int
    cols: int
    scale: float
    softcap: float | None
    samples: int
    generator: torch.Generator | None
    save_gradients: bool


def blocks(size: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in at least float32; half-precision factors are multiplied as they are and summed in float32."""
    if a.dtype in (torch.bfloat16, torch.float16):
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32)
        # On the CPU, mm has no `out_dtype` and would round each sum to half precision.
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place, a cast to b's dtype."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(product(a.to(b.dtype), b))


def logits(layer: LayerInputs, rows: slice, cols: slice, options: ScanOptions) -> Tensor:
    """z of some tokens over a block of the vocabulary. [rows, C] at least float32"""
    z = product(layer.hidden[rows], layer.weight[cols].to(layer.hidden.dtype).t())
    if layer.bias is not None:
        z.add_(layer.bias[cols])
    if options.scale != 1.0:
        z.mul_(options.scale)
    if options.softcap is not None:
        z.div_(options.softcap).tanh_().mul_(options.softcap)
    return z


def softcap_slope(z: Tensor, options: ScanOptions) -> Tensor | None:
    """dz / d(scale * (h W^T + b)) where there is a soft cap. [rows, C]"""
    return None if options.softcap is None else (z / options.softcap).square_().neg_().add_(1)


def gather_in_block(z: Tensor, ids: Tensor, cols: slice, found: Tensor) -> Tensor:
    """`found`, updated by z at the ids that belong to this block. z [rows, C], ids and found [rows, K]."""
    here = (ids >= cols.start) & (ids < cols.stop)
    return torch.where(here, z.gather(1, (ids - cols.start).clamp(0, z.shape[1] - 1)), found)


class Softmax:
    """Running maximum and normalizer of one distribution per token, all [rows, 1]."""

    def __init__(self, like: Tensor):
        self.top = like.new_full((like.shape[0], 1), LOWEST)
        self.total = like.new_zeros(like.shape[0], 1)

    def shift(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Update the maximum by a block and subtract it in place: z becomes z - top.

        Returns top_old - top_new, and its exponential, which rescales earlier sums.
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
    """One pass over the vocabulary for some tokens: the sums behind every requested output.

    Attributes, all [rows, 1] unless stated otherwise:
        p, q: running softmax of policy and reference.
        z_label, zq_label: their logits at the label.
        p_squared: sum of e^2z (log_collision).
        p_logp: sum of e^z z (entropy); cross: sum of e^zq (zq - z) (kl); reverse_cross: sum of e^z (z - zq)
            (reverse_kl); all shifted by the maxima.
        pw, pzw, qw, pgw: sums of e^z W, e^z z W, e^zq W and e^z (z - zq) W [rows, H], for gradient vectors
            that forward saves.
        drawn: the reference's samples, for k3.
    """

    def __init__(
        self,
        policy: LayerInputs,
        ref: LayerInputs | None,
        labels: Tensor,
        rows: slice,
        options: ScanOptions,
    ):
        hidden = policy.hidden
        self.policy, self.ref, self.rows, self.options = policy, ref, rows, options
        self.ids = labels[rows, None]
        n, dtype = self.ids.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        self.zero = hidden.new_zeros(n, 1, dtype=dtype)
        # A label outside the vocabulary is in no block, so its log-prob stays NaN.
        self.z_label = self.zq_label = self.zero + torch.nan
        self.p_logp = self.p_squared = self.cross = self.reverse_cross = self.zero
        self.p, self.q = Softmax(self.zero), Softmax(self.zero)
        self.drawn = Reservoir(self.zero, options) if "k3" in options.outputs else None
        grads = options.differentiable if options.save_gradients else ()
        self.pw, self.pzw, self.qw, self.pgw = (
            hidden.new_zeros(n, hidden.shape[1], dtype=dtype) if needed else None
            for needed in (grads, "entropy" in grads, "kl" in grads, "reverse_kl" in grads)
        )
        for cols in blocks(policy.weight.shape[0], options.cols):
            self.add_block(cols)

    def add_block(self, cols: slice) -> None:
        """Add a block of the vocabulary to every sum, in place: at most four [rows, C] exist at a time, five
        with reverse_kl."""
        z = logits(self.policy, self.rows, cols, self.options)
        self.z_label = gather_in_block(z, self.ids, cols, self.z_label)
        slope = softcap_slope(z, self.options) if self.pw is not None else None
        zq = None if self.ref is None else logits(self.ref, self.rows, cols, self.options)
        raw = None
        if zq is not None:
            self.zq_label = gather_in_block(zq, self.ids, cols, self.zq_label)
            raw = (z.clone(), zq.clone()) if self.drawn is not None else None
        step, keep = self.p.shift(z)
        q_before = self.q.top
        gap = None
        if zq is not None:
            gap = self.add_reference_block(zq, z, step, raw, slope, cols)
            del zq
        block = self.policy.weight[cols]
        separate = "entropy" in self.options.outputs
        e = z.exp() if separate else z.exp_()
        if "log_collision" in self.options.outputs:
            self.p_squared = self.p_squared * keep**2 + torch.linalg.vecdot(e, e)[:, None]
        if gap is not None:
            self.add_gap(gap.mul_(e), step - (q_before - self.q.top), keep, slope, block)
        if separate:
            z.mul_(e)
            self.p_logp = keep * (self.p_logp + self.p.total * step) + z.sum(1, keepdim=True)
            if self.pzw is not None and self.pw is not None:
                self.pzw.addcmul_(step, self.pw).mul_(keep)
                add_product(self.pzw, apply_slope(z, slope), block)
        self.p.total = self.p.total * keep + e.sum(1, keepdim=True)
        if self.pw is not None:
            add_product(self.pw.mul_(keep), apply_slope(e, slope), block)

    def add_gap(self, e_gap: Tensor, step: Tensor, keep: Tensor, slope: Tensor | None, block: Tensor) -> None:
        """Add e^z (z - zq) of a block, [rows, C]; `step` is by how much z - zq of earlier blocks shifts."""
        total = e_gap.sum(1, keepdim=True)
        self.reverse_cross = keep * (self.reverse_cross + self.p.total * step) + total
        if self.pgw is not None and self.pw is not None:
            self.pgw.addcmul_(step, self.pw).mul_(keep)
            add_product(self.pgw, apply_slope(e_gap, slope), block)

    def add_reference_block(
        self,
        zq: Tensor,
        z: Tensor,
        p_step: Tensor,
        raw: tuple[Tensor, Tensor] | None,
        slope: Tensor | None,
        cols: slice,
    ) -> Tensor | None:
        """The reference's half of `add_block`. zq: its raw logits; z: the policy's, shifted. [rows, C]

        Returns z - zq, both shifted, if reverse_kl needs it.
        """
        step, keep = self.q.shift(zq)
        gap = z - zq if "reverse_kl" in self.options.outputs else None
        separate = "kl" in self.options.outputs
        e = zq.exp() if separate else zq.exp_()
        if separate:
            cross = zq.sub_(z).mul_(e).sum(1, keepdim=True)
            self.cross = keep * (self.cross + self.q.total * (step - p_step)) + cross
        mass = e.sum(1, keepdim=True)
        self.q.total = self.q.total * keep + mass
        if self.drawn is not None:
            assert raw is not None
            self.drawn.offer(e, mass / self.q.total, raw, cols)
        if self.qw is not None:
            add_product(self.qw.mul_(keep), apply_slope(e, slope), self.policy.weight[cols])
        return gap

    def outputs(self) -> dict[str, Tensor]:
        """The requested outputs. [rows] each"""
        p, q = self.p, self.q
        found = {"logp": self.z_label - p.lse}
        if "entropy" in self.options.outputs:
            found["entropy"] = p.total.log() - self.p_logp / p.total
        if "log_collision" in self.options.outputs:
            found["log_collision"] = self.p_squared.log() - 2 * p.total.log()
        if self.ref is not None:
            found["ref_logp"] = self.zq_label - q.lse
            found["kl"] = self.cross / q.total - q.total.log() + p.total.log()
        if "reverse_kl" in self.options.outputs:
            found["reverse_kl"] = self.reverse_cross / p.total - p.total.log() + q.total.log()
        if self.drawn is not None:
            log_rho = self.drawn.log_rho(p.lse, q.lse)
            found["k3"] = k3(log_rho).mean(1, keepdim=True)
        return {name: found[name].squeeze(1) for name in self.options.outputs}

    def sample_gradients(self, drawn: Reservoir) -> Tensor:
        """(rho_i - 1) / K of each drawn token, which k3's gradient needs. [rows, K]"""
        log_rho = drawn.log_rho(self.p.lse, self.q.lse)
        rho = torch.where(log_rho > MAX_LOG_RATIO, 0, log_rho.exp())  # the gradient of the clamp in k3 is 0
        return (rho - 1) / log_rho.shape[1]

    def hidden_gradients(self) -> list[Tensor]:
        """d output / d hidden of each differentiable output, in their order. [rows, H] each"""
        assert self.pw is not None
        mean_p = self.pw / self.p.total  # sum p W
        formulas = {
            "logp": self._logp_gradient,
            "entropy": self._entropy_gradient,
            "kl": self._kl_gradient,
            "reverse_kl": self._reverse_kl_gradient,
            "k3": self._k3_gradient,
        }
        return [formulas[name](mean_p) * self.options.scale for name in self.options.differentiable]

    def _logp_gradient(self, mean_p: Tensor) -> Tensor:
        return self.label_slope(self.z_label) * self.policy.weight[self.ids[:, 0]] - mean_p

    def _entropy_gradient(self, mean_p: Tensor) -> Tensor:
        assert self.pzw is not None
        entropy = self.p.total.log() - self.p_logp / self.p.total
        return -(self.pzw / self.p.total + (entropy - self.p.total.log()) * mean_p)

    def _kl_gradient(self, mean_p: Tensor) -> Tensor:
        assert self.qw is not None
        return mean_p - self.qw / self.q.total

    def _reverse_kl_gradient(self, mean_p: Tensor) -> Tensor:
        assert self.pgw is not None
        mean_gap = self.reverse_cross / self.p.total
        return self.pgw / self.p.total - mean_gap * mean_p

    def _k3_gradient(self, mean_p: Tensor) -> Tensor:
        assert self.drawn is not None
        on_drawn = self.sample_gradients(self.drawn)
        total = -on_drawn.sum(1, keepdim=True) * mean_p
        for k in range(on_drawn.shape[1]):
            slope = self.label_slope(self.drawn.z[:, k, None])
            total += on_drawn[:, k, None] * slope * self.policy.weight[self.drawn.ids[:, k]]
        return total

    def label_slope(self, z: Tensor) -> Tensor:
        """The soft cap's slope at single logits; 1 without a cap. Same shape."""
        slope = softcap_slope(z, self.options)
        return torch.ones_like(z) if slope is None else slope


def apply_slope(e: Tensor, slope: Tensor | None) -> Tensor:
    """e times the soft cap's slope, in place."""
    return e if slope is None else e.mul_(slope)


class Reservoir:
    """K tokens drawn from each reference distribution, whose blocks come one after another.

    A draw is replaced by one from the new block with probability (mass of the block) / (mass so far), which
    makes each of the K an exact, independent sample of the whole distribution.
    """

    def __init__(self, zero: Tensor, options: ScanOptions):
        n, self.generator = zero.shape[0], options.generator
        self.ids = torch.zeros(n, options.samples, dtype=torch.long, device=zero.device)
        self.z = zero.expand(n, options.samples)
        self.zq = self.z

    def uniform(self) -> Tensor:
        """Fresh uniform numbers in [0, 1). [rows, K]"""
        return torch.rand(self.z.shape, generator=self.generator, device=self.z.device, dtype=self.z.dtype)

    def offer(self, e: Tensor, share: Tensor, raw: tuple[Tensor, Tensor], cols: slice) -> None:
        """Draw from a block with unnormalized probabilities e and its share of the mass so far. [rows, 1]"""
        cumulative = e.cumsum(1)
        at = torch.searchsorted(cumulative, self.uniform() * cumulative[:, -1:], right=True)
        at.clamp_(max=e.shape[1] - 1)
        accept = self.uniform() < share
        self.ids = torch.where(accept, at + cols.start, self.ids)
        self.z = torch.where(accept, raw[0].gather(1, at), self.z)
        self.zq = torch.where(accept, raw[1].gather(1, at), self.zq)

    def log_rho(self, lse: Tensor, ref_lse: Tensor) -> Tensor:
        """log p(v_i) - log q(v_i) of the drawn tokens. [rows, K]"""
        return (self.z - lse) - (self.zq - ref_lse)

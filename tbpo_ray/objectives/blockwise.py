"""Token statistics through the output layer in blocks: [tokens, vocabulary] never exists.

One scan over blocks of the vocabulary (`vocab_scan`) gives every output. With z the logits, p = softmax(z),
q the reference's, y the label and v_i tokens drawn from q:

    logp    = z_y - lse(z)                          dlogp/dz    = onehot(y) - p
    entropy = -sum p log p                          dentropy/dz = -p (log p + entropy)
    log_collision = log sum p^2                     without a gradient
    kl      = sum q (log q - log p)                 dkl/dz      = p - q
    reverse = sum p (log p - log q)                 dreverse/dz = p (log p - log q - reverse)
    k3      = mean_i (rho_i - 1 - log rho_i)        dk3/dz      = mean_i (rho_i - 1) (onehot(v_i) - p)
              rho_i = p(v_i) / q(v_i)

There are two backward passes. With weight and bias frozen (LoRA on the backbone), the scan also sums p W,
q W, p log p W and p (log p - log q) W, which gives each output's gradient as one vector in hidden space per
token; backward recomputes nothing. Otherwise backward goes through the blocks again and writes each block of
the weight's gradient once.

Shapes: N selected tokens, C vocabulary block, H hidden, V vocabulary, K samples per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tbpo_ray.objectives.vocab_scan import (
    LayerInputs,
    Scan,
    ScanOptions,
    add_product,
    apply_slope,
    blocks,
    logits,
    product,
    softcap_slope,
)


class TokenStatistics(torch.autograd.Function):
    """[outputs, N] statistics; differentiable in the policy's hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ref: LayerInputs | None,
        options: ScanOptions,
    ) -> Tensor:
        policy = LayerInputs(hidden, weight, bias)
        n, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        out = hidden.new_empty(len(options.outputs), n, dtype=dtype)
        vectors = [torch.empty_like(hidden) for _ in options.differentiable if options.save_gradients]
        # lse, the reference's lse, entropy, reverse KL: what the recomputation in backward starts from
        normalizers = hidden.new_zeros(4 if "reverse_kl" in options.outputs else 3, n, dtype=dtype)
        k = options.samples if "k3" in options.outputs else 0
        drawn = torch.zeros(n, k, dtype=torch.long, device=hidden.device)
        on_drawn = hidden.new_zeros(n, k, dtype=dtype)
        # The scan chooses its own dtypes; autocast would lower those of its products.
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in blocks(n, options.rows):
                scan = Scan(policy, ref, labels, rows, options)
                values = scan.outputs()
                for i, name in enumerate(options.outputs):
                    out[i, rows] = values[name]
                if options.save_gradients:
                    for whole, part in zip(vectors, scan.hidden_gradients(), strict=True):
                        whole[rows] = part
                    continue
                normalizers[0, rows] = scan.p.lse[:, 0]
                if ref is not None:
                    normalizers[1, rows] = scan.q.lse[:, 0]
                if "entropy" in values:
                    normalizers[2, rows] = values["entropy"]
                if "reverse_kl" in values:
                    normalizers[3, rows] = values["reverse_kl"]
                if scan.drawn is not None:
                    drawn[rows], on_drawn[rows] = scan.drawn.ids, scan.sample_gradients(scan.drawn)
        ctx.options = options
        if options.save_gradients:
            ctx.save_for_backward(*vectors)
        elif options.differentiable:
            reference = (None, None, None) if ref is None else (ref.hidden, ref.weight, ref.bias)
            ctx.save_for_backward(hidden, weight, bias, *reference, labels, normalizers, drawn, on_drawn)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        options: ScanOptions = ctx.options
        grads = {name: grad_out[options.outputs.index(name), :, None] for name in options.differentiable}
        with torch.autocast(grad_out.device.type, enabled=False):
            if options.save_gradients:
                return weighted_sum(list(grads.values()), ctx.saved_tensors), *[None] * 5
            gradient = LogitGradient.from_saved(options, grads, ctx.saved_tensors)
            return *recompute(gradient, ctx.needs_input_grad[:3]), *[None] * 3


def weighted_sum(coefficients: list[Tensor], vectors: tuple[Tensor, ...]) -> Tensor:
    """sum_k g_k v_k with g_k [N, 1], v_k [N, H]; in the vectors' dtype."""
    total = coefficients[0] * vectors[0]
    for g, v in zip(coefficients[1:], vectors[1:], strict=True):
        total.addcmul_(g, v.to(total.dtype))
    return total.to(vectors[0].dtype)


@dataclass(frozen=True)
class LogitGradient:
    """The gradient of the loss in the logits, block by block.

    Attributes, [N, 1] unless stated otherwise:
        lse, ref_lse, entropy, reverse_kl: normalizers of policy and reference, and two outputs; the last is
            None if it was not requested.
        g_entropy, g_kl, g_reverse_kl: gradients of the loss in these outputs; None without such an output.
        on_p: total coefficient of p.
        points, on_points: token ids with a term of their own (label and samples), and its value. [N, 1 + K]
    """

    policy: LayerInputs
    ref: LayerInputs | None
    options: ScanOptions
    lse: Tensor
    ref_lse: Tensor
    entropy: Tensor
    reverse_kl: Tensor | None
    g_entropy: Tensor | None
    g_kl: Tensor | None
    g_reverse_kl: Tensor | None
    on_p: Tensor
    points: Tensor
    on_points: Tensor

    @classmethod
    def from_saved(
        cls, options: ScanOptions, grads: dict[str, Tensor], saved: tuple[Any, ...]
    ) -> LogitGradient:
        """Combine the gradients of the outputs with what forward saved."""
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, normalizers, drawn, on_drawn = saved
        lse, ref_lse, entropy, *rest = normalizers.unsqueeze(-1)
        zero = torch.zeros_like(lse)
        scaled = {name: grad * options.scale for name, grad in grads.items()}
        g_logp, g_k3 = scaled.get("logp", zero), scaled.get("k3", zero)
        return cls(
            policy=LayerInputs(hidden, weight, bias),
            ref=None if ref_hidden is None else LayerInputs(ref_hidden, ref_weight, ref_bias),
            options=options,
            lse=lse,
            ref_lse=ref_lse,
            entropy=entropy,
            reverse_kl=rest[0] if rest else None,
            g_entropy=scaled.get("entropy"),
            g_kl=scaled.get("kl"),
            g_reverse_kl=scaled.get("reverse_kl"),
            on_p=scaled.get("kl", zero) - g_logp - g_k3 * on_drawn.sum(1, keepdim=True),
            points=torch.cat([labels[:, None], drawn], 1),
            on_points=torch.cat([g_logp, g_k3 * on_drawn], 1),
        )

    def block(self, rows: slice, cols: slice) -> Tensor:
        """The gradient in h W^T + b of some tokens over a block of the vocabulary. [rows, C]"""
        z = logits(self.policy, rows, cols, self.options)
        slope = softcap_slope(z, self.options)
        reverse_dz = self._reverse_kl_block(z, rows, cols) if self.g_reverse_kl is not None else None
        # In place from here on, so that no more than three [rows, C] exist at a time.
        if self.g_entropy is not None:
            p = z.sub_(self.lse[rows]).exp()
            factor = z.add_(self.entropy[rows]).mul_(-self.g_entropy[rows]).add_(self.on_p[rows])
            dz = p.mul_(factor)
        else:
            dz = z.sub_(self.lse[rows]).exp_().mul_(self.on_p[rows])
        if reverse_dz is not None:
            dz.add_(reverse_dz)
            del reverse_dz
        if self.g_kl is not None:
            assert self.ref is not None
            q = logits(self.ref, rows, cols, self.options).sub_(self.ref_lse[rows]).exp_()
            dz.addcmul_(q, self.g_kl[rows], value=-1)
            del q
        add_points(dz, self.points[rows], self.on_points[rows], cols)
        return apply_slope(dz, slope)

    def _reverse_kl_block(self, z: Tensor, rows: slice, cols: slice) -> Tensor:
        """g p (log p - log q - reverse_kl), from the policy's logits z, which stay as they are. [rows, C]"""
        assert self.ref is not None and self.reverse_kl is not None and self.g_reverse_kl is not None
        zq = logits(self.ref, rows, cols, self.options)
        gap = zq.neg_().add_(z).add_(self.ref_lse[rows] - self.lse[rows] - self.reverse_kl[rows])
        return gap.mul_((z - self.lse[rows]).exp_()).mul_(self.g_reverse_kl[rows])


def recompute(
    gradient: LogitGradient, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in hidden, weight and bias, going through the blocks again.

    Vocabulary blocks in the outer loop, token blocks in the inner one: each block of the weight's gradient is
    written once.
    """
    hidden, weight, bias = gradient.policy.hidden, gradient.policy.weight, gradient.policy.bias
    dtype = gradient.lse.dtype
    hidden_grad = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
    weight_grad = empty_gradient(weight, len(hidden)) if needs[1] else None
    bias_grad = torch.zeros_like(bias) if needs[2] and bias is not None else None

    # With one dtype throughout, products are written straight into the weight's gradient.
    direct = hidden.dtype == weight.dtype == dtype

    for cols in blocks(weight.shape[0], gradient.options.cols):
        block = weight[cols].to(hidden.dtype)
        block_grad: Tensor | None = None
        for rows in blocks(len(hidden), gradient.options.rows):
            dz = gradient.block(rows, cols)
            if bias_grad is not None:
                bias_grad[cols] += dz.sum(0).to(bias_grad.dtype)
            dz = dz.to(hidden.dtype)
            if hidden_grad is not None:
                add_product(hidden_grad[rows], dz, block)
            if weight_grad is not None:
                out = weight_grad[cols] if direct else None
                block_grad = accumulate(block_grad, dz.t(), hidden[rows], out)
            del dz
        if weight_grad is not None and block_grad is not None and not direct:
            weight_grad[cols] = block_grad
    return None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, bias_grad


def empty_gradient(weight: Tensor, tokens: int) -> Tensor:
    """A tensor for a gradient of which every block is written, unless there are no tokens: then zeros."""
    return torch.empty_like(weight) if tokens else torch.zeros_like(weight)


def accumulate(total: Tensor | None, a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """Add a @ b to the total; the first product is written to `out` if it is given."""
    if total is not None:
        add_product(total, a, b)
        return total
    return product(a, b) if out is None else torch.mm(a, b, out=out)


def add_points(dz: Tensor, ids: Tensor, values: Tensor, cols: slice) -> None:
    """dz[n, ids[n, k]] += values[n, k] for the ids in this block, in place. dz [rows, C]"""
    here = (ids >= cols.start) & (ids < cols.stop)
    at = (ids - cols.start).clamp(0, dz.shape[1] - 1)
    dz.scatter_add_(1, at, torch.where(here, values, 0))

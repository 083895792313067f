"""Token statistics through the output layer in blocks: [tokens, vocabulary] never exists.

One scan over blocks of the vocabulary (`vocab_scan`) gives every output. With z the logits, p = softmax(z),
q the reference's, y the label and v_i tokens drawn from q:

    logp    = z_y - lse(z)                          dlogp/dz    = onehot(y) - p
    entropy = -sum p log p                          dentropy/dz = -p (log p + entropy)
    kl      = sum q (log q - log p)                 dkl/dz      = p - q
    k3      = mean_i (rho_i - 1 - log rho_i)        dk3/dz      = mean_i (rho_i - 1) (onehot(v_i) - p)
              rho_i = p(v_i) / q(v_i)

Backward has two ways. When weight and bias are frozen (LoRA on the backbone), the scan has also summed
p W, q W and p log p W, so that each output leaves one vector in hidden space per token, its gradient, and
backward recomputes nothing. Otherwise backward goes through the blocks again, with each block of the
weight's gradient written once.

Shapes: N selected tokens, C vocabulary block, H hidden, V vocabulary, K samples per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tbpo_ray.objectives.vocab_scan import (
    Plan,
    Scan,
    add_product,
    blocks,
    logits,
    product,
    sloped,
    softcap_slope,
)


class TokenStatistics(torch.autograd.Function):
    """[len(want), N] outputs of a plan; differentiable in the policy's hidden states, weight and bias."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, plan: Plan):
        policy = (hidden, weight, bias)
        ref = None if ref_hidden is None else (ref_hidden, ref_weight, ref_bias)
        n, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        out = hidden.new_empty(len(plan.want), n, dtype=dtype)
        vectors = [torch.empty_like(hidden) for _ in plan.differentiable if plan.save_gradients]
        # lse, reference's lse, entropy: what the recomputation in backward starts from
        normals = hidden.new_zeros(3, n, dtype=dtype)
        k = plan.samples if "k3" in plan.want else 0
        drawn = torch.zeros(n, k, dtype=torch.long, device=hidden.device)
        pull = hidden.new_zeros(n, k, dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in blocks(n, plan.rows):
                found = Scan(policy, ref, labels, rows, plan)
                values = found.outputs()
                for i, name in enumerate(plan.want):
                    out[i, rows] = values[name]
                if plan.save_gradients:
                    for whole, part in zip(vectors, found.vectors(), strict=True):
                        whole[rows] = part
                    continue
                normals[0, rows] = found.p.lse[:, 0]
                if ref is not None:
                    normals[1, rows] = found.q.lse[:, 0]
                if "entropy" in values:
                    normals[2, rows] = values["entropy"]
                if k:
                    drawn[rows], pull[rows] = found.pulls()  # type: ignore[misc]
        ctx.plan = plan
        if plan.save_gradients:
            ctx.save_for_backward(*vectors)
        elif plan.differentiable:
            ctx.save_for_backward(
                hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, normals, drawn, pull
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        plan: Plan = ctx.plan
        grads = {name: grad_out[plan.want.index(name), :, None] for name in plan.differentiable}
        with torch.autocast(grad_out.device.type, enabled=False):
            if plan.save_gradients:
                return weighted_sum(list(grads.values()), ctx.saved_tensors), *[None] * 7
            return *recompute(plan, grads, ctx.needs_input_grad[:3], *ctx.saved_tensors), *[None] * 5


def weighted_sum(coefficients: list[Tensor], vectors: tuple[Tensor, ...]) -> Tensor:
    """sum_k g_k v_k with g_k [N, 1], v_k [N, H]; in the vectors' dtype."""
    total = coefficients[0] * vectors[0]
    for g, v in zip(coefficients[1:], vectors[1:], strict=True):
        total.addcmul_(g, v.to(total.dtype))
    return total.to(vectors[0].dtype)


def recompute(
    plan: Plan, grads: dict[str, Tensor], needs: tuple[bool, bool, bool], *saved: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to hidden, weight and bias, going through the blocks again.

    Vocabulary blocks outside, token blocks inside: each block of the weight's gradient is written once.
    """
    hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias, normals, drawn, pull = saved
    assert hidden is not None and weight is not None and labels is not None
    assert normals is not None and drawn is not None and pull is not None
    policy = (hidden, weight, bias)
    ref = None if ref_hidden is None or ref_weight is None else (ref_hidden, ref_weight, ref_bias)
    lse, ref_lse, entropy = normals.unsqueeze(-1)
    zero = torch.zeros_like(lse)
    g_logp, g_entropy, g_kl, g_k3 = (
        grads[name] * plan.scale if name in grads else zero for name in ("logp", "entropy", "kl", "k3")
    )
    on_p = g_kl - g_logp - g_k3 * pull.sum(1, keepdim=True)
    points = torch.cat([labels[:, None], drawn], 1)
    on_points = torch.cat([g_logp, g_k3 * pull], 1)
    hidden_grad = torch.zeros_like(hidden, dtype=normals.dtype) if needs[0] else None
    weight_grad = torch.zeros_like(weight) if needs[1] and not len(hidden) else None
    if needs[1] and len(hidden):
        weight_grad = torch.empty_like(weight)
    bias_grad = torch.zeros_like(bias) if needs[2] and bias is not None else None

    direct = hidden.dtype == weight.dtype == normals.dtype  # products can be written where they belong

    for cols in blocks(weight.shape[0], plan.cols):
        block = weight[cols].to(hidden.dtype)
        block_grad: Tensor | None = None
        for rows in blocks(len(hidden), plan.rows):
            z = logits(policy, rows, cols, plan)
            slope = softcap_slope(z, plan)
            if "entropy" in grads:
                p = z.sub_(lse[rows]).exp()
                dz = p.mul_(z.add_(entropy[rows]).mul_(-g_entropy[rows]).add_(on_p[rows]))
            else:
                dz = z.sub_(lse[rows]).exp_().mul_(on_p[rows])
            if "kl" in grads:
                assert ref is not None
                q = logits(ref, rows, cols, plan).sub_(ref_lse[rows]).exp_()
                dz.addcmul_(q, g_kl[rows], value=-1)
                del q
            add_points(dz, points[rows], on_points[rows], cols)
            dz = sloped(dz, slope)
            del z, slope
            if bias_grad is not None:
                bias_grad[cols] += dz.sum(0).to(bias_grad.dtype)
            dz = dz.to(hidden.dtype)
            if hidden_grad is not None:
                add_product(hidden_grad[rows], dz, block)
            if weight_grad is None:
                continue
            if block_grad is not None:
                add_product(block_grad, dz.t(), hidden[rows])
            elif direct:
                block_grad = torch.mm(dz.t(), hidden[rows], out=weight_grad[cols])
            else:
                block_grad = product(dz.t(), hidden[rows])
            del dz
        if weight_grad is not None and block_grad is not None and not direct:
            weight_grad[cols] = block_grad
    return None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, bias_grad


def add_points(dz: Tensor, ids: Tensor, values: Tensor, cols: slice) -> None:
    """dz[n, ids[n, k]] += values[n, k] for the ids in this block, in place. dz [rows, C]"""
    here = (ids >= cols.start) & (ids < cols.stop)
    at = (ids - cols.start).clamp(0, dz.shape[1] - 1)
    dz.scatter_add_(1, at, torch.where(here, values, 0))

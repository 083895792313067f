"""Log-prob, entropy and KL of answer tokens from hidden states, through the output layer in blocks.

Shapes: B pairs (or rows), T tokens, H hidden, V vocabulary, N tokens selected by the mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tbpo_ray.errors import InputError
from tbpo_ray.objectives.blockwise import TokenStatistics
from tbpo_ray.objectives.vocab_scan import Plan

WANTS = ("logp", "entropy", "kl", "k3", "ref_logp")
NEED_REFERENCE = ("kl", "k3", "ref_logp")
# Bytes of float32 logits in a block, and the most tokens in one. On the CPU a block stays in cache and
# below the size at which the allocator would map (and fault in) fresh pages for it every time; on an
# accelerator it has to be large enough to fill the device.
CPU_BLOCK = (4 << 20, 1024)
DEVICE_BLOCK = (128 << 20, 4096)


@dataclass
class TokenStats:
    """Per-token statistics in nats, [B, T] float32 (float64 for float64 input), 0 outside the mask.

    Args:
        logp: log pi(label | state).
        entropy: of pi(. | state).
        kl: KL(pi_ref || pi) of the state, exact.
        k3: its sampled k3 estimate.
        ref_logp: log pi_ref(label | state); never carries a gradient.
    """

    logp: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    k3: Tensor | None = None
    ref_logp: Tensor | None = None


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    want: tuple[str, ...] | None = None,
    block_tokens: int | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    samples: int = 0,
    generator: torch.Generator | None = None,
    no_grad: tuple[str, ...] = (),
    block_vocab: int | None = None,
) -> TokenStats:
    """Statistics of pi(. | state) = softmax(z), z = softcap tanh(logit_scale (hidden W^T + bias) / softcap).

    Only tokens the mask selects go through the output layer, in blocks of tokens and vocabulary entries:
    the working memory is a few blocks, never [tokens, V]. Softmax arithmetic is float32 (float64 for
    float64 input) whatever the dtype of hidden and weight. Differentiable (once) in hidden, weight and
    bias, leaf or not; the reference side never receives a gradient.

    With weight and bias frozen, each output leaves one gradient vector in hidden space per token behind
    ([N, H]) and backward recomputes nothing; otherwise backward goes through the blocks again.

    Args:
        hidden: position t predicts labels[:, t]. [..., T, H]
        weight: output layer, on the device of hidden. [V, H]
        labels: token ids; what stands outside the mask is not read. [..., T] int
        mask: which tokens to compute. [..., T] bool
        ref_hidden, ref_weight: the reference's; ref_weight None means the same layer. [..., T, H'], [V, H']
        want: outputs, any of logp, entropy, kl, k3, ref_logp; the last three need the reference. By
            default logp and entropy, and kl where there is a reference.
        block_tokens: tokens in a block; by default 1,024 on the CPU, 4,096 on an accelerator.
        bias, ref_bias: [V], where the output layers have one.
        softcap: cap of the logits (Gemma's `final_logit_softcapping`), for both models.
        logit_scale: factor on the logits, for both models (Granite: 1 / `logits_scaling`).
        samples: tokens to draw from the reference per state, for k3.
        generator: source of their randomness.
        no_grad: wanted outputs that need no gradient, say an entropy that is only reported: a frozen
            layer then saves one product with the weight.
        block_vocab: vocabulary entries in a block; by default what makes its float32 logits 4 MiB on the
            CPU, 128 MiB on an accelerator.

    Raises:
        InputError: shapes that disagree, an unknown output, a missing reference, a label outside the
            vocabulary (CPU only: on a device the check would wait for it, and the log-prob is NaN).
    """
    if want is None:
        want = ("logp", "entropy") if ref_hidden is None else ("logp", "entropy", "kl")
    want = want if isinstance(want, str) else tuple(want)
    check(hidden, weight, labels, mask, ref_hidden, ref_weight, want, no_grad, samples, softcap, logit_scale)
    mask = mask.to(torch.bool)
    selected = mask.reshape(-1).nonzero().squeeze(1)
    flat = hidden.reshape(-1, hidden.shape[-1]).index_select(0, selected)
    ids = labels.reshape(-1).index_select(0, selected).long()
    if ids.device.type == "cpu" and len(ids) and not 0 <= ids.min() <= ids.max() < weight.shape[0]:
        raise InputError(
            f"labels: {ids.min()} to {ids.max()} where the mask is true; 0 to {weight.shape[0] - 1}"
        )
    ref_flat = None
    if any(name in NEED_REFERENCE for name in want):
        assert ref_hidden is not None
        ref_flat = ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]).index_select(0, selected)
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        ref_weight = ref_weight.detach()
        ref_bias = None if ref_bias is None else ref_bias.detach()

    layer_learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    learns = torch.is_grad_enabled() and (layer_learns or hidden.requires_grad)
    differentiable = tuple(n for n in want if learns and n != "ref_logp" and n not in no_grad)
    block_bytes, most_rows = CPU_BLOCK if hidden.device.type == "cpu" else DEVICE_BLOCK
    rows = min(block_tokens or most_rows, max(1, len(ids)))
    plan = Plan(
        want=want,
        differentiable=differentiable,
        rows=rows,
        cols=min(block_vocab or max(256, block_bytes // (4 * rows)), weight.shape[0]),
        scale=float(logit_scale),
        softcap=softcap,
        samples=samples,
        generator=generator,
        save_gradients=bool(differentiable) and not layer_learns,
    )
    out = TokenStatistics.apply(flat, weight, bias, ids, ref_flat, ref_weight, ref_bias, plan)
    stats = TokenStats()
    for i, name in enumerate(want):
        values = out[i] if name in differentiable else out[i].detach()
        whole = values.new_zeros(mask.numel()).index_copy(0, selected, values)
        setattr(stats, name, whole.reshape(mask.shape))
    return stats


def is_finite_number(value: object) -> bool:
    """Whether a value is a finite int or float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    want: tuple[str, ...],
    no_grad: tuple[str, ...],
    samples: int,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Raises InputError for arguments of `token_log_probs` that do not fit together."""
    faults = []
    shape = hidden.shape[:-1]
    for name, value in (("labels", labels), ("mask", mask)):
        if value.shape != shape:
            faults.append(
                f"{name}: shape {tuple(value.shape)}, expected {tuple(shape)} (hidden's, without H)"
            )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        faults.append(f"weight: shape {tuple(weight.shape)}, expected [V, {hidden.shape[-1]}]")
    unknown = [name for name in (*want, *no_grad) if name not in WANTS]
    if unknown or not want or isinstance(want, str):
        faults.append(
            f"want: {want!r}, no_grad: {no_grad!r} will not do; any of {' '.join(WANTS)}, at least one"
        )
    needed = [name for name in want if name in NEED_REFERENCE]
    if needed and ref_hidden is None:
        faults.append(f"ref_hidden: None, but {' '.join(needed)} in want reads it; [..., T, H]")
    if ref_hidden is not None and ref_hidden.shape[:-1] != shape:
        faults.append(f"ref_hidden: shape {tuple(ref_hidden.shape)}, expected {(*shape, 'H')}")
    if ref_weight is not None and weight.dim() == 2 and ref_weight.shape[0] != weight.shape[0]:
        faults.append(f"ref_weight: {ref_weight.shape[0]} rows, expected {weight.shape[0]} (one vocabulary)")
    layer = weight if ref_weight is None else ref_weight
    if needed and ref_hidden is not None and layer.dim() == 2 and layer.shape[1] != ref_hidden.shape[-1]:
        faults.append(f"ref_weight: shape {tuple(layer.shape)}, expected [V, {ref_hidden.shape[-1]}]")
    if "k3" in want and samples < 1:
        faults.append(f"samples: {samples} will not do with k3 in want; 1 or more")
    for name, number in (("softcap", softcap), ("logit_scale", logit_scale)):
        if number is not None and (not is_finite_number(number) or number <= 0):
            faults.append(f"{name}: {number!r} will not do; a finite number above 0")
    if faults:
        raise InputError(*faults)

"""Log-prob, entropy and KL of answer tokens from hidden states, through the output layer in blocks.

Shapes: B pairs (or rows), T tokens, H hidden, V vocabulary, N tokens that the mask selects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbpo_ray.errors import InputError
from tbpo_ray.objectives.blockwise import TokenStatistics
from tbpo_ray.objectives.vocab_scan import LayerInputs, ScanOptions

OUTPUTS = ("logp", "entropy", "log_collision", "kl", "reverse_kl", "k3", "ref_logp")
REFERENCE_OUTPUTS = ("kl", "reverse_kl", "k3", "ref_logp")
# Bytes of float32 logits in a block, and the most tokens in one. On the CPU a block stays in the cache and
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
        log_collision: log of the sum of pi(v | state)^2 over the vocabulary, the log-probability that two
            draws agree; never carries a gradient.
        kl: KL(pi_ref || pi) of the state, exact.
        reverse_kl: KL(pi || pi_ref) of the state, exact.
        k3: its sampled k3 estimate.
        ref_logp: log pi_ref(label | state); never carries a gradient.
    """

    logp: Tensor | None = None
    entropy: Tensor | None = None
    log_collision: Tensor | None = None
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    k3: Tensor | None = None
    ref_logp: Tensor | None = None


def token_log_probs(  # noqa: PLR0913  (a public signature that callers rely on)
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
    selected: Tensor | None = None,
) -> TokenStats:
    """Statistics of pi(. | state) = softmax(z), z = softcap tanh(logit_scale (hidden W^T + bias) / softcap).

    Only tokens that the mask selects go through the output layer, in blocks of tokens and vocabulary entries:
    the working memory is a few blocks, never [tokens, V]. Softmax arithmetic is float32 (float64 for float64
    input) whatever the dtype of hidden and weight. Differentiable (once) in hidden, weight and bias, whether
    or not they are leaves; the reference never receives a gradient.

    With weight and bias frozen, the forward pass saves one gradient vector in hidden space per token and
    output ([N, H]), and backward recomputes nothing; otherwise backward goes through the blocks again.

    Args:
        hidden: position t predicts labels[:, t]. [..., T, H]
        weight: output layer, on the device of hidden. [V, H]
        labels: token ids; values outside the mask are not read. [..., T] int
        mask: which tokens to compute. [..., T] bool
        ref_hidden, ref_weight: the reference's; ref_weight None means the same layer. [..., T, H'], [V, H']
        want: outputs, any of logp, entropy, log_collision, kl, reverse_kl, k3, ref_logp; all but the first
            three need the reference. By default logp and entropy, and kl if there is a reference.
        block_tokens: tokens in a block; by default 1,024 on the CPU, 4,096 on an accelerator.
        bias, ref_bias: biases of the output layers, if they have any. [V]
        softcap: cap of the logits (Gemma's `final_logit_softcapping`), for both models.
        logit_scale: factor on the logits, for both models (Granite: 1 / `logits_scaling`).
        samples: tokens to draw from the reference per state, for k3.
        generator: source of their randomness.
        no_grad: outputs that need no gradient, such as an entropy that is only reported. With a frozen
            layer each of them saves one product with the weight.
        block_vocab: vocabulary entries in a block; by default as many as make its float32 logits 4 MiB on
            the CPU, 128 MiB on an accelerator.
        selected: the flattened positions where mask is true, ascending, if the caller knows them. They are
            found from the mask otherwise, which waits for an accelerator. [N] int64

    Raises:
        InputError: shapes that disagree, an unknown output, a missing reference, a label outside the
            vocabulary (on the CPU only: on an accelerator the check would wait for the device, and the
            log-prob is NaN instead).
    """
    if want is None:
        want = ("logp", "entropy") if ref_hidden is None else ("logp", "entropy", "kl")
    request = _Request(
        outputs=want if isinstance(want, str) else tuple(want),
        no_grad=no_grad,
        softcap=softcap,
        logit_scale=logit_scale,
        samples=samples,
        generator=generator,
        block_tokens=block_tokens,
        block_vocab=block_vocab,
    )
    policy = LayerInputs(hidden, weight, bias)
    reference = _reference_layer(policy, ref_hidden, ref_weight, ref_bias)
    if faults := [*_shape_faults(policy, reference, labels, mask), *_request_faults(request, reference)]:
        raise InputError(*faults)

    if selected is None:
        selected = mask.to(torch.bool).reshape(-1).nonzero().squeeze(1)
    ids = labels.reshape(-1).index_select(0, selected).long()
    # Subclasses, such as the tensors without values that memory is planned with, may not be readable.
    readable = type(ids) is Tensor and ids.device.type == "cpu" and len(ids) > 0
    if readable and not 0 <= ids.min() <= ids.max() < weight.shape[0]:
        raise InputError(
            f"labels: {ids.min()} to {ids.max()} where the mask is true; must be 0 to {weight.shape[0] - 1}"
        )
    if reference is not None:
        reference = reference.detach().select(selected) if request.reads_reference else None
    options = _scan_options(request, policy, len(ids))
    rows = policy.select(selected)
    out: Tensor = TokenStatistics.apply(rows.hidden, weight, bias, ids, reference, options)  # type: ignore[no-untyped-call]
    stats = TokenStats()
    for i, name in enumerate(options.outputs):
        values = out[i] if name in options.differentiable else out[i].detach()
        whole = values.new_zeros(mask.numel()).index_copy(0, selected, values)
        setattr(stats, name, whole.reshape(mask.shape))
    return stats


@dataclass(frozen=True)
class _Request:
    """The arguments of one call that are not tensors; see `token_log_probs`."""

    outputs: Any
    no_grad: tuple[str, ...]
    softcap: float | None
    logit_scale: float
    samples: int
    generator: torch.Generator | None
    block_tokens: int | None
    block_vocab: int | None

    @property
    def reads_reference(self) -> bool:
        return any(name in REFERENCE_OUTPUTS for name in self.outputs)


def _reference_layer(
    policy: LayerInputs, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> LayerInputs | None:
    """The reference's layer, which is the policy's own if the caller gave no weight."""
    if hidden is None:
        return None
    if weight is None:
        return LayerInputs(hidden, policy.weight, policy.bias if bias is None else bias)
    return LayerInputs(hidden, weight, bias)


def _scan_options(request: _Request, policy: LayerInputs, tokens: int) -> ScanOptions:
    """Choose the blocks, and which outputs carry a gradient."""
    learns = torch.is_grad_enabled() and (policy.layer_learns or policy.hidden.requires_grad)
    fixed = {"ref_logp", "log_collision", *request.no_grad}
    differentiable = tuple(name for name in request.outputs if learns and name not in fixed)
    block_bytes, most_rows = CPU_BLOCK if policy.hidden.device.type == "cpu" else DEVICE_BLOCK
    rows = min(request.block_tokens or most_rows, max(1, tokens))
    cols = max(256, block_bytes // (4 * rows))
    if policy.hidden.device.type != "cpu":
        cols -= cols % 256  # tensor cores read whole rows of a block only if its width is a multiple of 8
    return ScanOptions(
        outputs=request.outputs,
        differentiable=differentiable,
        rows=rows,
        cols=min(request.block_vocab or cols, policy.weight.shape[0]),
        scale=float(request.logit_scale),
        softcap=request.softcap,
        samples=request.samples,
        generator=request.generator,
        save_gradients=bool(differentiable) and not policy.layer_learns,
    )


def _shape_faults(
    policy: LayerInputs, reference: LayerInputs | None, labels: Tensor, mask: Tensor
) -> Iterator[str]:
    shape = policy.hidden.shape[:-1]
    for name, value in (("labels", labels), ("mask", mask)):
        if value.shape != shape:
            yield f"{name}: shape {tuple(value.shape)}, expected {tuple(shape)} (hidden's, without H)"
    weight = policy.weight
    if weight.dim() != 2 or weight.shape[1] != policy.hidden.shape[-1]:
        yield f"weight: shape {tuple(weight.shape)}, expected [V, {policy.hidden.shape[-1]}]"
    if reference is None:
        return
    hidden, ref_weight = reference.hidden, reference.weight
    if hidden.shape[:-1] != shape:
        yield f"ref_hidden: shape {tuple(hidden.shape)}, expected {(*shape, 'H')}"
    if weight.dim() == 2 and ref_weight.shape[0] != weight.shape[0]:
        yield f"ref_weight: {ref_weight.shape[0]} rows, expected {weight.shape[0]} (one vocabulary)"
    if ref_weight.dim() == 2 and ref_weight.shape[1] != hidden.shape[-1]:
        yield f"ref_weight: shape {tuple(ref_weight.shape)}, expected [V, {hidden.shape[-1]}]"


def _request_faults(request: _Request, reference: LayerInputs | None) -> Iterator[str]:
    outputs, no_grad = request.outputs, request.no_grad
    unknown = [name for name in (*outputs, *no_grad) if name not in OUTPUTS]
    if unknown or not outputs or isinstance(outputs, str):
        yield f"want: {outputs!r}, no_grad: {no_grad!r}; must be a tuple of {' '.join(OUTPUTS)}, at least one"
    needed = [name for name in outputs if name in REFERENCE_OUTPUTS]
    if needed and reference is None:
        yield f"ref_hidden: None, but {' '.join(needed)} in want reads it; give a [..., T, H] tensor"
    if "k3" in outputs and request.samples < 1:
        yield f"samples: {request.samples} with k3 in want; must be 1 or more"
    for name, number in (("softcap", request.softcap), ("logit_scale", request.logit_scale)):
        if number is not None and not _is_positive(number):
            yield f"{name}: {number!r}; must be a finite number above 0"


def _is_positive(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]

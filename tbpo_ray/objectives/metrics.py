"""Metrics of an objective: detached scalar tensors, computed without waiting for the device.

Every metric except the quantiles is a mean over pairs (P) or over answer tokens (A: of both answers; C:
compared tokens, which both answers have). To average over ranks or micro-batches, weight a value by its
number of pairs or tokens; this is exact for the means and approximate for the quantiles and `baseline/std`.

| name                                    | mean of | over |
|-----------------------------------------|------------------------------|------|
| `rewards/chosen`, `rewards/rejected`    | implicit reward beta S, S = sum of r_t [1] | P |
| `rewards/margin`                        | rewards/chosen - rewards/rejected | P |
| `rewards/accuracy`                      | 1 where the margin is positive | P |
| `rewards/token_accuracy`                | 1 where u_t < 0; sequence level: where r_t^w > r_t^l [1] | C |
| `logps/chosen`, `logps/rejected`        | log pi of the whole answer, nats | P |
| `logps/chosen_drift`, `.../rejected_drift` | S: log pi - log pi_ref of the whole answer, nats | P |
| `logratio/q05`, `/q50`, `/q95`          | quantiles of r_t | A |
| `u/mean`                                | log model ratio, rejected over chosen, before clamping | C or P |
| `u/clamped_share`                       | 1 where the generator clamped u | C or P |
| `u/outlier_share`                       | 1 where u is past the peak of the slope (beta_family) | C or P |
| `baseline/mean`                         | c_t before centering (tdpo, tis_dpo: the KL) | A |
| `baseline/std`                          | standard deviation of the same | A |
| `kl/k3`                                 | K3 with rho = pi_ref/pi, an estimate of KL(pi || pi_ref) | A |
| `loss/t_reg`                            | the token rewards' part of the loss (t_reg) | P |
| `loss/nll`                              | -log pi of the chosen answer, as `nll_normalization` has it | P |
| `pairs/margin`, `pairs/weight`          | the numbers of the records | P |
| `tgdpo/negative_share`                  | 1 where the guide turns the token's weight negative | A |
| `arc/clamped_share`                     | share of the pair's chunks with a clamped score or target | P |
| `pairs/skipped_share`                   | 1 where no token was selected (confpo) | P |
| `pairs/wpo_weight`                      | WPO's weight of the pair | P |
| `f_divergence/clamped_share`            | 1 where an answer's exponent was clamped (forward_kl, alpha) | P |
| `ties/share`                            | 1 where the pair is a tie | P |
| `token_nll`                             | -log pi (sft) | A |
| `entropy`, `kl/exact` [2]               | of the policy; KL(pi_ref || pi) | A |
| `kl/exact_reverse` [2]                  | KL(pi || pi_ref) | A |
| `baseline/gate`, `baseline/gate_std` [3] | the mixed baseline's gate; its standard deviation | A |

[1] `simpo`, `sepo` and `confpo`, which have no reference, use log pi in place of r_t and normalize by length.
[2] From `distribution_metrics`, from the outputs of `token_log_probs`. [3] From `MixedBaseline.metrics`.

`sft` has `logps/chosen`, `token_nll` and, with a reference, `logps/chosen_drift`.
Pairs without tokens count as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tbpo_ray.objectives.baseline import k3
from tbpo_ray.objectives.types import Side

QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
MAX_QUANTILE_TOKENS = 1 << 16  # a longer batch is subsampled with an even stride


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the entries of the whole tensor that the mask selects; 0 if it selects none. Scalar."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def pair_metrics(chosen: Side, rejected: Side, beta: float, reference: bool) -> dict[str, Tensor]:
    """Rewards, accuracies and log-probs of the answers; without a reference, rewards use log pi per token."""
    m: dict[str, Tensor] = {}
    rewards = []
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        total = side.logps.sum(-1)
        m[f"logps/{name}"] = total.mean()
        if side.ref_logps is not None:
            drift = side.log_ratio.sum(-1)
            m[f"logps/{name}_drift"] = drift.mean()
        score = drift if reference else total / side.mask.sum(-1).clamp(min=1)
        rewards.append(beta * score)
        m[f"rewards/{name}"] = rewards[-1].mean()
    margin = rewards[0] - rewards[1]
    m["rewards/margin"] = margin.mean()
    m["rewards/accuracy"] = (margin > 0).to(margin.dtype).mean()
    if chosen.ref_logps is not None and rejected.ref_logps is not None:
        m |= log_ratio_metrics(chosen, rejected)
    return m


def log_ratio_metrics(chosen: Side, rejected: Side) -> dict[str, Tensor]:
    """Quantiles of the token log-ratio and the k3 estimate of KL(pi || pi_ref)."""
    ratio = torch.cat([chosen.log_ratio, rejected.log_ratio]).flatten()
    mask = torch.cat([chosen.mask, rejected.mask]).flatten()
    values = quantiles(ratio, mask, list(QUANTILES.values()))
    m = {f"logratio/{name}": value for name, value in zip(QUANTILES, values, strict=True)}
    m["kl/k3"] = token_mean(k3(-ratio), mask)
    return m


def quantiles(values: Tensor, mask: Tensor, q: list[float]) -> list[Tensor]:
    """Quantiles of the entries that the mask selects, with linear interpolation; 0 if it selects none.

    Takes flat tensors and returns scalars.
    """
    stride = -(-values.numel() // MAX_QUANTILE_TOKENS) or 1
    values, mask = values[::stride], mask[::stride]
    if not values.numel():
        return [values.sum()] * len(q)
    ordered = torch.where(mask, values, torch.inf).sort().values
    count = mask.sum()
    # The positions depend on the count, which stays on the device, and nothing is copied to it.
    last = (count - 1).clamp(min=0).to(values.dtype)
    at = torch.stack([last * share for share in q])
    low = ordered[at.floor().long()]
    high = ordered[at.ceil().long()]
    result = torch.where(count > 0, torch.lerp(low, high, at.frac()), 0)
    return list(result.unbind())


@torch.no_grad()
def baseline_metrics(c_chosen: Tensor, c_rejected: Tensor, chosen: Side, rejected: Side) -> dict[str, Tensor]:
    """Mean and standard deviation of c_t over the answers' tokens."""
    c = torch.cat([c_chosen, c_rejected])
    mask = torch.cat([chosen.mask, rejected.mask])
    mean = token_mean(c, mask)
    return {"baseline/mean": mean, "baseline/std": token_mean((c - mean) ** 2, mask).sqrt()}


@torch.no_grad()
def distribution_metrics(
    entropies: Mapping[str, Tensor | None],
    kls: Mapping[str, Tensor | None],
    masks: Mapping[str, Tensor],
    *,
    kl_name: str = "kl/exact",
) -> dict[str, Tensor]:
    """Compute `entropy` and `kl/exact` from the outputs of `token_log_probs`.

    Args:
        entropies, kls: {"chosen": [B, T], "rejected": [B, T]}; a side that is None or absent is skipped.
        masks: the same keys, [B, T] bool.
        kl_name: the metric that `kls` give; `kl/exact_reverse` for KL(pi || pi_ref).
    """
    m = {}
    for name, sides in (("entropy", entropies), (kl_name, kls)):
        present = [(value, masks[side]) for side, value in sides.items() if value is not None]
        if present:
            values = torch.cat([value.detach().flatten() for value, _ in present])
            m[name] = token_mean(values, torch.cat([mask.flatten() for _, mask in present]))
    return m

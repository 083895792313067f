"""Learned state baselines: small heads on the policy's last hidden state.

A head reads detached hidden states, so the objective's loss, which reaches it through u_t, trains the head
and nothing below it. It computes in float32 whatever the backbone's dtype. Its last layer starts at zero,
so the first step is that of the objective without a baseline.

Shapes: ... any leading dimensions, T tokens, H hidden. Source: TBPO-Q, arXiv 2605.12288.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tbpo_ray.config.objective import StateBaselineConfig
from tbpo_ray.errors import InputError
from tbpo_ray.objectives.factory import validated_baseline


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 (or float64), even if its weights have a lower precision."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(x.to(dtype), self.weight.to(dtype), bias)


def scalar_head(hidden_size: int, width: int) -> nn.Module:
    """H -> width -> 1 with GELU, or H -> 1 for width 0. The last layer's weight and bias start at zero."""
    last = Float32Linear(width or hidden_size, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if not width:
        return nn.Sequential(last)
    return nn.Sequential(Float32Linear(hidden_size, width), nn.GELU(), last)


class LearnedBaseline(nn.Module):
    """b_phi(s_t): a learned estimate of the log partition function of a state.

    Args:
        hidden_size: H of the backbone.
        width: hidden layer of the head; 0 for a linear head.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.head = scalar_head(hidden_size, width)
        self.metrics: dict[str, Tensor] = {}

    def forward(self, hidden: Tensor, kl: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return c_t = b_phi(hidden_t). hidden [..., T, H]; kl and mask are not read. [..., T] float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            b: Tensor = self.head(hidden.detach())
            return b.squeeze(-1)


class MixedBaseline(nn.Module):
    """c_t = g_t b_phi(s_t) + (1 - g_t) KL_t with a learned gate g_t = sigmoid(linear(hidden_t)).

    The paper leaves open how to weight the two baselines; the gate learns it per state. Both last layers
    start at zero: b = 0 and g = 1/2, so training starts from half the KL. The KL keeps its gradient to the
    policy, as in TBPO-A; head and gate read detached hidden states.

    Attributes:
        metrics: after a forward pass `baseline/gate` (mean of g_t over the mask) and `baseline/gate_std`.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.head = scalar_head(hidden_size, width)
        self.gate = scalar_head(hidden_size, 0)
        self.metrics: dict[str, Tensor] = {}

    def forward(self, hidden: Tensor, kl: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return c_t. hidden [..., T, H], kl [..., T], mask [..., T] (for the metrics). [..., T] float32.

        Raises:
            InputError: kl is missing or not of shape [..., T].
        """
        if kl is None or kl.shape != hidden.shape[:-1]:
            found = None if kl is None else tuple(kl.shape)
            raise InputError(
                f"kl: shape {found}, but state_baseline.kind 'mixed' reads the exact KL of each token; "
                f"expected {tuple(hidden.shape[:-1])}"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.detach()
            gate = torch.sigmoid(self.gate(hidden).squeeze(-1))
            learned = self.head(hidden).squeeze(-1)
            self.metrics = gate_metrics(gate.detach(), mask)
            mixed: Tensor = gate * learned + (1 - gate) * kl.to(gate.dtype)
            return mixed


def gate_metrics(gate: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Mean and standard deviation of the gate over the states that the mask selects. gate [..., T]"""
    mask = torch.ones_like(gate, dtype=torch.bool) if mask is None else mask.to(torch.bool)
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, gate, 0).sum() / count
    variance = torch.where(mask, (gate - mean) ** 2, 0).sum() / count
    return {"baseline/gate": mean, "baseline/gate_std": variance.sqrt()}


def build_state_baseline(
    section: StateBaselineConfig | Mapping[str, Any] | None, hidden_size: int
) -> LearnedBaseline | MixedBaseline | None:
    """Build the head of an `objective.state_baseline` section; None if its kind has nothing to learn.

    Args:
        section: `Objective.state_baseline`, or a mapping {kind, hidden, ...}; without a kind: `learned`.
        hidden_size: H of the backbone.

    Raises:
        InputError: an unknown kind or key, or a value out of range.
    """
    config = section if isinstance(section, StateBaselineConfig) else validated_baseline(section)
    kind = config.kind or "learned"
    if kind == "learned":
        return LearnedBaseline(hidden_size, config.hidden)
    return MixedBaseline(hidden_size, config.hidden) if kind == "mixed" else None

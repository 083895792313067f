"""Learned state baselines: small heads on the policy's last hidden state.

A head reads detached hidden states, so its loss (the objective's own, through u_t) trains it and nothing
below it, and computes in float32 whatever the backbone's dtype. Its last layer starts at zero: at the
first step b = 0, the objective without a baseline.

Shapes: ... any leading dimensions, T tokens, H hidden. Source: TBPO-Q, arXiv 2605.12288.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tbpo_ray.errors import InputError
from tbpo_ray.objectives.baseline import StateBaseline
from tbpo_ray.objectives.factory import build_baseline


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 (float64 stays), also where its weights were cast down."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)


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

    def __init__(self, hidden_size: int, width: int = 1024):
        super().__init__()
        self.head = scalar_head(hidden_size, width)
        self.metrics: dict[str, Tensor] = {}

    def forward(self, hidden: Tensor, kl: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """c_t = b_phi(hidden_t). hidden [..., T, H]; kl and mask are not read. [..., T] float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.detach()).squeeze(-1)


class MixedBaseline(nn.Module):
    """c_t = g_t b_phi(s_t) + (1 - g_t) KL_t with a learned gate g_t = sigmoid(linear(hidden_t)).

    The paper leaves open how to weigh the two baselines by regime; the gate learns it per state. Both
    last layers start at zero: b = 0 and g = 1/2, so training starts from half the KL. The KL keeps its
    gradient to the policy, as in TBPO-A; head and gate read detached hidden states.

    Attributes:
        metrics: after a forward pass `baseline/gate` (mean of g_t over the mask) and `baseline/gate_std`.
    """

    def __init__(self, hidden_size: int, width: int = 1024):
        super().__init__()
        self.head = scalar_head(hidden_size, width)
        self.gate = scalar_head(hidden_size, 0)
        self.metrics: dict[str, Tensor] = {}

    def forward(self, hidden: Tensor, kl: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """c_t. hidden [..., T, H], kl [..., T], mask [..., T] (for the metrics alone). [..., T] float32.

        Raises:
            InputError: kl is missing or not of shape [..., T].
        """
        if kl is None or kl.shape != hidden.shape[:-1]:
            found = None if kl is None else tuple(kl.shape)
            raise InputError(
                f"kl: shape {found} will not do for state_baseline.kind 'mixed'; the exact KL of each token, "
                f"{tuple(hidden.shape[:-1])}"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.detach()
            gate = torch.sigmoid(self.gate(hidden).squeeze(-1))
            learned = self.head(hidden).squeeze(-1)
            self.metrics = gate_metrics(gate.detach(), mask)
            return gate * learned + (1 - gate) * kl.to(gate.dtype)


def gate_metrics(gate: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Mean and standard deviation of the gate over the masked-in states. gate [..., T]"""
    mask = torch.ones_like(gate, dtype=torch.bool) if mask is None else mask.to(torch.bool)
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, gate, 0).sum() / count
    variance = torch.where(mask, (gate - mean) ** 2, 0).sum() / count
    return {"baseline/gate": mean, "baseline/gate_std": variance.sqrt()}


def build_state_baseline(
    section: Mapping[str, Any] | StateBaseline | None, hidden_size: int
) -> LearnedBaseline | MixedBaseline | None:
    """The head of an `objective.state_baseline` section, None when its kind has nothing to learn.

    Args:
        section: {kind, hidden, ...}, an absent kind being `learned`; or `Objective.state_baseline`,
            where an absent kind is the objective's own.
        hidden_size: H of the backbone.

    Raises:
        InputError: an unknown kind or key, or a value out of range.
    """
    spec = section if isinstance(section, StateBaseline) else build_baseline(section, "learned")
    if spec.kind == "learned":
        return LearnedBaseline(hidden_size, spec.hidden)
    return MixedBaseline(hidden_size, spec.hidden) if spec.kind == "mixed" else None

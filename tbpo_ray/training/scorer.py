"""Per-token scores of answers from a causal model. Plain torch; knows neither Ray nor DeepSpeed.

The worker loop, the single-process loop and the reference-score actors all run this code.

Shapes: B pairs, S sides (chosen, rejected; one for SFT), T answer tokens, R rows of length L, H hidden,
V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tbpo_ray.objectives import TokenScores, token_log_probs
from tbpo_ray.training.batch import PairBatch
from tbpo_ray.training.pair_attention import (
    avoid_plans_per_shape,
    encode_indices,
    is_worthwhile,
    rows_end_padded,
    use_pair_attention,
)

ScorerOutputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Scores of the answer tokens. A plain tuple, because DeepSpeed searches tuples for tensors, not dataclasses:

- log-prob of each label [S, B, T]
- entropy of the policy, nats, without a gradient [S, B, T]; zeros where not requested
- exact KL(reference || policy), exact KL(policy || reference), or sampled k3 [S, B, T]; zeros where not
  requested
- the reference's log-prob of each label [S, B, T]; zeros where not requested
- the policy's log collision probability, without a gradient [S, B, T]; zeros where not requested
- detached hidden states of the predicting positions [S, B, T, H]
"""


OutputLayerInputs = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states [S * B, T, H], output weight [V, H] and bias [V] or None: all that log-probs depend on."""


class PairScorer(nn.Module):
    """A causal model that returns per-token scores of answers instead of logits.

    Args:
        model: a transformers causal model, or one wrapped by peft.
        block_tokens: tokens that go through the output layer at once; by default chosen by size.
    """

    def __init__(self, model: nn.Module, block_tokens: int | None = None):
        super().__init__()
        self.model = model
        self.block_tokens = block_tokens
        avoid_plans_per_shape()
        self.pair_attention = use_pair_attention(_causal(model))
        config = _causal(model).config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self.logit_scale = float(getattr(text, "logit_scale", None) or 1.0)
        self.logit_scale /= float(getattr(text, "logits_scaling", None) or 1.0)
        self.windows = _layer_windows(text)

    @property
    def output_layer(self) -> nn.Module:
        layer: nn.Module = _causal(self.model).get_output_embeddings()
        return layer

    def states(self, batch: PairBatch) -> Tensor:
        """[R, L, H] last hidden states of all positions."""
        if batch.shared:
            masks: Any = {kind: self._mask(batch, window) for kind, window in self.windows.items()}
            mask = masks["full_attention"] if set(masks) == {"full_attention"} else masks
        else:
            mask = (batch.segment >= 0).long()
        with rows_end_padded():
            out = _decoder(_causal(self.model))(
                input_ids=batch.input_ids,
                attention_mask=mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        states: Tensor = out.last_hidden_state
        return states

    def hidden(self, batch: PairBatch) -> Tensor:
        """[S * B, T, H] last hidden states of the positions that predict answer tokens."""
        states = self.states(batch)
        sides, pairs, tokens = batch.predict.shape
        flat = states.reshape(-1, states.shape[-1]).index_select(0, batch.predict.reshape(-1))
        return flat.view(sides * pairs, tokens, -1)

    def _mask(self, batch: PairBatch, window: int | None) -> Tensor:
        """The attention mask of a shared row: the indices for pair attention where the model supports it and
        the rows are long enough, otherwise [R, 1, L, L]."""
        gather_index, scatter_index = batch.gather_index, batch.scatter_index
        assert gather_index is not None and scatter_index is not None
        if self.pair_attention and is_worthwhile(gather_index, scatter_index):
            return encode_indices(gather_index, scatter_index, window)
        allowed = batch.attention_mask(window)
        if _causal(self.model).config._attn_implementation != "eager":
            return allowed
        # Eager attention adds its mask to the scores instead of selecting by it.
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    def forward(
        self,
        batch: PairBatch,
        outputs: tuple[str, ...] = ("logp",),
        reference: OutputLayerInputs | Literal["adapter_off"] | None = None,
        samples: int = 0,
        generator: torch.Generator | None = None,
    ) -> ScorerOutputs:
        """Score a batch.

        Args:
            outputs: `logp`, any of `entropy`, `log_collision` and `ref_logp`, and one of `kl`, `reverse_kl`
                and `k3`.
            reference: what `ref_logp` and the divergences are computed from; `adapter_off` is this model
                with its LoRA adapter disabled.
            samples: tokens drawn from the reference per state, for `k3`.
            generator: random state for these draws.
        """
        sides, pairs, tokens = batch.labels.shape
        if reference == "adapter_off":
            reference = self.output_layer_inputs(batch, adapter_off=True)
        ref_hidden, ref_weight, ref_bias = reference or (None, None, None)
        hidden = self.hidden(batch)
        weight, bias = output_weight(self.output_layer)
        stats = token_log_probs(
            hidden,
            weight,
            batch.labels.view(-1, tokens),
            batch.mask.view(-1, tokens),
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            want=outputs,
            block_tokens=self.block_tokens,
            selected=batch.selected,
            bias=bias,
            ref_bias=ref_bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            samples=samples,
            generator=generator,
            no_grad=("entropy",) if "entropy" in outputs else (),
        )
        assert stats.logp is not None
        zeros = torch.zeros_like(stats.logp)
        divergences = (stats.kl, stats.reverse_kl, stats.k3)
        divergence = next((values for values in divergences if values is not None), None)
        shape = (sides, pairs, tokens)
        return (
            stats.logp.view(shape),
            (stats.entropy if stats.entropy is not None else zeros).view(shape),
            (divergence if divergence is not None else zeros).view(shape),
            (stats.ref_logp if stats.ref_logp is not None else zeros).view(shape),
            (stats.log_collision if stats.log_collision is not None else zeros).view(shape),
            hidden.detach().view(*shape, -1),
        )

    @torch.no_grad()
    def output_layer_inputs(self, batch: PairBatch, *, adapter_off: bool = False) -> OutputLayerInputs:
        """The `reference` argument of `forward`, from this model's present weights, without dropout."""
        training = self.model.training
        self.model.eval()
        with self.model.disable_adapter() if adapter_off else nullcontext():  # type: ignore[operator]
            hidden = self.hidden(batch)
            weight, bias = output_weight(self.output_layer)
        self.model.train(training)
        return hidden, weight.detach(), bias.detach() if bias is not None else None

    def reference_logps(self, batch: PairBatch) -> Tensor:
        """[S, B, T] log-probs of the labels under this model as the frozen reference."""
        hidden, weight, bias = self.output_layer_inputs(batch)
        tokens = batch.labels.shape[-1]
        stats = token_log_probs(
            hidden,
            weight,
            batch.labels.view(-1, tokens),
            batch.mask.view(-1, tokens),
            want=("logp",),
            block_tokens=self.block_tokens,
            selected=batch.selected,
            bias=bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
        )
        assert stats.logp is not None
        return stats.logp.view(batch.labels.shape)


def output_weight(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The output layer's effective weight [V, H] and bias [V].

    A LoRA adapter on it is merged into the weight; the adapter's input dropout is not applied.
    """
    base = getattr(layer, "base_layer", layer)
    weight: Tensor = base.weight
    if hasattr(layer, "lora_A") and not layer.disable_adapters:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                delta = layer.lora_B[name].weight @ layer.lora_A[name].weight
                weight = weight + layer.scaling[name] * delta
    return weight, getattr(base, "bias", None)


def to_scores(
    logp: Tensor,
    batch: PairBatch,
    baseline: Tensor | None = None,
    ref_logps: Tensor | None = None,
    log_collision: Tensor | None = None,
) -> TokenScores:
    """Pack the scores of both sides for the objective; the rejected fields are None for a batch without them.

    Args:
        logp: [S, B, T] policy log-probs of the labels.
        baseline: [S, B, T] state baseline c_t, where the objective reads one.
        ref_logps: [S, B, T] reference log-probs; default: the cached ones of the batch.
        log_collision: [S, B, T] log collision probabilities of the policy, where the objective reads them.
    """
    fields: dict[str, Any] = {
        "logps": logp,
        "mask": batch.mask,
        "ref_logps": ref_logps if ref_logps is not None else batch.ref_logps,
        "baseline": baseline,
        "weights": batch.weights,
        "log_collision": log_collision,
        "chunks": batch.chunks,
    }
    scores: dict[str, Any] = {
        f"{side}_{name}": None if values is None else values[index]
        for index, side in enumerate(("chosen", "rejected")[: batch.labels.shape[0]])
        for name, values in fields.items()
    }
    return TokenScores(
        **scores, tie=batch.tie, pair_margins=batch.pair_margins, pair_weights=batch.pair_weights
    )


def _causal(model: nn.Module) -> Any:
    """The transformers causal model, unwrapped from peft if need be."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _decoder(model: Any) -> Any:
    """The model without its output layer."""
    decoder = model.get_decoder()
    # Llama 4's text model does not find its own decoder and returns itself.
    return model.model if decoder is model and hasattr(model, "model") else decoder


def _layer_windows(config: Any) -> dict[str, int | None]:
    """Attention kinds of the model's layers and their windows."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = set(getattr(config, "layer_types", None) or [])
    if not kinds:
        return {"full_attention": window}
    return {kind: window if "sliding" in kind else None for kind in kinds}

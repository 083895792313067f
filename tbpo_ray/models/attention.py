"""Choose an attention implementation that computes everything that a model's configuration asks for.

Transformers loads Gemma 2 under SDPA without its soft cap, for example, and refuses SDPA for architectures
that never got it. Training, reference scores, export and evaluation all choose here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tbpo_ray.errors import InputError

_ATTENTION_LAYERS = (
    "attention", "full_attention", "sliding_attention", "chunked_attention", "window_attention",
)  # fmt: skip
_PER_TOKEN_LAYERS = ("mlp", "moe", "dense", "sparse")


@dataclass(frozen=True)
class AttentionChoice:
    """An attention implementation of transformers, and why it is not the requested one, if it is not."""

    implementation: str
    reason: str | None = None


def choose_attention(config: Any, requested: str, model_class: Any = None) -> AttentionChoice:
    """The requested implementation, or `eager` where SDPA would drop a feature or does not exist.

    Args:
        config: the model's transformers configuration.
        requested: `model.attention`.
        model_class: the class that will be built; default: the causal model of this configuration.

    Raises:
        InputError: the architecture does not support FlashAttention.
    """
    model_class = model_class or causal_class(config)
    name = model_class.__name__ if model_class is not None else config.model_type
    if requested == "flash_attention_2":
        if not getattr(model_class, "_supports_flash_attn", True):
            raise InputError(f"model.attention={requested}: {name} does not support it; use sdpa or eager")
        return AttentionChoice(requested)
    reason = _why_not_sdpa(config, model_class) if requested == "sdpa" else None
    if reason is None:
        return AttentionChoice(requested)
    return AttentionChoice(
        "eager", f"model.attention={requested}: {reason} of {name}; model.attention=eager is used instead"
    )


def _why_not_sdpa(config: Any, model_class: Any) -> str | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(model_class, "_supports_sdpa", True):
        return "SDPA is missing from the implementation"
    if getattr(text, "attn_logit_softcapping", None):
        return f"SDPA drops the attention soft cap {text.attn_logit_softcapping:g}"
    if getattr(text, "alibi", False):
        # Falcon's SDPA path merges ALiBi and padding into one mask, and computes them wrongly together.
        return "SDPA miscalculates the ALiBi positions"
    return None


def stateful_layers(config: Any) -> str | None:
    """The kind of layers that carry state from one position to later ones past any attention mask, if any.

    Args:
        config: a transformers configuration.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("layer_types", "layers_block_type", "block_types")
    kinds = {str(kind) for name in names for kind in getattr(text, name, None) or ()}
    others = sorted(kinds - {*_ATTENTION_LAYERS, *_PER_TOKEN_LAYERS})
    if others:
        return f"layers of the type {others[0]}"
    # Mamba-like models declare no layer types; transformers marks their classes as stateful.
    return "recurrent layers" if getattr(causal_class(config), "_is_stateful", False) else None


def cpu_attention(requested: str) -> str:
    """The requested implementation where it runs on a CPU, otherwise SDPA: FlashAttention needs a GPU."""
    return "sdpa" if requested == "flash_attention_2" else requested


def causal_class(config: Any) -> Any:
    """The causal model class of a transformers configuration, None if there is none."""
    from transformers import AutoModelForCausalLM

    known: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        return None
    found = known[type(config)]
    return found[0] if isinstance(found, tuple) else found

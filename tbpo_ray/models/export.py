"""Export a policy as a folder that plain transformers and vLLM can load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_ray.models.baseline_head import save_state_baseline
from tbpo_ray.storage.files import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_policy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: Any,
    card: Mapping[str, Any],
    baseline: tuple[Mapping[str, Any], str, int] | None = None,
) -> Path:
    """Save weights (safetensors), tokenizer, chat template and a model card, replacing `folder` atomically.

    Args:
        model: a transformers model, or one wrapped by peft, whose adapter is merged into the weights and
            also saved under `adapter/`.
        dtype: the torch dtype of the saved weights.
        card: entries of the model card, name to value.
        baseline: weights, kind and width of a learned state baseline, saved under `state_baseline/`.
    """
    target = Path(folder)
    with atomic_folder(target, replace=True) as partial:
        if hasattr(model, "merge_and_unload"):
            # The adapter first: merging removes it from the model.
            model.save_pretrained(partial / "adapter", safe_serialization=True)
            model = model.merge_and_unload()
        model.config.use_cache = True  # training switches it off, and generation needs it
        model.to(dtype).save_pretrained(partial, safe_serialization=True)
        tokenizer.save_pretrained(partial)
        if baseline is not None:
            save_state_baseline(partial, *baseline)
        (partial / "README.md").write_text(_card(card), encoding="utf-8")
    return target


def _card(facts: Mapping[str, Any]) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "tags: [tbpo, preference-optimization]",
        "---",
        "",
        f"# {facts.get('name', 'policy')}",
        "",
        "Aligned with token-level preference optimization by `tbpo_ray`.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    return "\n".join(lines) + "\n"

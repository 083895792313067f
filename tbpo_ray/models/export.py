"""Write a policy as a folder that plain transformers and vLLM load."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_ray.models.baseline_head import save_state_baseline

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
    """Save weights (safetensors), tokenizer, chat template and a model card; the folder appears at once.

    Args:
        model: a transformers model, or one wrapped by peft: then the adapter is kept under `adapter/`
            and merged into the weights.
        dtype: torch dtype of the saved weights.
        card: facts for the model card, name to value.
        baseline: weights, kind and width of a learned state baseline, kept under `state_baseline/`.
    """
    target = Path(folder)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(partial / "adapter", safe_serialization=True)
        model = model.merge_and_unload()
    model.config.use_cache = True
    model.to(dtype).save_pretrained(partial, safe_serialization=True)
    tokenizer.save_pretrained(partial)
    if baseline is not None:
        save_state_baseline(partial, *baseline)
    (partial / "README.md").write_text(_card(card), encoding="utf-8")
    partial.chmod(0o755)
    if target.exists():
        shutil.rmtree(target)
    os.rename(partial, target)
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
        "Aligned with token-level preferences by `tbpo_ray`.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    return "\n".join(lines) + "\n"

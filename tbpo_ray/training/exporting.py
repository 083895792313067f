"""From a checkpoint's slices to a policy that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.plan import RunPaths


def export_checkpoint(
    tree: dict[str, Any],
    run_paths: dict[str, Any],
    card: dict[str, Any],
    folder: str | None = None,
    target: str | None = None,
) -> str:
    """Put the trained weights of a checkpoint into the base model and write it out.

    Args:
        tree: the run's configuration.
        run_paths: the fields of the run's `RunPaths`.
        card: facts for the model card.
        folder: the checkpoint; default: the newest whole one, or the best (`training.export`).
        target: where to write; default: `export` in the run's folder.

    Raises:
        ValueError: where the checkpoint does not cover a trained parameter.
        NotOursError: the run has passed to another driver.
    """
    import torch
    from safetensors.torch import load_file

    from tbpo_ray.models.export import export_policy
    from tbpo_ray.models.load import (
        add_lora,
        load_model,
        load_tokenizer,
        quiet_transformers,
        training_dtype,
    )
    from tbpo_ray.training.optim import head_weights
    from tbpo_ray.training.scorer import PairScorer
    from tbpo_ray.training.state import fill_module

    quiet_transformers()
    config, at = Config.model_validate(tree), RunPaths(**run_paths)
    checkpoints, training = Path(at.checkpoints), config.training
    if folder:
        source: Path | None = Path(folder)
    elif training.export == "best":
        found = ckpt.best(checkpoints, training.best_metric, training.best_mode, 1)
        source = found[0] if found else None
    else:
        source = ckpt.newest(checkpoints).folder
    if source is None:
        raise ValueError(
            f"{at.checkpoints}: no whole checkpoint to export (training.export={training.export})"
        )
    model: Any = load_model(at.model, dtype=torch.float32)
    if config.model.lora is not None:
        model = add_lora(model, config.model.lora)
    fill_module(PairScorer(model), sorted(source.glob("optimizer-*.safetensors")))
    tokenizer = load_tokenizer(at.model, chat_template=config.model.chat_template)
    at.lease.check()
    dtype = training_dtype(config.training.precision)
    baseline = None
    if (source / "head.safetensors").is_file():
        stored = load_file(source / "head.safetensors")
        section = config.objective.state_baseline
        baseline = (head_weights(stored), config.objective.baseline_kind, section.hidden)
    out = target or Path(at.run_dir) / "export"
    return str(export_policy(model, tokenizer, out, dtype=dtype, card=card, baseline=baseline))

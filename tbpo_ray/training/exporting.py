"""Export a checkpoint's slices as a policy that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.run_paths import RunPaths


def export_checkpoint(
    tree: dict[str, Any],
    run_paths: dict[str, Any],
    card: dict[str, Any],
    folder: str | None = None,
    target: str | None = None,
) -> str:
    """Fill the base model with the trained weights of a checkpoint, and write it. Runs as a Ray task.

    Args:
        tree: the run's configuration.
        run_paths: the fields of the run's `RunPaths`.
        card: facts for the model card.
        folder: the checkpoint; by default the newest valid one, or the best (`training.export`).
        target: the folder to write; by default `export` in the run's folder.

    Raises:
        ValueError: there is no checkpoint, or it does not cover a trained parameter.
        LeaseLostError: another driver has taken over the run.
    """
    import torch

    from tbpo_ray.models.attention import cpu_attention
    from tbpo_ray.models.chat import stop_token_ids
    from tbpo_ray.models.export import export_policy
    from tbpo_ray.models.load import add_lora, load_model, load_tokenizer, quiet_transformers, training_dtype
    from tbpo_ray.training.scorer import PairScorer
    from tbpo_ray.training.state import fill_module

    quiet_transformers()
    config, at = Config.model_validate(tree), RunPaths(**run_paths)
    source = Path(folder) if folder else _select_checkpoint(config, Path(at.checkpoints))
    # The master weights are float32, whatever the dtype of the exported ones.
    attention = cpu_attention(config.model.attention)
    model: Any = load_model(at.model, dtype=torch.float32, attention=attention)
    if config.model.lora is not None:
        model = add_lora(model, config.model.lora)
    fill_module(PairScorer(model), sorted(source.glob("optimizer-*.safetensors")))
    tokenizer = load_tokenizer(at.model, chat_template=config.model.chat_template)
    at.lease.check()
    out = export_policy(
        model,
        tokenizer,
        target or Path(at.run_dir) / "export",
        dtype=training_dtype(config.training.precision),
        card=card,
        baseline=_saved_baseline(config, source),
        stop_ids=stop_token_ids(at.model, chat_template=config.model.chat_template),
        base=at.model,
    )
    return str(out)


def _select_checkpoint(config: Config, checkpoints: Path) -> Path:
    training = config.training
    if training.export == "best":
        best = ckpt.best(checkpoints, training.best_metric, training.best_mode, 1)
        source = best[0] if best else None
    else:
        source = ckpt.newest(checkpoints).folder
    if source is None:
        raise ValueError(f"{checkpoints}: no valid checkpoint to export (training.export={training.export})")
    return source


def _saved_baseline(config: Config, checkpoint: Path) -> tuple[dict[str, Any], str, int] | None:
    """Weights, kind and width of the learned state baseline in a checkpoint, if it has one."""
    from safetensors.torch import load_file

    from tbpo_ray.training.optim import head_weights

    file = checkpoint / "head.safetensors"
    if not file.is_file():
        return None
    return (
        head_weights(load_file(file)),
        config.objective.baseline_kind,
        config.objective.state_baseline.hidden,
    )

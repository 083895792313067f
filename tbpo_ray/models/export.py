"""Export a policy as a folder that plain transformers and vLLM can load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

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
    stop_ids: Sequence[int] = (),
    base: str | Path | None = None,
) -> Path:
    """Save weights (safetensors), tokenizer, chat template and a model card, replacing `folder` atomically.

    Args:
        model: a transformers model, or one wrapped by peft, whose adapter is merged into the weights and
            also saved under `adapter/`.
        dtype: the torch dtype of the saved weights.
        card: entries of the model card, name to value.
        baseline: weights, kind and width of a learned state baseline, saved under `state_baseline/`.
        stop_ids: the token ids that end an answer, for `generation_config.json`; default: those it has.
        base: folder of the model that was trained; its license is stated and copied.
    """
    target = Path(folder)
    facts = dict(card)
    if base is not None and (declared := model_license(base)) is not None:
        facts["license"] = declared
    with atomic_folder(target, replace=True) as partial:
        if hasattr(model, "merge_and_unload"):
            # The adapter first: merging removes it from the model.
            model.save_pretrained(partial / "adapter", safe_serialization=True)
            _untie_adapted_embeddings(model.get_base_model())
            model = model.merge_and_unload()
        _state_tying(model)
        model.config.use_cache = True  # training switches it off, and generation needs it
        _complete_generation_config(model, stop_ids)
        model.to(dtype).save_pretrained(partial, safe_serialization=True)
        tokenizer.save_pretrained(partial)
        if baseline is not None:
            save_state_baseline(partial, *baseline)
        if base is not None:
            copy_license(base, partial)
        (partial / "README.md").write_text(_card(facts), encoding="utf-8")
    return target


def _untie_adapted_embeddings(model: Any) -> None:
    """Give the output layer a weight of its own if an adapter changes it or the embedding.

    Merging would otherwise add the update of one to the other, since both share one tensor.
    """
    import torch

    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not any(hasattr(layer, "base_layer") for layer in (output, embedding)):
        return
    head, table = (getattr(layer, "base_layer", layer) for layer in (output, embedding))
    if head.weight.data_ptr() != table.weight.data_ptr():
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _state_tying(model: Any) -> None:
    """Say in the configuration that the output layer has a weight of its own, if it has one.

    Transformers loads both weights where they differ, whatever the configuration says; vLLM follows it.
    """
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or embedding is None or output.weight is embedding.weight:
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _complete_generation_config(model: Any, stop_ids: Sequence[int]) -> None:
    """Enter the stop tokens and make the settings consistent, or transformers refuses to save them."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    present = settings.eos_token_id
    known = set(present) if isinstance(present, list) else {present}
    if stop_ids and known != set(stop_ids):
        settings.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
        settings._from_model_config = False  # the model's own configuration still names one token
    try:
        settings.validate(strict=True)
    except ValueError:
        # Public checkpoints often set a temperature without saying that they sample.
        settings.do_sample = True


def model_license(folder: str | Path) -> str | None:
    """The license that the model card of a folder declares, as an identifier of the Hugging Face hub."""
    file = Path(folder) / "README.md"
    parts = file.read_text(encoding="utf-8").split("---\n", 2) if file.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        facts = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    declared = facts.get("license") if isinstance(facts, dict) else None
    return str(declared) if declared else None


def copy_license(base: str | Path, folder: Path) -> None:
    """Copy the license files of the base model, whose terms apply to what is trained from it."""
    for file in sorted(Path(base).glob("LICENSE*")) if Path(base).is_dir() else []:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _card(facts: Mapping[str, Any]) -> str:
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.get("license"):
        header["license"] = facts["license"]
    header["tags"] = ["tbpo", "preference-optimization"]
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).rstrip(),
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

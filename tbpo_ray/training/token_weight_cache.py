"""Token weights stored next to the prepared pairs, for the objectives that read them.

They are estimated from the log-probs of two models, or of one model under two instructions, each scored once
by `reference_scores`; or they are taken from the records. Runs with the same pairs and settings share them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tbpo_ray.config.helpers import HELPERS
from tbpo_ray.config.loading import digest
from tbpo_ray.config.objective import ObjectiveConfig
from tbpo_ray.config.schema import Config
from tbpo_ray.data.shards import MASK_COLUMNS, ROWS_PER_GROUP, PreparedPairs
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import check_same_tokenizer
from tbpo_ray.models.resolve import local_model, policy_folder
from tbpo_ray.objectives import contrastive_weights, oracle_scores, self_rewards
from tbpo_ray.storage.files import atomic_file, file_lock, write_atomic
from tbpo_ray.storage.paths import cache_dir
from tbpo_ray.training.instructions import check_instruction, tokenize_instruction
from tbpo_ray.training.reference_scores import reference_scores
from tbpo_ray.training.run_plan import RunPlan

VERSION = 2
MANIFEST = "manifest.json"
SIDES = ("chosen", "rejected")
T_REG_INSTRUCTIONS = (
    "Revise your answer to the request below so that it becomes more helpful, correct, coherent and "
    "concise.\n\n{prompt}",
    "Revise your answer to the request below so that it becomes less helpful, incorrect, incoherent and "
    "verbose.\n\n{prompt}",
)
"""What T-REG asks the policy before training to do (arXiv 2412.02685), in words of our own."""


@dataclass(frozen=True)
class WeightModel:
    """A model whose log-probs the weights are estimated from."""

    path: str
    instruction: str
    """Placed before the prompt, or a template around it; may be empty."""


def check_token_weights(plan: RunPlan, *, planned: Collection[str] = ()) -> None:
    """Refuse models from which the weights that the objective reads cannot be estimated.

    Args:
        planned: `positive` and `negative` where the model will be trained first and cannot be checked yet.

    Raises:
        InputError: naming the key.
    """
    own = plan.config.objective
    settings = own.token_weights
    if not plan.objective.needs_weights or own.weights_from_records:
        return
    check_instructions(plan.config)
    policy = policy_folder(plan.config)
    if planned and own.name == "tgdpo":
        return  # its other model is the run's own reference
    if planned:
        given = {"positive": settings.positive, "negative": settings.negative}
        models = {
            side: _resolve(plan.config, side, model, "")
            for side, model in given.items()
            if model is not None and side not in planned
        }
    else:
        models = dict(zip(("positive", "negative"), weight_models(plan.config), strict=True))
    for side, model in models.items():
        check_same_tokenizer(policy, model.path, _model_key(plan.config, side))


def check_instructions(config: Config) -> None:
    """Refuse instructions that are not valid templates.

    Raises:
        InputError: naming the key.
    """
    for side in ("positive", "negative"):
        text = getattr(config.objective.token_weights, f"{side}_instruction")
        if text is not None:
            check_instruction(text, f"objective.token_weights.{side}_instruction")


def weight_models(config: Config) -> tuple[WeightModel, WeightModel]:
    """The positive and the negative model, with the objective's defaults filled in.

    Raises:
        InputError: both are the same, so that every token would get the same weight; or one is not a model.
    """
    settings, name = config.objective.token_weights, config.objective.name
    check_instructions(config)
    if name == "tgdpo":
        return _guide_and_reference(config)
    policy = config.model.name_or_path
    instructions = T_REG_INSTRUCTIONS if name == "t_reg" else ("", "")
    positive = (settings.positive or policy, settings.positive_instruction or instructions[0])
    negative = (settings.negative or policy, settings.negative_instruction or instructions[1])
    if positive == negative:
        raise InputError(
            f"objective.token_weights.positive={settings.positive}: objective.name={name} compares two "
            f"models, or one model under two instructions, and these are the same; {_remedy(name)}, or set "
            "objective.token_weights.source=columns"
        )
    return _resolve(config, "positive", *positive), _resolve(config, "negative", *negative)


def _guide_and_reference(config: Config) -> tuple[WeightModel, WeightModel]:
    guide, reference = config.objective.guide.model, config.model.reference or config.model.name_or_path
    if guide is None or guide == reference:
        problem = "needs a guide" if guide is None else "compares it with the reference, which is the same"
        raise InputError(f"objective.guide.model={guide}: objective.name=tgdpo {problem}; {_remedy('tgdpo')}")
    own = policy_folder(config) if config.model.reference is None else None
    other = own or local_model(reference, cache_dir(config), key="model.reference")
    return _resolve(config, "positive", guide, ""), WeightModel(other, "")


def _model_key(config: Config, side: str) -> str:
    """The key that names one of the two models."""
    if config.objective.name == "tgdpo":
        return "objective.guide.model" if side == "positive" else "model.reference"
    return f"objective.token_weights.{side}"


def _remedy(objective: str) -> str:
    """What to do where the models that an objective compares are missing."""
    helpers = HELPERS.get(objective)
    if helpers is None:
        return "give two instructions"
    models = " and ".join(f"{helper.model_key} ({helper.purpose})" for helper in helpers.values())
    keys = " and ".join(f"objective.helpers.{name}" for name in helpers)
    return f"give {models}; or run jobs/pipeline.py, which trains what is missing as {keys} says"


def _resolve(config: Config, side: str, model: str, instruction: str) -> WeightModel:
    if model == config.model.name_or_path:
        return WeightModel(policy_folder(config), instruction)
    key = _model_key(config, side)
    return WeightModel(local_model(model, cache_dir(config), seed=config.run.seed, key=key), instruction)


def token_weights(
    plan: RunPlan, prepared: PreparedPairs, *, progress: Callable[[str], None] = lambda text: None
) -> Path:
    """Compute the token weights of the prepared pairs, or find them in the cache.

    Returns:
        A folder of Parquet files with the names and rows of the prepared shards and the columns
        `chosen_weights` and `rejected_weights` (list<float32>, one per answer token).

    Raises:
        InputError: the two models are the same, or a record's weights do not match its tokens.
        RunFailedError: some pairs were not scored.
    """
    # Weights exist for whole answers; the objectives that read them do not truncate.
    assert not plan.truncate_to_shorter
    cache, objective = plan.cache_dir, plan.config.objective
    scores: list[Path] = []
    if not objective.weights_from_records:
        scores = [
            reference_scores(
                plan,
                prepared,
                model.path,
                instruction=tokenize_instruction(model.instruction, model.path, plan.config),
                progress=progress,
            )
            for model in weight_models(plan.config)
        ]
    identity = {
        "version": VERSION,
        "pairs": prepared.fingerprint,
        "scores": [folder.name for folder in scores],
        "estimate": objective.name if scores else "given",
    }
    if scores and objective.name == "tis_dpo":
        identity["transform"] = objective.token_weights.transform
    folder = cache / f"weights-{digest(identity)}"
    with file_lock(cache / f".{folder.name}.lock"):
        if not (folder / MANIFEST).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            for file, _ in prepared.shards:
                batches = _estimated(scores, file, objective) if scores else _from_records(prepared, file)
                _write(folder / file, batches)
            write_atomic(folder / MANIFEST, json.dumps(identity, indent=1))
    return folder


Columns = dict[str, list[np.ndarray]]


def _estimated(scores: list[Path], file: str, objective: ObjectiveConfig) -> Iterator[Columns]:
    """Weights estimated from the log-probs of the positive and the negative model, by row group."""
    names = [f"{side}_ref_logps" for side in SIDES]
    batches = [pq.ParquetFile(folder / file).iter_batches(ROWS_PER_GROUP, columns=names) for folder in scores]
    for positive, negative in zip(*batches, strict=True):
        out: Columns = {}
        for side, name in zip(SIDES, names, strict=True):
            ends = np.cumsum(positive[name].value_lengths().to_numpy())[:-1]
            # One answer at a time, because a weight may depend on the others of its answer.
            answers = [np.split(batch[name].flatten().to_numpy(), ends) for batch in (positive, negative)]
            out[f"{side}_weights"] = [
                _estimate(objective, *map(_tensor, pair), chosen=side == "chosen").numpy()[0]
                for pair in zip(*answers, strict=True)
            ]
        yield out


def _tensor(values: np.ndarray) -> Tensor:
    """[T] to [1, T]"""
    return torch.from_numpy(values.copy())[None]


def _estimate(objective: ObjectiveConfig, positive: Tensor, negative: Tensor, *, chosen: bool) -> Tensor:
    if objective.name == "tis_dpo":
        transform = objective.token_weights.transform
        return contrastive_weights(positive, negative, chosen=chosen, transform=transform)
    # The log-ratio of a tuned model and its reference: an oracle's or a guide's implicit reward.
    estimate = self_rewards if objective.name == "t_reg" else oracle_scores
    return estimate(positive, negative)


def _from_records(prepared: PreparedPairs, file: str) -> Iterator[Columns]:
    """Weights that the records bring along, in their columns `chosen_weights` and `rejected_weights`."""
    names = ["chosen_ids", "rejected_ids", *MASK_COLUMNS, "source", "row", "metadata"]
    file_names = pq.read_schema(Path(prepared.path) / file).names
    names = [name for name in names if name in file_names]
    for batch in pq.ParquetFile(Path(prepared.path) / file).iter_batches(ROWS_PER_GROUP, columns=names):
        out: Columns = {f"{side}_weights": [] for side in SIDES}
        for row in batch.to_pylist():
            metadata = json.loads(row["metadata"])
            for side in SIDES:
                out[f"{side}_weights"].append(_record_weights(row, metadata, side))
        yield out


def _record_weights(row: dict[str, Any], metadata: dict[str, Any], side: str) -> np.ndarray:
    tokens, weights = row[f"{side}_ids"], metadata.get(f"{side}_weights")
    fault = f"{len(weights)} numbers" if isinstance(weights, list) else f"{weights!r}"
    if isinstance(weights, list) and len(weights) == len(tokens):
        try:
            values = np.asarray(weights, dtype=np.float32)
        except (TypeError, ValueError):
            values = np.full(1, np.nan)
        if np.isfinite(values).all():
            # Tokens that are context only have a number in the record, but no weight in training.
            mask = row.get(f"{side}_mask")
            return values[np.asarray(mask, dtype=bool)] if mask else values
        fault = "not finite numbers"
    raise InputError(
        f"objective.token_weights.source=columns: {row['source']} row {row['row']}: {side}_weights: {fault} "
        f"for {len(tokens)} tokens of the answer; give one finite number per token, including the end token"
    )


def _write(file: Path, batches: Iterator[Columns]) -> None:
    kind = pa.list_(pa.float32())
    schema = pa.schema([(f"{side}_weights", kind) for side in SIDES])
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial, pq.ParquetWriter(partial, schema) as writer:
        for columns in batches:
            writer.write_table(pa.table({name: pa.array(v, kind) for name, v in columns.items()}, schema))

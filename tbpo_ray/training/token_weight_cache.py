"""Token weights beside the prepared pairs, for the objectives that read them: `tis_dpo`, `sepo`, `t_reg`.

Estimated from the log-probs of two models, or of one model under two instructions, each scored once by the
actor pool of `reference.py`; or taken from the records. Runs with the same pairs and settings share a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tbpo_ray.config.loading import digest
from tbpo_ray.config.schema import Config
from tbpo_ray.data.shards import ROWS_PER_GROUP, Prepared
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import check_same_tokenizer, load_tokenizer
from tbpo_ray.models.resolve import local_model, policy_folder
from tbpo_ray.objectives import Objective, contrastive_weights, oracle_scores, self_rewards
from tbpo_ray.storage.files import file_lock, write_atomic
from tbpo_ray.storage.paths import cache_dir
from tbpo_ray.training.reference_scores import reference_scores

VERSION = 1
MANIFEST = "manifest.json"
SIDES = ("chosen", "rejected")
T_REG_INSTRUCTIONS = (
    "Give the most helpful and harmless answer you can.",
    "Give an unhelpful and harmful answer.",
)


def check_token_weights(config: Config, objective: Objective) -> None:
    """Raises InputError for models that cannot give the weights this objective reads."""
    if objective.needs_weights and config.objective.token_weights.source == "models":
        policy = policy_folder(config)
        for key, (model, _) in zip(("positive", "negative"), weight_models(config), strict=True):
            check_same_tokenizer(policy, model, f"objective.token_weights.{key}")


def weight_models(config: Config) -> list[tuple[str, str]]:
    """(model, instruction before the prompt) of the positive and the negative side, defaults filled in.

    Raises:
        InputError: sides that say the same, so that every token would weigh alike; a model that is none.
    """
    asked, name = config.objective.token_weights, config.objective.name
    own = config.model.name_or_path
    instructions = T_REG_INSTRUCTIONS if name == "t_reg" else ("", "")
    sides = [
        (asked.positive or own, asked.positive_instruction or instructions[0]),
        (asked.negative or own, asked.negative_instruction or instructions[1]),
    ]
    if sides[0] == sides[1]:
        raise InputError(
            f"objective.token_weights.positive={asked.positive}: objective.name={name} compares two models, "
            "or one under two instructions, and these are the same; give "
            + {
                "tis_dpo": "a model trained towards chosen answers, and as objective.token_weights.negative "
                "one trained towards rejected ones",
                "sepo": "the oracle, a model trained with DPO",
            }.get(name, "two instructions")
            + ", or objective.token_weights.source=columns"
        )
    keys = ("positive", "negative")
    return [
        (
            policy_folder(config)
            if model == own
            else local_model(
                model, cache_dir(config), seed=config.run.seed, key=f"objective.token_weights.{key}"
            ),
            instruction,
        )
        for key, (model, instruction) in zip(keys, sides, strict=True)
    ]


def token_weights(
    config: Config, prepared: Prepared, *, progress: Callable[[str], None] = lambda text: None
) -> Path:
    """Folder of Parquet files named as the prepared shards, row for row, with the columns `chosen_weights`
    and `rejected_weights` (list<float32>, one per answer token).

    Raises:
        InputError: no two different models, or records whose columns do not fit their tokens.
        RunFailed: where the scoring could not finish.
    """
    cache, name = cache_dir(config), config.objective.name
    scores: list[Path] = []
    if config.objective.token_weights.source == "models":
        for model, instruction in weight_models(config):
            prefix = _instruction_tokens(config, model, instruction)
            scores.append(
                reference_scores(
                    config, prepared, model, cut=False, cache=cache, prefix=prefix, progress=progress
                )
            )
    identity = {
        "version": VERSION,
        "pairs": prepared.fingerprint,
        "scores": [folder.name for folder in scores],
        "estimate": name if scores else "given",
    }
    folder = cache / f"weights-{digest(identity)}"
    with file_lock(cache / f".{folder.name}.lock"):
        if not (folder / MANIFEST).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            for file, _ in prepared.shards:
                batches = _estimated(scores, file, name) if scores else _given(prepared, file)
                _write(folder / file, batches)
            write_atomic(folder / MANIFEST, json.dumps(identity, indent=1))
    return folder


Columns = dict[str, list[np.ndarray]]


def _estimated(scores: list[Path], file: str, objective: str) -> Iterator[Columns]:
    """Weights from the log-probs under the positive and the negative model."""
    names = [f"{side}_ref_logps" for side in SIDES]
    batches = [pq.ParquetFile(folder / file).iter_batches(ROWS_PER_GROUP, columns=names) for folder in scores]
    for positive, negative in zip(*batches, strict=True):
        out: Columns = {}
        for side, name in zip(SIDES, names, strict=True):
            lists = positive[name]
            values = [
                torch.from_numpy(batch[name].flatten().to_numpy().copy()) for batch in (positive, negative)
            ]
            weights = _estimate(objective, *values, chosen=side == "chosen").numpy()
            sizes = np.cumsum(lists.value_lengths().to_numpy())[:-1]
            out[f"{side}_weights"] = np.split(weights, sizes)
        yield out


def _estimate(objective: str, positive: Tensor, negative: Tensor, *, chosen: bool) -> Tensor:
    if objective == "tis_dpo":
        return contrastive_weights(positive, negative, chosen=chosen)
    return {"sepo": oracle_scores, "t_reg": self_rewards}[objective](positive, negative)


def _given(prepared: Prepared, file: str) -> Iterator[Columns]:
    """Weights from the records' own columns `chosen_weights` and `rejected_weights`."""
    wanted = ["chosen_ids", "rejected_ids", "source", "row", "metadata"]
    for batch in pq.ParquetFile(Path(prepared.path) / file).iter_batches(ROWS_PER_GROUP, columns=wanted):
        out: Columns = {f"{side}_weights": [] for side in SIDES}
        for row in batch.to_pylist():
            metadata = json.loads(row["metadata"])
            for side in SIDES:
                out[f"{side}_weights"].append(_checked(row, metadata, side))
        yield out


def _checked(row: dict[str, Any], metadata: dict[str, Any], side: str) -> np.ndarray:
    tokens, given = row[f"{side}_ids"], metadata.get(f"{side}_weights")
    fault = f"{len(given)} numbers" if isinstance(given, list) else f"{given!r}"
    if isinstance(given, list) and len(given) == len(tokens):
        try:
            values = np.asarray(given, dtype=np.float32)
        except (TypeError, ValueError):
            values = np.full(1, np.nan)
        if np.isfinite(values).all():
            return values
        fault = "not finite numbers"
    raise InputError(
        f"objective.token_weights.source=columns: {row['source']} row {row['row']}: {side}_weights: {fault} "
        f"for {len(tokens)} tokens of the answer; one finite number for each, the end token included"
    )


def _instruction_tokens(config: Config, model: str, instruction: str) -> list[int]:
    if not instruction:
        return []
    tokenizer = load_tokenizer(model)
    return list(tokenizer(instruction.strip() + "\n\n", add_special_tokens=False)["input_ids"])


def _write(file: Path, batches: Iterator[Columns]) -> None:
    kind = pa.list_(pa.float32())
    schema = pa.schema([(f"{side}_weights", kind) for side in SIDES])
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(partial, schema) as writer:
        for columns in batches:
            writer.write_table(pa.table({name: pa.array(v, kind) for name, v in columns.items()}, schema))
    os.replace(partial, file)

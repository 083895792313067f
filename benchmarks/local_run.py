"""Short runs of the built-in task in this process: the platform's own step, without Ray and DeepSpeed.

A comparison of objectives needs hundreds of runs of a few seconds each. Quality is measured without sampling
noise: the expected exact match is the probability that the policy writes exactly the correct answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.models.load import load_model, quiet_transformers
from tbpo_ray.storage.paths import cache_dir
from tbpo_ray.training.batch import PairBatch, collate_columns
from tbpo_ray.training.scorer import PairScorer

EVALUATION_PAIRS = 200
"""Pairs in a batch of the evaluation."""


@dataclass(frozen=True)
class LocalTask:
    """Pairs and a starting policy, shared by many runs.

    Attributes:
        start: folder of the policy that training starts from, which is the reference as well.
        train: the training pairs.
        held_out: prepared pairs by split; their chosen answers are the correct ones.
    """

    config: Config
    start: str
    train: PreparedPairs
    held_out: Mapping[str, PreparedPairs]


def build_task(config: Config, start: str, train: str, held_out: Mapping[str, str]) -> LocalTask:
    """Prepare the pairs, unless they are cached. Needs a Ray session, as `train_policy` does.

    Args:
        start: folder of the starting policy.
        train: source of the training pairs.
        held_out: sources by split.
    """
    quiet_transformers()
    settled = stage_config(config, {"model.name_or_path": start, "data.train": train, "data.eval": None})
    cache = cache_dir(settled)

    def prepared(source: str) -> PreparedPairs:
        spec = PairsSpec(source, stage_config(settled, {"data.train": source}).data, start)
        return prepare(spec, cache, progress=False)

    return LocalTask(settled, start, prepared(train), {name: prepared(s) for name, s in held_out.items()})


def train_policy(task: LocalTask, overrides: Mapping[str, Any]) -> PairScorer:
    """Train a policy with the task's configuration and `overrides`, in this process, from the same seeds.

    Raises:
        InputError: the overrides are invalid.
    """
    from tbpo_ray.data.stream import local_micro_batches
    from tbpo_ray.training.components import build_components
    from tbpo_ray.training.reference_scores import reference_scores
    from tbpo_ray.training.run_paths import RunPaths
    from tbpo_ray.training.run_plan import make_schedule, resolve_run
    from tbpo_ray.training.single_process import train_local

    config = stage_config(task.config, dict(overrides))
    plan = resolve_run(config)
    paths = RunPaths(run_dir="", checkpoints="", model=task.start, prepared=task.train.path)
    torch.manual_seed(config.run.seed)
    parts = build_components(plan, paths, torch.device("cpu"))
    schedule = make_schedule(plan, task.train.lengths())
    extra = []
    if plan.reference_mode == "cached":
        extra = [str(reference_scores(plan, task.train, task.start))]
    stream = local_micro_batches(task.train, schedule, extra_dirs=extra)
    train_local(config, parts, stream, schedule.steps_total)
    return parts.scorer


def load_policy(folder: str) -> PairScorer:
    """An untrained policy, to measure it or to measure against it."""
    return PairScorer(load_model(folder, dtype=torch.float32)).eval()


@torch.no_grad()
def measure(policy: PairScorer, reference: PairScorer, pairs: PreparedPairs) -> dict[str, float]:
    """Score the chosen answers of `pairs`, which are the correct ones.

    Returns:
        `expected_exact_match`, the mean probability of exactly these answers; `entropy`, the policy's mean
        entropy in nats over their tokens; `kl`, the mean of KL(reference || policy) summed over an answer's
        states, in nats.
    """
    policy.eval()
    matches, entropies, divergences, tokens = [], [], [], 0
    for batch in _batches(pairs):
        logp, entropy, kl, *_ = policy(
            batch, outputs=("logp", "entropy", "kl"), reference=reference.output_layer_inputs(batch)
        )
        matches.append(logp[0].sum(-1).exp())
        entropies.append(entropy[0].sum(-1))
        divergences.append(kl[0].sum(-1))
        tokens += int(batch.mask.sum())
    return {
        "expected_exact_match": float(torch.cat(matches).mean()),
        "entropy": float(torch.cat(entropies).sum()) / tokens,
        "kl": float(torch.cat(divergences).mean()),
    }


def _batches(pairs: PreparedPairs) -> Iterator[PairBatch]:
    """The prompts with their chosen answers alone."""
    from tbpo_ray.data.schedule import Schedule
    from tbpo_ray.data.stream import local_micro_batches
    from tbpo_ray.training.batch import BatchLayout

    size = min(EVALUATION_PAIRS, pairs.pairs)
    schedule = Schedule(
        pairs.lengths(), seed=0, pairs_per_step=size, micro_batch_pairs=size, length_batches=False
    )
    layout = BatchLayout(sides=1, pad_id=0, shared_prompt=False, truncate_to_shorter=False)
    for micro in local_micro_batches(pairs, schedule):
        yield collate_columns(micro.columns(), layout)

"""Per-token log-probs of the frozen reference, computed once and stored next to the prepared pairs.

A Ray Data actor pool scores parts of the shards. Each part is a file, so an interrupted job repeats only the
parts that were in progress. Runs and trials with the same pairs and the same reference share one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tbpo_ray.cluster.error_summary import error_summary
from tbpo_ray.cluster.session import is_private
from tbpo_ray.cluster.worker_logs import keep_dead_workers_logs
from tbpo_ray.config.loading import digest
from tbpo_ray.config.schema import Config
from tbpo_ray.data.pair_sizes import measure_pairs
from tbpo_ray.data.schedule import pair_tokens
from tbpo_ray.data.shards import MASK_COLUMNS, PreparedPairs
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.models.attention import choose_attention
from tbpo_ray.models.load import model_config
from tbpo_ray.storage.files import atomic_file, file_lock, write_atomic
from tbpo_ray.training.instructions import Instruction
from tbpo_ray.training.run_plan import RunPlan, resolve_run

VERSION = 2
PART_PAIRS = 512
MANIFEST = "manifest.json"
SCORINGS = "scorings.jsonl"
"""Log, in the cache, of the computations that took place."""
SCORER_LOG = "reference_scores.log"
"""In the folder of the run: what scorers printed that died."""
_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def model_digest(path: str) -> str:
    """Digest of a model folder's content; a hub name is its own content.

    Of large files it reads the first and the last MiB, which tells checkpoints of one model apart.
    """
    folder = Path(path)
    if not folder.is_dir():
        return digest(path)
    sha = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".")):
        size = file.stat().st_size
        sha.update(f"{file.relative_to(folder)}:{size};".encode())
        with file.open("rb") as handle:
            sha.update(handle.read(1 << 20))
            if size > 1 << 20:
                handle.seek(max(1 << 20, size - (1 << 20)))
                sha.update(handle.read())
    return sha.hexdigest()[:16]


def reference_scores(
    plan: RunPlan,
    prepared: PreparedPairs,
    model: str,
    *,
    instruction: Instruction | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Score the prepared pairs under a frozen model, or find the scores in the cache.

    Args:
        model: the reference, as transformers loads it.
        instruction: revises each prompt.
        progress: called with one line after each part.

    Returns:
        A folder of Parquet files with the names and rows of the prepared shards and the columns
        `chosen_ref_logps` and `rejected_ref_logps` (list<float32>, nats, one per answer token that remains
        after truncation).

    Raises:
        RunFailedError: some pairs were not scored.
    """
    cache = plan.cache_dir
    identity = _identity(plan, prepared, model, instruction, scoring_machine(plan.config))
    folder = cache / f"reference-{digest(identity)}"
    with file_lock(cache / f".{folder.name}.lock"):
        if (folder / MANIFEST).is_file():
            progress(f"reference scores: {prepared.pairs} pairs from the cache")
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        _compute(plan, prepared, model, instruction, folder, progress)
        for file, pairs in prepared.shards:
            _assemble(folder, file, pairs)
        write_atomic(folder / MANIFEST, json.dumps(identity, indent=1))
        # Only now: until the manifest is written, an interrupted job reuses the parts.
        for part in folder.glob("scored-*"):
            part.unlink()
        scoring = {"folder": folder.name, "pairs": prepared.pairs, "seconds": time.monotonic() - began}
        with (cache / SCORINGS).open("a", encoding="utf-8") as log:
            log.write(json.dumps(scoring) + "\n")
    return folder


def _identity(
    plan: RunPlan,
    prepared: PreparedPairs,
    model: str,
    instruction: Instruction | None,
    machine: dict[str, str],
) -> dict[str, Any]:
    """Everything that the scores depend on. Its digest names the folder, so keys and order are fixed."""
    # `model` is resolved: a revision or a GGUF file has become a folder by now.
    resolved = plan.config.model.model_copy(update={"revision": None, "gguf_file": None})
    attention = choose_attention(model_config(model, resolved), plan.config.model.attention)
    identity = {
        "version": VERSION,
        "pairs": prepared.fingerprint,
        "model": model_digest(model),
        "cut": plan.truncate_to_shorter,
        "precision": plan.config.training.precision,
        "attention": attention.implementation,
        "shared_prompt": plan.shared_prompt,
        **machine,
    }
    return identity | (instruction.identity if instruction is not None else {})


def scoring_machine(config: Config) -> dict[str, str]:
    """The kind of machine that scores: other kernels round differently, and log-ratios near 0 show it."""
    if is_private() and not config.cluster.gpus:
        return describe_machine(gpu=False)
    import ray

    cluster = config.cluster
    # A small share of a GPU suffices to read its name, and fits next to whatever else uses it.
    task = ray.remote(
        num_cpus=0,
        num_gpus=0.01 if cluster.gpus else 0,
        label_selector=cluster.labels.train if cluster.gpus else cluster.labels.prepare,
    )(describe_machine)
    try:
        machine: dict[str, str] = ray.get(task.remote(cluster.gpus))
    except ray.exceptions.RayError as error:
        raise RunFailedError(
            f"reference scores: no node for scoring answers: {error_summary(error)}"
        ) from error
    return machine


def describe_machine(gpu: bool) -> dict[str, str]:
    """Device type, kind of processor and version of torch of this machine."""
    import torch

    if gpu:
        major, minor = torch.cuda.get_device_capability()
        kind = f"{torch.cuda.get_device_name()} sm_{major}{minor}"
    else:
        kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": "cuda" if gpu else "cpu", "kernel": kind, "torch": torch.__version__}


def scorings(cache: Path) -> list[dict[str, Any]]:
    """The computations of reference scores in this cache, each with `folder`, `pairs` and `seconds`."""
    file = cache / SCORINGS
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def _compute(
    plan: RunPlan,
    prepared: PreparedPairs,
    model: str,
    instruction: Instruction | None,
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    """Score the parts that are missing in `folder`."""
    import ray

    jobs: list[dict[str, Any]] = [
        {
            "shard": str(Path(prepared.path) / file),
            "start": start,
            "stop": min(pairs, start + PART_PAIRS),
            "out": str(folder / _part(file, start)),
        }
        for file, pairs in prepared.shards
        for start in range(0, pairs, PART_PAIRS)
        if not (folder / _part(file, start)).is_file()
    ]
    if not jobs:
        return
    cluster = plan.config.cluster
    actors = max(1, min(len(jobs), cluster.max_workers))
    resources: dict[str, Any] = (
        {"num_gpus": 1} if cluster.gpus else {"num_cpus": cluster.worker_resources.get("CPU", 1.0)}
    )
    rows = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map_batches(
        ReferenceScorer,
        fn_constructor_args=(
            plan.config.model_dump(mode="json"),
            model,
            instruction,
            prepared.path,
            actors,
        ),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        label_selector=cluster.labels.train if cluster.gpus else cluster.labels.prepare,
        **resources,
    )
    began = time.time()
    try:
        _follow(rows.iter_rows(), sum(job["stop"] - job["start"] for job in jobs), progress)
    except ray.exceptions.RayError as error:
        log = keep_dead_workers_logs(plan.run_dir / SCORER_LOG, since=began)
        raise RunFailedError(
            "; ".join(filter(None, (f"reference scores: {error_summary(error)}", log)))
        ) from error


def _follow(rows: Iterable[dict[str, Any]], total: int, progress: Callable[[str], None]) -> None:
    """Report the progress of the scorers.

    Raises:
        InputError: the reference cannot be scored correctly.
        RunFailedError: some pairs were not scored.
    """
    done = 0
    notes: set[str] = set()
    for row in rows:
        if row["refusal"]:
            raise InputError(*row["refusal"].splitlines())
        for note in set(row["note"].splitlines()) - notes:
            notes.add(note)
            progress(f"reference scores: {note}")
        done += row["pairs"]
        progress(f"reference scores: {done}/{total} pairs")
    if done != total:
        raise RunFailedError(f"reference scores: {done} of {total} pairs were scored")


class ReferenceScorer:
    """Actor that scores parts of shards.

    Args:
        tree: the run's configuration.
        model: the reference, as transformers loads it.
        instruction: revises each prompt.
        prepared: folder of the prepared pairs, some of which the self-check scores.
        actors: how many share this machine's cores.
    """

    def __init__(
        self, tree: dict[str, Any], model: str, instruction: Instruction | None, prepared: str, actors: int
    ):
        import torch

        from tbpo_ray.models.load import quiet_transformers
        from tbpo_ray.training.components import load_checked
        from tbpo_ray.training.scorer import PairScorer
        from tbpo_ray.training.self_check import select_pairs

        quiet_transformers()
        # Few pairs are scored at a time, and without gradients: packing them would gain nothing.
        self.plan = replace(resolve_run(Config.model_validate(tree)), packed=False)
        self.instruction = instruction
        self.device = torch.device("cuda" if self.plan.config.cluster.gpus else "cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // actors))
        key = "model.reference" if self.plan.config.model.reference else "model.name_or_path"
        # Ray Data would wrap an error and restart the actor: the caller raises it from the results.
        self.refusal, self.note = "", ""
        try:
            loaded = load_checked(
                self.plan, model, self.device, select_pairs([PreparedPairs.load(prepared)]), key=key
            )
        except InputError as error:
            self.refusal = str(error)
        else:
            self.scorer = PairScorer(loaded.network.requires_grad_(False)).eval()
            self.layout, self.note = loaded.layout, "\n".join(loaded.sentences)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score the parts that the rows of `batch` describe, and write each to a file of its own."""
        jobs = len(batch["shard"])
        if self.refusal:
            return {"pairs": [0] * jobs, "refusal": [self.refusal] * jobs, "note": [""] * jobs}
        counts = []
        for shard, start, stop, out in zip(
            batch["shard"], batch["start"], batch["stop"], batch["out"], strict=True
        ):
            names = [n for n in (*_COLUMNS, *MASK_COLUMNS) if n in pq.read_schema(shard).names]
            table = pq.read_table(shard, columns=names).slice(int(start), int(stop - start))
            # A mask that is null, since all tokens are trained, becomes empty.
            columns = {n: [np.asarray(v or [], dtype=np.int64) for v in table[n].to_pylist()] for n in names}
            _write_scores(Path(str(out)), *self._score_under_instruction(columns))
            counts.append(table.num_rows)
        return {"pairs": counts, "refusal": [""] * jobs, "note": [self.note] * jobs}

    def _score_under_instruction(
        self, columns: dict[str, list[np.ndarray]]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        if self.instruction is None:
            return self.score(columns)
        if not self.instruction.with_answer:
            return self.score(self._revised(columns, "chosen_ids"))
        # The prompt shows the answer, so that each side has a prompt of its own.
        chosen, _ = self.score(self._revised(columns, "chosen_ids"))
        _, rejected = self.score(self._revised(columns, "rejected_ids"))
        return chosen, rejected

    def _revised(self, columns: dict[str, list[np.ndarray]], answers: str) -> dict[str, list[np.ndarray]]:
        """The columns with the prompts under the instruction, which may show the answers of that column."""
        assert self.instruction is not None
        pairs = zip(columns["prompt_ids"], columns[answers], strict=True)
        return {**columns, "prompt_ids": [self.instruction.revise(*pair) for pair in pairs]}

    def score(self, columns: dict[str, list[np.ndarray]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Log-probs of the trained tokens of both answers of each pair, float32, in the given order."""
        from tbpo_ray.training.batch import collate_columns

        pairs = len(columns["prompt_ids"])
        masks = [columns.get(name, [()] * pairs) for name in MASK_COLUMNS]
        prompts, *answers = (columns[name] for name in _COLUMNS)
        lengths = measure_pairs(prompts, answers, masks)
        # Batches of pairs of similar length need little padding.
        order = np.argsort(pair_tokens(lengths, self.plan.truncate_to_shorter), kind="stable").tolist()
        size = self.plan.config.training.scoring_pairs
        chosen: list[Any] = [None] * pairs
        rejected: list[Any] = [None] * pairs
        for at in range(0, pairs, size):
            rows = order[at : at + size]
            selected = {name: [column[i] for i in rows] for name, column in columns.items()}
            batch = collate_columns(selected, self.layout).to(self.device)
            logps = self.scorer.reference_logps(batch).float().cpu().numpy()
            tokens = batch.mask.sum(-1).cpu().numpy()
            for k, i in enumerate(rows):
                chosen[i], rejected[i] = logps[0, k, : tokens[0, k]], logps[1, k, : tokens[1, k]]
        return chosen, rejected


def _write_scores(out: Path, chosen: list[np.ndarray], rejected: list[np.ndarray]) -> None:
    kind = pa.list_(pa.float32())
    table = pa.table(
        {"chosen_ref_logps": pa.array(chosen, kind), "rejected_ref_logps": pa.array(rejected, kind)}
    )
    with atomic_file(out) as partial:
        pq.write_table(table, partial)


def _assemble(folder: Path, file: str, pairs: int) -> None:
    """Concatenate a shard's parts, one row group each."""
    target = folder / file
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    parts = [folder / _part(file, start) for start in range(0, pairs, PART_PAIRS)]
    with atomic_file(target) as partial, pq.ParquetWriter(partial, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))


def _part(file: str, start: int) -> str:
    return f"scored-{Path(file).stem}-{start:08d}.parquet"

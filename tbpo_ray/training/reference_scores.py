"""Per-token log-probs of the frozen reference, computed once and stored beside the prepared pairs.

A Ray Data actor pool scores parts of the shards; each part is a file, so an interrupted job repeats at
most the parts under way. Runs and trials with the same pairs and the same reference share one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tbpo_ray.config.loading import digest
from tbpo_ray.config.schema import Config
from tbpo_ray.data.prepare import Prepared
from tbpo_ray.data.schedule import pair_tokens
from tbpo_ray.errors import RunFailedError
from tbpo_ray.storage.files import file_lock, write_atomic

VERSION = 1
PART_PAIRS = 512
MANIFEST = "manifest.json"
SCORINGS = "scorings.jsonl"


def model_digest(path: str) -> str:
    """Content digest of a model folder: sizes of all files, bytes of the small ones, both ends of the
    large ones. A hub name stands for itself."""
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
    config: Config,
    prepared: Prepared,
    model: str,
    *,
    cut: bool,
    cache: Path,
    prefix: Sequence[int] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Folder of Parquet files named as the prepared shards, row for row, with the columns
    `chosen_ref_logps` and `rejected_ref_logps` (list<float32>, nats, one per answer token up to the cut).

    Args:
        model: the reference, as transformers loads it.
        cut: score tokens up to the shorter answer only.
        prefix: token ids put before each prompt, behind its BOS; an instruction.
        progress: gets a sentence now and then.

    Raises:
        RunFailed: where the actors could not finish.
    """
    identity = {
        "version": VERSION,
        "pairs": prepared.fingerprint,
        "model": model_digest(model),
        "cut": cut,
        "precision": config.training.precision,
        "attention": config.model.attention,
    }
    if prefix:
        identity["prefix"] = list(prefix)
    folder = cache / f"reference-{digest(identity)}"
    with file_lock(cache / f".{folder.name}.lock"):
        if (folder / MANIFEST).is_file():
            progress(f"reference scores: {prepared.pairs} pairs from the cache")
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        _compute(config, prepared, model, cut, prefix, folder, progress)
        for file, pairs in prepared.shards:
            _assemble(folder, file, pairs)
        write_atomic(folder / MANIFEST, json.dumps(identity, indent=1))
        for part in folder.glob("scored-*"):
            part.unlink()
        scoring = {"folder": folder.name, "pairs": prepared.pairs, "seconds": time.monotonic() - began}
        with (cache / SCORINGS).open("a", encoding="utf-8") as log:
            log.write(json.dumps(scoring) + "\n")
    return folder


def scorings(cache: Path) -> list[dict[str, Any]]:
    """Every time that reference scores were computed into this cache: `folder`, `pairs`, `seconds`."""
    file = cache / SCORINGS
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def _compute(
    config: Config,
    prepared: Prepared,
    model: str,
    cut: bool,
    prefix: Sequence[int],
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    import ray

    jobs: list[dict[str, Any]] = []
    for file, pairs in prepared.shards:
        for start in range(0, pairs, PART_PAIRS):
            name = _part(file, start)
            if not (folder / name).is_file():
                jobs.append(
                    {
                        "shard": str(Path(prepared.path) / file),
                        "start": start,
                        "stop": min(pairs, start + PART_PAIRS),
                        "out": str(folder / name),
                    }
                )
    if not jobs:
        return
    actors = max(1, min(len(jobs), config.cluster.max_workers))
    resources: dict[str, Any] = (
        {"num_gpus": 1}
        if config.cluster.gpus
        else {"num_cpus": config.cluster.worker_resources.get("CPU", 1.0)}
    )
    pools = config.cluster.labels
    rows = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map_batches(
        ReferenceScorer,
        fn_constructor_args=(config.model_dump(mode="json"), model, cut, list(prefix), actors),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        label_selector=pools.train if config.cluster.gpus else pools.prepare,
        **resources,
    )
    done, total = 0, sum(j["stop"] - j["start"] for j in jobs)
    for row in rows.iter_rows():
        done += row["pairs"]
        progress(f"reference scores: {done}/{total} pairs")
    if done != total:
        raise RunFailedError(f"reference scores: {done} of {total} pairs were scored")


class ReferenceScorer:
    """Actor: scores parts of shards."""

    def __init__(self, tree: dict[str, Any], model: str, cut: bool, prefix: list[int], actors: int):
        import torch

        from tbpo_ray.models.load import load_model, load_tokenizer, quiet_transformers, training_dtype
        from tbpo_ray.training.components import uses_shared_prompt
        from tbpo_ray.training.scorer import PairScorer

        quiet_transformers()
        config = Config.model_validate(tree)
        self.config, self.cut, self.prefix = config, cut, np.asarray(prefix, dtype=np.int64)
        self.device = torch.device("cuda" if config.cluster.gpus else "cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // actors))
        dtype = training_dtype(config.training.precision)
        frozen = load_model(model, dtype=dtype, attention=config.model.attention)
        self.scorer = PairScorer(frozen.requires_grad_(False).to(self.device)).eval()  # type: ignore[arg-type]
        tokenizer = load_tokenizer(model)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.bos = tokenizer.bos_token_id
        self.shared = uses_shared_prompt(config)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
        counts = []
        for shard, start, stop, out in zip(
            batch["shard"], batch["start"], batch["stop"], batch["out"], strict=True
        ):
            names = ["prompt_ids", "chosen_ids", "rejected_ids"]
            table = pq.read_table(shard, columns=names).slice(int(start), int(stop - start))
            columns = {n: [np.asarray(v, dtype=np.int64) for v in table[n].to_pylist()] for n in names}
            columns["prompt_ids"] = [self._instructed(ids) for ids in columns["prompt_ids"]]
            self._write(Path(str(out)), self.score(columns))
            counts.append(table.num_rows)
        return {"pairs": counts}

    def _instructed(self, prompt: np.ndarray) -> np.ndarray:
        at = 1 if len(prompt) and prompt[0] == self.bos else 0
        return np.concatenate([prompt[:at], self.prefix, prompt[at:]])

    def score(self, columns: dict[str, list[np.ndarray]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Log-probs of chosen and rejected tokens of each pair, float32."""
        from tbpo_ray.training.batch import collate_columns

        pairs = len(columns["prompt_ids"])
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        sizes = np.array([[len(ids) for ids in columns[name]] for name in names]).T
        order = np.argsort(pair_tokens(sizes, self.cut), kind="stable").tolist()
        size = self.config.training.micro_batch_pairs
        chosen: list[Any] = [None] * pairs
        rejected: list[Any] = [None] * pairs
        for at in range(0, pairs, size):
            rows = order[at : at + size]
            picked = {n: [c[i] for i in rows] for n, c in columns.items()}
            batch = collate_columns(picked, sides=2, pad_id=self.pad, shared=self.shared, cut=self.cut).to(
                self.device
            )
            logp = self.scorer.reference_logps(batch).float().cpu().numpy()
            lengths = batch.mask.sum(-1).cpu().numpy()
            for k, i in enumerate(rows):
                chosen[i], rejected[i] = logp[0, k, : lengths[0, k]], logp[1, k, : lengths[1, k]]
        return chosen, rejected

    def _write(self, out: Path, scores: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
        kind = pa.list_(pa.float32())
        table = pa.table(
            {"chosen_ref_logps": pa.array(scores[0], kind), "rejected_ref_logps": pa.array(scores[1], kind)}
        )
        partial = out.with_name(f".{out.name}.{os.getpid()}")
        pq.write_table(table, partial)
        os.replace(partial, out)


def _assemble(folder: Path, file: str, pairs: int) -> None:
    """Put a shard's parts together, one row group after the other."""
    target = folder / file
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    parts = [folder / _part(file, start) for start in range(0, pairs, PART_PAIRS)]
    partial = target.with_name(f".{target.name}.partial")
    with pq.ParquetWriter(partial, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))
    os.replace(partial, target)


def _part(file: str, start: int) -> str:
    return f"scored-{Path(file).stem}-{start:08d}.parquet"

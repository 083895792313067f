"""Prepare pairs: turn raw rows into tokenized Parquet shards, once for all runs that need the same pairs.

The folder of the shards is named by a fingerprint of everything that determines their content. A complete
folder is reused. Otherwise the pairs are built in a temporary folder that is renamed at the end, so that a
crash leaves nothing that looks complete, and of two concurrent builders the first one wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import DataConfig, Sources
from tbpo_ray.data.build_results import merge_results, write_manifest
from tbpo_ray.data.ray_data import run_chunks
from tbpo_ray.data.records import FORMAT_PREFIX
from tbpo_ray.data.rejection_reasons import rejection_counts
from tbpo_ray.data.shard_writer import JOB, TOKENIZER, BuildJob, ChunkResult, process_chunk
from tbpo_ray.data.shards import QUARANTINE, PreparedPairs
from tbpo_ray.data.sources import ROWS_PER_CHUNK, SourceFile, iter_chunks, resolve_source
from tbpo_ray.data.tokenize import TokenizerSpec
from tbpo_ray.errors import InputError
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import atomic_folder

CODE_VERSION = 6
"""Increment it when the same input would give other pairs, so that existing shards are rebuilt."""
_STALE_SECONDS = 24 * 3600
"""A build folder without a new shard for this long was left behind by a killed process."""
_PROGRESS_SECONDS = 3
_ALL_RECORDS = (0.0, 1.0)
_LOSSES = {
    "prompt_repeated": "records whose answers repeat the prompt; it is taken off both answers",
    "prompt_altered_by_template": "prompts of which the chat template does not write every turn",
    "answer_altered_by_template": "answers that the chat template does not write as they are",
    "answer_rendered_plain": "answers that the chat template refuses or hides; their text is trained",
    "tools_ignored_by_template": "records whose tools the chat template does not write",
    "turn_without_end": "turns within answers to which the chat template gives no end token",
    "prompt_truncated": "prompts lose their beginning at data.max_prompt_length",
    "chosen_truncated": "chosen answers are cut at data.max_length",
    "rejected_truncated": "rejected answers are cut at data.max_length",
}
"""Names of counts of what records hold and prepared pairs do not, and what is said about each."""


@dataclass(frozen=True)
class PairsSpec:
    """The settings that determine the content of prepared pairs."""

    source: Sources
    """One source, or several with weights (2 takes every record twice, 0.5 a seeded half of them)."""
    data: DataConfig
    tokenizer: str
    """A folder or a hub name."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's own template, or `none`."""
    role: str = "train"
    """The use of the pairs, for messages and for the default of `max_pairs`: `train` or `eval`."""
    max_pairs: int | None = None
    """Read at most this many records; default `data.max_pairs`, or `data.max_eval_pairs` for `eval`."""
    seed: int = 0
    """Seed of the sampling that fractional weights need."""
    keep_ties: bool = False
    """Whether pairs in which neither answer is better are kept and marked, for `objective.ties`."""

    @property
    def key(self) -> str:
        """The configuration key of the source, for messages."""
        return f"data.{self.role}"

    @property
    def limit(self) -> int | None:
        """The maximum number of records to read."""
        return self.max_pairs or (self.data.max_eval_pairs if self.role == "eval" else self.data.max_pairs)

    @property
    def share(self) -> tuple[float, float]:
        """The interval of the draws of the records to take; all of them for `eval`."""
        return self.data.share_range if self.role == "train" else _ALL_RECORDS


def prepare(
    spec: PairsSpec,
    cache_dir: str | Path,
    *,
    progress: bool = True,
    distributed: bool | None = None,
    labels: Mapping[str, str] | None = None,
    before_build: Callable[[], None] | None = None,
) -> PreparedPairs:
    """The prepared pairs of a specification, from the cache or built now.

    Args:
        cache_dir: the folder of `pairs-<fingerprint>/`, on storage that all nodes share.
        progress: report the progress on stderr.
        distributed: build with Ray Data; by default if Ray is running.
        labels: node labels that a distributed build requires.
        before_build: called before the pairs are built, if they are not in the cache; may wait for nodes.

    Raises:
        InputError: when a source is missing, empty or unreadable, or has more bad records than
            `data.quarantine_limit` allows.
    """
    plan = _BuildPlan(spec, Path(cache_dir).absolute())
    prepared = _load_cached(plan.folder)
    if prepared is None:
        if before_build is not None:
            before_build()
        run = partial(_run, plan.job, distributed=distributed, labels=labels)
        prepared = _build(plan, run, progress)
    if progress and not all(file.format == "copyedit" for file in plan.files):
        _report_shapes(spec, prepared.counts)
        _report_arguments(plan.tokenizer)
    _check_counts(spec, prepared.counts, prepared.quarantine_file)
    return prepared


def find_sources(source: Sources, key: str = "data.train") -> tuple[list[SourceFile], list[float]]:
    """The files of a configuration's sources and the weight of each; fast, and does not need Ray.

    Raises:
        InputError: with one sentence per source that does not exist or has an unknown format.
    """
    mix = [(source, 1.0)] if isinstance(source, str) else [(item.source, item.weight) for item in source]
    if not mix:
        raise InputError(f"{key}: the list of sources is empty")
    faults, files, weights = [], [], []
    for name, weight in mix:
        try:
            found = resolve_source(name)
        except InputError as error:
            faults += [f"{key}: {fault}" for fault in error.faults]
            continue
        files += found
        weights += [weight] * len(found)
    if faults:
        raise InputError(*faults)
    return files, weights


class _BuildPlan:
    """A specification with its sources found, its tokenizer loaded and its fingerprint computed."""

    def __init__(self, spec: PairsSpec, cache_dir: Path):
        self.spec = spec
        self.files, self.weights = find_sources(spec.source, spec.key)
        self.tokenizer = TokenizerSpec.load(spec.tokenizer, spec.chat_template, spec.data.template_kwargs)
        self.folder = cache_dir / f"pairs-{self.fingerprint}"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything that determines the content of the pairs; the manifest records it."""
        data = self.spec.data
        share = self.spec.share
        samples = share != _ALL_RECORDS or any(weight != int(weight) for weight in self.weights)
        return {
            "code_version": CODE_VERSION,
            "sources": [
                {"address": file.address, "format": file.format, "digest": file.digest(), "weight": weight}
                for file, weight in zip(self.files, self.weights, strict=True)
            ],
            "tokenizer": self.tokenizer.digest,
            "max_length": data.max_length,
            "prompt_limit": data.prompt_limit,
            "limit": self.spec.limit,
            **_changed_reading(data),
            **({"share": list(share)} if share != _ALL_RECORDS else {}),
            # Only sampling uses the seed; without it, runs with different seeds share their pairs.
            "seed": self.spec.seed if samples or data.pairing == "best_random" else 0,
            "card_column": data.card_column,
            **({"keep_ties": True} if self.spec.keep_ties else {}),
        }

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def job(self) -> BuildJob:
        """The settings that the workers need."""
        data = self.spec.data
        return BuildJob(
            files=[(file.address, file.format) for file in self.files],
            weights=self.weights,
            seed=self.spec.seed,
            max_length=data.max_length,
            prompt_limit=data.prompt_limit,
            card_column=data.card_column,
            limit=self.spec.limit,
            chunk_rows=ROWS_PER_CHUNK,
            format=data.format,
            pairing=data.pairing,
            pairing_gap=data.pairing_gap,
            keep_ties=self.spec.keep_ties,
            swap_answers=data.swap_answers,
            share=self.spec.share,
        )


def _changed_reading(data: DataConfig) -> dict[str, Any]:
    """The settings of how rows become pairs that are not at their defaults."""
    values = {key: getattr(data, key) for key in ("format", "pairing", "pairing_gap", "swap_answers")}
    return {key: value for key, value in values.items() if value != DataConfig.model_fields[key].default}


def _report_shapes(spec: PairsSpec, counts: Mapping[str, float]) -> None:
    """Say which shape of rows `data.format: auto` found, how to overrule it, and how many rows tie."""
    shapes = {
        name.removeprefix(FORMAT_PREFIX): int(number)
        for name, number in counts.items()
        if name.startswith(FORMAT_PREFIX)
    }
    if shapes and spec.data.format == "auto":
        found = ", ".join(f"{number:,} records as {name}" for name, number in shapes.items())
        log_progress(f"{spec.key}: read {found} (data.format=auto; set data.format to overrule it)")
    if counts.get("ties"):
        log_progress(
            f"{spec.key}: skipped {int(counts['ties']):,} records whose answers tie or differ by less than "
            f"data.pairing_gap={spec.data.pairing_gap:g}"
        )
    if counts.get("tie_pairs"):
        log_progress(f"{spec.key}: kept {int(counts['tie_pairs']):,} pairs whose answers tie, marked as ties")
    report_losses(spec.key, counts)


def report_losses(key: str, counts: Mapping[str, float], where: str = "") -> None:
    """Say what records hold and prepared pairs do not.

    Args:
        key: the configuration key of the source.
        counts: counts of rules by name.
        where: words behind each sentence.
    """
    for rule, sentence in _LOSSES.items():
        if counts.get(rule):
            log_progress(f"{key}: {int(counts[rule]):,} {sentence} ({rule}){where}")


def _report_arguments(tokenizer: TokenizerSpec) -> None:
    """Say which of `data.template_kwargs` the chat template does not read, as after a misspelt name."""
    template = tokenizer.chat_template
    known = template.variables if template is not None else frozenset()
    for name, value in tokenizer.template_kwargs.items():
        if name not in known:
            read = ", ".join(sorted(known)) or "no argument"
            log_progress(
                f"data.template_kwargs.{name}={value!r}: has no effect, since the chat template reads {read}"
            )


def _load_cached(folder: Path) -> PreparedPairs | None:
    """The prepared pairs in `folder` if it is complete; a damaged folder is removed."""
    if not folder.is_dir():
        return None
    try:
        return PreparedPairs.load(folder, check_files=True)
    except InputError:
        # Renamed before it is deleted, so that no other process finds it half deleted under its name.
        trash = Path(tempfile.mkdtemp(prefix=f".{folder.name}-damaged-", dir=folder.parent))
        os.rename(folder, trash / folder.name)
        shutil.rmtree(trash, ignore_errors=True)
        return None


def _build(plan: _BuildPlan, run: Callable[[Path], Iterator[ChunkResult]], progress: bool) -> PreparedPairs:
    spec, folder = plan.spec, plan.folder
    _remove_stale_builds(folder)
    with atomic_folder(folder) as partial_folder:
        plan.job.save(partial_folder, plan.tokenizer)
        results = _with_progress(run(partial_folder), spec.key) if progress else run(partial_folder)
        # Chunks finish in any order; sorting makes the ids of the pairs independent of it.
        ordered = sorted(results, key=lambda result: (result.file, result.first_row))
        counts = merge_results(partial_folder, ordered)
        quarantine = folder.parent / f"quarantine-{plan.fingerprint}.jsonl"
        if not counts["records"]:
            names = ", ".join(file.address for file in plan.files)
            raise InputError(f"{spec.key}={names}: is empty; a preference source must have at least one row")
        try:
            _check_counts(spec, counts, quarantine, partial_folder / QUARANTINE)
        except InputError:
            if progress:
                _report_shapes(spec, counts)
            if (partial_folder / QUARANTINE).is_file():
                os.replace(partial_folder / QUARANTINE, quarantine)  # the message refers the user to it
            raise
        write_manifest(partial_folder, ordered, counts, plan.fingerprint, plan.inputs)
        (partial_folder / JOB).unlink()
        (partial_folder / TOKENIZER).unlink()
    return PreparedPairs.load(folder)


def _remove_stale_builds(folder: Path) -> None:
    for stale in folder.parent.glob(f".{folder.name}-*"):
        if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(stale, ignore_errors=True)


def _run(
    job: BuildJob, folder: Path, *, distributed: bool | None, labels: Mapping[str, str] | None
) -> Iterator[ChunkResult]:
    """Process every chunk, with Ray Data or in this process."""
    if distributed is None:
        ray = sys.modules.get("ray")
        distributed = ray is not None and ray.is_initialized()
    if distributed:
        yield from run_chunks(job, str(folder), labels)
        return
    remaining = job.limit
    for index, (address, kind) in enumerate(job.files):
        for chunk in iter_chunks(SourceFile(address, kind), job.chunk_rows, remaining):
            yield process_chunk(str(folder), index, chunk)
            remaining = None if remaining is None else remaining - chunk.rows
        if remaining == 0:
            return


def _with_progress(results: Iterable[ChunkResult], key: str) -> Iterator[ChunkResult]:
    """Pass the results through and report the progress every few seconds."""
    start = reported = time.monotonic()
    records = bad = 0
    for result in results:
        records += result.records
        bad += sum(rejection_counts(result.counts).values())
        now = time.monotonic()
        if now - reported > _PROGRESS_SECONDS:
            reported = now
            rate = records / (now - start)
            log_progress(f"prepare {key}: {records:,} records, {bad:,} bad, {rate:,.0f} records/s")
        yield result


def _check_counts(
    spec: PairsSpec, counts: Mapping[str, float], quarantine: Path | None, written: Path | None = None
) -> None:
    """Check that enough records are good, and that there is a pair at all.

    Args:
        quarantine: the quarantine file to name in messages.
        written: where that file is now, by default there.

    Raises:
        InputError: with the number of records for each reason.
    """
    records, bad, limit = int(counts["records"]), int(counts["quarantined"]), spec.data.quarantine_limit
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in rejection_counts(counts).items())
    where = f"; see {quarantine}" if quarantine else ""
    if bad == records:
        raise InputError(
            f"{spec.key}: none of its {records:,} records is a preference pair ({reasons})"
            f"{_first_detail(written or quarantine)}{where}"
        )
    if bad > limit * records:
        raise InputError(
            f"{spec.key}: {bad:,} of {records:,} records ({bad / records:.1%}) are not preference pairs "
            f"({reasons}), more than data.quarantine_limit={limit} allows{where}"
        )
    ties = int(counts.get("ties", 0))
    if not counts["pairs"] and ties:
        raise InputError(
            f"{spec.key}: it gives no pairs: in {ties:,} of {records:,} records the answers tie or differ by "
            f"less than data.pairing_gap={spec.data.pairing_gap:g}"
        )
    if not counts["pairs"] and counts.get("skipped_by_share"):
        raise InputError(
            f"data.share={spec.data.share}: selects no pairs of the {records:,} records of {spec.key}; "
            "increase it"
        )
    if not counts["pairs"]:
        raise InputError(f"{spec.key}: its weights select no pairs; increase them")


def _first_detail(quarantine: Path | None) -> str:
    """What was found in the first record of a quarantine file, as the end of a sentence."""
    if quarantine is None or not quarantine.is_file():
        return ""
    with open(quarantine, encoding="utf-8") as lines:
        detail = json.loads(lines.readline())["detail"]
    return f"; in the first one {detail}" if detail else ""

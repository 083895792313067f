"""Collect what a comparison shows: verdicts of runs, with their training curves and configurations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbpo_ray.config.loading import flatten, read_stored, rename_deprecated_keys
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.evaluation.verdict import VERDICT, PolicyVerdict, Verdict
from tbpo_ray.redaction import redact_tree
from tbpo_ray.storage.json_lines import loads_numbers
from tbpo_ray.storage.paths import output_dir
from tbpo_ray.tracking.run_note import RUN_NOTE, read_run_note

IGNORED_KEYS = (
    "run.name", "run.output_dir", "evaluation.", "compare.", "runs", "tune.", "tracking.", "sft.", "export.",
)  # fmt: skip
"""Prefixes of keys that do not count as configuration differences: they do not change the policy."""


@dataclass(frozen=True)
class Entry:
    """One policy of the comparison."""

    label: str
    policy: PolicyVerdict
    verdict: Verdict
    samples: Path
    run_id: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    """Flattened configuration of the training run, with secrets redacted; empty without a training run."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `metrics.jsonl`."""


def collect(config: Config) -> list[Entry]:
    """Collect every policy of the verdicts of `runs`, or of the run's own verdict when `runs` is empty.

    A policy that is in several verdicts, with the same folder on the same prompts, is listed once: it is
    their common baseline.

    Raises:
        InputError: a run does not exist, or has no verdict.
    """
    output = output_dir(config)
    folders = [_run_folder(run, output) for run in (config.runs or [config.run.name])]
    collected: list[tuple[str, PolicyVerdict, Verdict, Path]] = []
    seen: set[tuple[str, str]] = set()
    for folder in folders:
        file = _verdict_file(folder)
        verdict = Verdict.load(file)
        for policy in verdict.policies:
            key = (policy.model, verdict.prompts["digest"])
            if key not in seen:
                seen.add(key)
                collected.append((folder.name, policy, verdict, file.parent / policy.samples))
    names = [policy.name for _, policy, _, _ in collected]
    return [
        _entry(
            policy.name if names.count(policy.name) == 1 else f"{run}/{policy.name}", policy, verdict, samples
        )
        for run, policy, verdict, samples in collected
    ]


def differences(entries: list[Entry]) -> list[tuple[str, list[str]]]:
    """List the configuration keys in which trained entries differ, with the value of each entry."""
    trained = [entry for entry in entries if entry.settings]
    keys = dict.fromkeys(key for entry in trained for key in entry.settings)
    rows = []
    for key in keys:
        values = [json.dumps(entry.settings.get(key), ensure_ascii=False, default=str) for entry in trained]
        if len(set(values)) > 1 and not key.startswith(IGNORED_KEYS):
            rows.append((key, [value.strip('"') for value in values]))
    return rows


def _run_folder(run: str, output: Path) -> Path:
    for folder in (output / run, Path(run)):
        if folder.is_dir():
            return folder.absolute()
    raise InputError(f"runs: {run!r} does not exist in {output}; give names of runs or their folders")


def _verdict_file(folder: Path) -> Path:
    for file in (folder / "evaluation" / VERDICT, folder / VERDICT):
        if file.is_file():
            return file
    raise InputError(
        f"runs: {folder.name} has no verdict; evaluate it with python jobs/evaluate.py --config ... "
        f"run.name={folder.name}"
    )


def _entry(label: str, policy: PolicyVerdict, verdict: Verdict, samples: Path) -> Entry:
    run = Path(policy.model).parent
    settings: dict[str, Any] = {}
    curve: list[dict[str, Any]] = []
    run_id = verdict.run_id
    if (run / "config.yaml").is_file() and (run / "metrics.jsonl").is_file():
        stored = rename_deprecated_keys(read_stored(run / "config.yaml"), log=False)
        settings = flatten(redact_tree(stored))
        curve = _rows(run / "metrics.jsonl")
        run_id = read_run_note(run / RUN_NOTE) or run_id
    return Entry(label, policy, verdict, samples, run_id, settings, curve)


def _rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file; the last line is incomplete while a run writes it, and is skipped."""
    lines = file.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows += [loads_numbers(line)] if line else []
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"{file}: line {number} is not a row of metrics ({first_line(error, 80)})"
            ) from error
    return rows

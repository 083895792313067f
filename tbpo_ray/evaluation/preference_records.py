"""Judged answers as preference records: training data from a policy's own samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tbpo_ray.data.records import Prompt
from tbpo_ray.evaluation.judgments import ComparedAnswers
from tbpo_ray.evaluation.prompts import PromptSet
from tbpo_ray.generation.samples import Sample
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.json_lines import dumps

FILE = "preference_pairs.jsonl"
TIE = 0.5


def write_records(
    folder: Path, prompts: PromptSet, compared: Mapping[str, ComparedAnswers], baseline: str
) -> Counter[str]:
    """Write `preference_pairs.jsonl`: every judged pair of a policy's answer and the baseline's.

    A tie of the judge becomes a record with `tie: true`. Left out are pairs without a verdict, of equal
    answers, and with an answer that `generation.max_tokens` cut off: as training data it would teach to end
    in the middle.

    Args:
        compared: policy name to its answers beside the baseline's.

    Returns:
        `pairs`, `ties`, and how many pairs were left out for each reason.
    """
    by_id = dict(zip(prompts.ids, prompts.prompts, strict=True))
    counts: Counter[str] = Counter()
    rows = [
        row
        for policy, answers in compared.items()
        for row in _records(by_id, answers, {"policy": policy, "baseline": baseline}, counts)
    ]
    write_atomic(folder / FILE, "".join(dumps(row, ensure_ascii=False) + "\n" for row in rows))
    left_out = ", ".join(f"{counts[name]} {name}" for name in ("unjudged", "equal", "truncated"))
    log_progress(f"{FILE}: {counts['pairs']} pairs, {counts['ties']} of them ties; left out: {left_out}")
    return counts


def _records(
    prompts: Mapping[str, Prompt],
    compared: ComparedAnswers,
    about: Mapping[str, str],
    counts: Counter[str],
) -> Iterator[dict[str, Any]]:
    for (candidate, other), preference in zip(compared.pairs, compared.preferences, strict=True):
        reason = _reason_to_skip(candidate, other, preference)
        if reason is not None or preference is None:
            counts[reason or "unjudged"] += 1
            continue
        chosen, rejected = (candidate, other) if preference >= TIE else (other, candidate)
        prompt = prompts[candidate.prompt_id]
        row: dict[str, Any] = {
            "prompt": prompt.prompt,
            "chosen": [{"role": "assistant", "content": chosen.answer}],
            "rejected": [{"role": "assistant", "content": rejected.answer}],
        }
        if prompt.tools:
            row["tools"] = prompt.tools
        if preference == TIE:
            row["tie"] = True
            counts["ties"] += 1
        counts["pairs"] += 1
        row["metadata"] = {**prompt.metadata, **about, "preference": preference, "sample": candidate.sample}
        yield row


def _reason_to_skip(candidate: Sample, other: Sample, preference: float | None) -> str | None:
    if preference is None:
        return "unjudged"
    if candidate.answer == other.answer:
        return "equal"
    return "truncated" if "length" in (candidate.finish_reason, other.finish_reason) else None

"""`jobs/compare.py`: runs side by side, as one self-contained HTML page and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config
from tbpo_ray.evaluation.charts import SERIES
from tbpo_ray.evaluation.checker import load_function
from tbpo_ray.evaluation.collect import Entry, collect, differences
from tbpo_ray.evaluation.columns import BY_METRIC, COLUMNS, Column, quality_metric
from tbpo_ray.evaluation.costs import HEADINGS, cost_rows
from tbpo_ray.evaluation.costs import NOTE as COST_NOTE
from tbpo_ray.evaluation.measures import Estimate
from tbpo_ray.evaluation.promotion import Gate, check_gate
from tbpo_ray.evaluation.report_charts import curve_charts, scatter_charts
from tbpo_ray.evaluation.report_markdown import to_markdown
from tbpo_ray.evaluation.verdict import format_estimate
from tbpo_ray.generation.samples import Sample, Samples
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.paths import run_dir
from tbpo_ray.tracking.run_note import RUN_NOTE
from tbpo_ray.tracking.tracker import Tracker

NOTES = (
    "Bold: the best value of a column by its point estimate. KL: k1 estimate of KL(policy, reference) in "
    "nats per answer, on the policy's own samples. Entropy: nats per answer. Distinct-n depends on the "
    "number of answers: compare it only within one table."
)
_MAX_SAMPLES, _MAX_CHARACTERS = 8, 600
_DASH = "–"
_JUDGE_IDENTITY = ("kind", "function", "model", "revision", "pool", "url", "rubric")


def compare_runs(config: Config, *, parent_run_id: str | None = None) -> Path:
    """Write `report.html` and `report.md` for `runs`, log them to MLflow, promote if the gate is passed.

    Returns:
        The path of `report.html`, in `compare.output` or `<run.output_dir>/<run.name>/report`.

    Raises:
        InputError: a run does not exist, or has no verdict.
    """
    entries = collect(config)
    output = config.compare.output
    folder = Path(output).expanduser().absolute() if output else run_dir(config) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    with Tracker.from_note(
        config,
        folder / RUN_NOTE,
        kind="compare",
        name=f"{config.run.name}-compare",
        parent_run_id=parent_run_id,
    ) as tracker:
        gate = check_gate(config.compare.promote, entries, tracker)
        page = build_page(entries, config, gate, tracker)
        write_atomic(folder / "report.html", render(page))
        write_atomic(folder / "report.md", to_markdown(page))
        tracker.set_tags({f"compared.{entry.label}": entry.run_id or "-" for entry in entries})
        for entry in entries:
            tracker.log_metrics({f"{entry.label}/{key}": e.value for key, e in entry.policy.metrics.items()})
        tracker.log_artifact(folder / "report.html", "report")
        tracker.log_artifact(folder / "report.md", "report")
    return folder / "report.html"


def build_page(
    entries: Sequence[Entry], config: Config, gate: Gate | None, tracker: Tracker
) -> dict[str, Any]:
    """Collect everything that the page shows, as plain values."""
    first = entries[0].verdict
    columns = [c for c in COLUMNS if any(c.metric in entry.policy.metrics for entry in entries)]
    return {
        "title": f"Comparison: {config.run.name}",
        "subtitle": (
            f"{len(entries)} policies, {first.prompts['rows']} prompts from {first.prompts['source']}, "
            f"judge: {first.judge_name}, win rates against {first.baseline}, 95 % intervals"
        ),
        "warnings": _warnings(entries),
        "gate": gate.sentence if gate else "",
        "columns": [{"heading": column.heading} for column in columns],
        "rows": [
            {"label": entry.label, "series": i % SERIES, "cells": [_cell(entry, entries, c) for c in columns]}
            for i, entry in enumerate(entries)
        ],
        "notes": " ".join([NOTES, *first.judge_notes()]),
        "costs": _costs(entries),
        "cost_headings": HEADINGS,
        "cost_note": COST_NOTE,
        "ranking": first.ranking,
        "scatters": scatter_charts(entries),
        "curves": curve_charts(entries),
        "legend": [{"label": e.label, "series": i % SERIES} for i, e in enumerate(entries) if e.curve],
        "slices": _slice_tables(entries),
        "samples": _samples(entries),
        "sample_labels": [entry.label for entry in entries],
        "differences": [{"key": key, "values": values} for key, values in differences(list(entries))],
        "difference_labels": [entry.label for entry in entries if entry.settings],
        "origins": [_origin(entry, tracker) for entry in entries],
        "hint": tracker.url_hint(),
    }


def render(page: dict[str, Any]) -> str:
    """Render the page as HTML; every value is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("tbpo_ray.evaluation", "."), autoescape=True)
    return environment.get_template("report.html.jinja").render(**page)


def _costs(entries: Sequence[Entry]) -> list[list[str]]:
    """The costs in all verdicts; a run that several verdicts name is listed once."""
    costs = {str(cost["run"]): cost for entry in entries for cost in entry.verdict.costs}
    return cost_rows(costs.values())


def _warnings(entries: Sequence[Entry]) -> list[str]:
    """Reasons why the numbers of these entries are not comparable."""
    warnings = []
    if len({entry.verdict.prompts["digest"] for entry in entries}) > 1:
        warnings.append("These policies answered different prompts: rates and diversity are not comparable.")
    if len({str(_judge_identity(entry.verdict.judge)) for entry in entries}) > 1:
        warnings.append("These verdicts come from different judges.")
    baselines = {(e.verdict.baseline, e.verdict[e.verdict.baseline].model) for e in entries}
    if len(baselines) > 1:
        names = ", ".join(sorted(name for name, _ in baselines))
        warnings.append(f"Win rates are against different baselines: {names}.")
    failed = [f"{e.label}: {e.policy.failed}" for e in entries if e.policy.failed]
    if failed:
        warnings.append(f"Samples that the engine rejected, which are not counted: {', '.join(failed)}.")
    return warnings


def _judge_identity(judge: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a judge another one; its counts and its cost differ from verdict to verdict."""
    return {name: judge.get(name) for name in _JUDGE_IDENTITY}


def _cell(entry: Entry, entries: Sequence[Entry], column: Column) -> dict[str, Any]:
    estimate = entry.policy.metrics.get(column.metric)
    if estimate is None:
        is_baseline = entry.policy.name == entry.verdict.baseline and "win_rate" in column.metric
        return {"value": "baseline" if is_baseline else _DASH, "interval": "", "best": False}
    values = [e.policy.metrics[column.metric].value for e in entries if column.metric in e.policy.metrics]
    best = max(value * column.direction for value in values)
    is_best = column.direction != 0 and len(values) > 1 and estimate.value * column.direction == best
    return _value_and_interval(estimate, column.factor) | {"best": is_best}


def _value_and_interval(estimate: Estimate | None, factor: int) -> dict[str, Any]:
    if estimate is None:
        return {"value": _DASH, "interval": ""}
    value, _, interval = format_estimate(estimate, factor).partition(" [")
    return {"value": value, "interval": f"[{interval}" if interval else ""}


def _slice_tables(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One table per column of `evaluation.slice_by`, with the quality metric of each policy."""
    metric = BY_METRIC[quality_metric(entries[0].policy.metrics)]
    columns = dict.fromkeys(column for entry in entries for column in entry.policy.slices)
    return [
        {
            "column": column,
            "labels": [entry.label for entry in entries],
            "rows": _slice_rows(entries, column, metric),
            "note": metric.heading,
        }
        for column in columns
    ]


def _slice_rows(entries: Sequence[Entry], column: str, metric: Column) -> list[dict[str, Any]]:
    slices = [entry.policy.slices.get(column, {}) for entry in entries]
    values = dict.fromkeys(value for by_value in slices for value in by_value)
    return [
        {
            "value": value,
            "cells": [
                _value_and_interval(by_value.get(value, {}).get(metric.metric), metric.factor)
                | {"length": _length(by_value.get(value, {})) if metric.metric == "win_rate" else ""}
                for by_value in slices
            ],
        }
        for value in values
    ]


def _length(metrics: Mapping[str, Estimate]) -> str:
    """The mean length of the answers, to be read beside a win rate."""
    length = metrics.get("length_tokens")
    return "" if length is None else f"{length.value:.0f} tokens"


def _samples(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The first answer of every policy to some prompts, preferably those where the policies differ."""
    answers = [_first_answers(entry) for entry in entries]
    shared = [key for key in answers[0] if all(key in other for other in answers)]
    ranked = sorted(shared, key=lambda key: -len({other[key].answer for other in answers}))[:_MAX_SAMPLES]
    mark = _marker(entries)
    return [
        {
            "prompt": answers[0][key].prompt_text[:_MAX_CHARACTERS],
            "answers": [
                {"text": other[key].answer[:_MAX_CHARACTERS] or "(empty)", "mark": mark(other[key])}
                for other in answers
            ],
        }
        for key in sorted(ranked)
    ]


def _first_answers(entry: Entry) -> dict[str, Sample]:
    """The first sample of each prompt; none if the samples were deleted."""
    if not entry.samples.is_dir():
        return {}
    return {key: group[0] for key, group in Samples(entry.samples).by_prompt().items()}


def _marker(entries: Sequence[Entry]) -> Callable[[Sample], str]:
    """A function that marks an answer `right` or `wrong` if the judge was a checker, otherwise not at all."""
    name = entries[0].verdict.judge.get("function")
    if not name:
        return lambda sample: ""
    check = load_function(name)
    return lambda sample: "right" if check(sample.metadata, sample.answer) else "wrong"


def _origin(entry: Entry, tracker: Tracker) -> dict[str, str]:
    link = tracker.run_link(entry.run_id) if entry.run_id else ""
    return {"label": entry.label, "model": entry.policy.model, "run": entry.run_id or _DASH, "link": link}

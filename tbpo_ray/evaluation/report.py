"""`jobs/compare.py`: runs side by side, as one self-contained HTML page and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config
from tbpo_ray.evaluation.charts import Line, Point, lines, scatter
from tbpo_ray.evaluation.checker import load_function
from tbpo_ray.evaluation.collect import Entry, collect, differences
from tbpo_ray.evaluation.measures import Estimate
from tbpo_ray.evaluation.promotion import Gate, check_gate
from tbpo_ray.evaluation.verdict import show
from tbpo_ray.generation.samples import Sample, Samples
from tbpo_ray.storage.paths import run_dir
from tbpo_ray.tracking.tracker import RUN_NOTE, Tracker

COLUMNS: tuple[tuple[str, str, int, int], ...] = (
    ("exact_match", "exact match", 100, 1),
    ("score", "score", 1, 1),
    ("win_rate", "win rate", 100, 1),
    ("lc_win_rate", "win rate, length-controlled", 100, 1),
    ("implicit_accuracy", "own reward accuracy", 100, 1),
    ("credit_auc", "credit AUC, log-ratio", 1, 1),
    ("credit_auc_advantage", "credit AUC, advantage", 1, 1),
    ("distinct_1", "distinct-1", 1, 1),
    ("distinct_2", "distinct-2", 1, 1),
    ("self_bleu", "self-BLEU", 1, -1),
    ("predictive_entropy", "predictive entropy", 1, 0),
    ("kl_k1", "KL from reference", 1, 0),
    ("length_tokens", "tokens per answer", 1, 0),
    ("truncated", "cut off", 100, 0),
)
"""Metric, heading, factor, and the direction that is better (0: neither)."""

SCATTERS = (
    ("length_tokens", "win_rate", "Win rate against length: above and to the left is not bought with words."),
    (
        "predictive_entropy",
        "distinct_1",
        "Distinct-1 against entropy; the fuller a dot, the higher self-BLEU.",
    ),
    ("kl_k1", "QUALITY", "Reward against the distance from the reference: up is gain, right is cost."),
)
CURVES = (
    ("loss", "Loss"),
    ("rewards/margin", "Reward margin"),
    ("rewards/accuracy", "Reward accuracy"),
    ("eval/rewards/accuracy", "Reward accuracy, held out"),
    ("logps/chosen", "Log-prob of the chosen answer"),
    ("kl", "KL from the reference"),
)
_SAMPLES, _POINTS = 8, 400


def compare_runs(config: Config, *, parent_run_id: str | None = None) -> Path:
    """Write `report.html` and `report.md` for `runs`; log them to MLflow; promote where the gate holds.

    Returns:
        The path of `report.html`, in `compare.output` or `<run.output_dir>/<run.name>/report`.

    Raises:
        InputError: a run without a verdict.
    """
    entries = collect(config)
    given = config.compare.output
    folder = Path(given).expanduser().absolute() if given else run_dir(config) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    with Tracker.noted(
        config,
        folder / RUN_NOTE,
        kind="compare",
        name=f"{config.run.name}-compare",
        parent_run_id=parent_run_id,
    ) as tracker:
        gate = check_gate(config.compare.promote, entries, tracker)
        page = report(entries, config, gate, tracker)
        (folder / "report.html").write_text(render(page), encoding="utf-8")
        (folder / "report.md").write_text(markdown(page), encoding="utf-8")
        tracker.set_tags({f"compared.{entry.label}": entry.run_id or "-" for entry in entries})
        for entry in entries:
            tracker.log_metrics({f"{entry.label}/{key}": e.value for key, e in entry.policy.metrics.items()})
        tracker.log_artifact(folder / "report.html", "report")
        tracker.log_artifact(folder / "report.md", "report")
    return folder / "report.html"


def report(entries: Sequence[Entry], config: Config, gate: Gate | None, tracker: Tracker) -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    first = entries[0].verdict
    columns = [c for c in COLUMNS if any(c[0] in entry.policy.metrics for entry in entries)]
    trained = [entry for entry in entries if entry.settings]
    return {
        "title": f"Comparison: {config.run.name}",
        "subtitle": (
            f"{len(entries)} policies, {first.prompts['rows']} prompts of {first.prompts['source']}, "
            f"judged by {first.judge['kind']}; win rates against {first.baseline}; 95 % intervals"
        ),
        "warnings": _warnings(entries),
        "gate": gate.sentence if gate else "",
        "columns": [{"heading": heading} for _, heading, _, _ in columns],
        "rows": [
            {"label": entry.label, "series": i % 8, "cells": [_cell(entry, entries, *c) for c in columns]}
            for i, entry in enumerate(entries)
        ],
        "notes": (
            "Bold: the best of a column, by its point estimate. KL: k1 estimate of KL(policy, reference) "
            "in nats per answer, on the policy's own samples. Entropy: nats per answer. Distinct-n depends "
            "on how many answers there are: compare it within one table only."
        ),
        "ranking": first.ranking,
        "scatters": _scatters(entries),
        "curves": _curves(entries),
        "legend": [{"label": e.label, "series": i % 8} for i, e in enumerate(entries) if e.curve],
        "slices": _slices(entries),
        "samples": _samples(entries),
        "sample_labels": [entry.label for entry in entries],
        "differences": [{"key": key, "values": values} for key, values in differences(list(entries))],
        "difference_labels": [entry.label for entry in trained],
        "origins": [_origin(entry, tracker) for entry in entries],
        "hint": tracker.url_hint(),
    }


def render(page: dict[str, Any]) -> str:
    """The page as HTML; every value is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("tbpo_ray.evaluation", "."), autoescape=True)
    return environment.get_template("report.html.jinja").render(**page)


def markdown(page: dict[str, Any]) -> str:
    """The tables of the page as Markdown."""
    head = ["policy", *(column["heading"] for column in page["columns"])]
    rows = []
    for row in page["rows"]:
        cells = [f"{cell['value']} {cell['interval']}".strip() for cell in row["cells"]]
        bold = [
            f"**{text}**" if cell["best"] else text for text, cell in zip(cells, row["cells"], strict=True)
        ]
        rows.append([row["label"], *bold])
    parts = [
        f"# {page['title']}",
        page["subtitle"],
        *page["warnings"],
        page["gate"],
        _table(head, rows),
        page["notes"],
    ]
    if page["ranking"]:
        ranked = [
            [i["name"], f"{i['strength']:.2f}", f"{i['low']:.2f} to {i['high']:.2f}"] for i in page["ranking"]
        ]
        parts += ["## Ranking (Bradley-Terry, log-odds)", _table(["policy", "strength", "95 %"], ranked)]
    if page["differences"]:
        rows = [[row["key"], *row["values"]] for row in page["differences"]]
        parts += ["## Configuration differences", _table(["key", *page["difference_labels"]], rows)]
    origins = [[item["label"], item["model"], item["run"]] for item in page["origins"]]
    parts += [
        "## Where it comes from",
        _table(["policy", "model", "MLflow run"], origins),
        f"`{page['hint']}`",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines_ = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in lines_
    )


def _warnings(entries: Sequence[Entry]) -> list[str]:
    found = []
    if len({entry.verdict.prompts["digest"] for entry in entries}) > 1:
        found.append("These policies answered different prompts: rates and diversity are not comparable.")
    if len({str(entry.verdict.judge) for entry in entries}) > 1:
        found.append("These verdicts come from different judges.")
    anchors = {(e.verdict.baseline, _model(e, e.verdict.baseline)) for e in entries}
    if len(anchors) > 1:
        found.append(
            "Win rates are against different baselines: "
            + ", ".join(sorted(name for name, _ in anchors))
            + "."
        )
    failed = [f"{e.label}: {e.policy.failed}" for e in entries if e.policy.failed]
    if failed:
        found.append("Answers that the engine refused and that do not count: " + ", ".join(failed) + ".")
    return found


def _model(entry: Entry, name: str) -> str:
    return entry.verdict[name].model


def _cell(
    entry: Entry, entries: Sequence[Entry], key: str, heading: str, factor: int, direction: int
) -> dict[str, Any]:
    estimate = entry.policy.metrics.get(key)
    if estimate is None:
        is_base = entry.policy.name == entry.verdict.baseline and "win_rate" in key
        return {"value": "baseline" if is_base else "–", "interval": "", "best": False}
    known = [e.policy.metrics[key].value for e in entries if key in e.policy.metrics]
    best = (
        direction != 0 and len(known) > 1 and estimate.value * direction == max(v * direction for v in known)
    )
    value, _, interval = show(estimate, factor).partition(" [")
    return {"value": value, "interval": f"[{interval}" if interval else "", "best": best}


def _quality(entries: Sequence[Entry]) -> str:
    return next(
        (k for k in ("exact_match", "score", "implicit_accuracy") if k in entries[0].policy.metrics),
        "win_rate",
    )


def _scatters(entries: Sequence[Entry]) -> list[dict[str, str]]:
    headings = {key: (heading, factor) for key, heading, factor, _ in COLUMNS}
    charts = []
    for x_key, named, caption in SCATTERS:
        y_key = _quality(entries) if named == "QUALITY" else named
        points = []
        for i, entry in enumerate(entries):
            x, y = entry.policy.metrics.get(x_key), entry.policy.metrics.get(y_key)
            if y is None and y_key == "win_rate" and entry.policy.name == entry.verdict.baseline:
                y = Estimate(0.5)  # against itself
            if x is None or y is None:
                continue
            bleu = entry.policy.metrics.get("self_bleu") if named == "distinct_1" else None
            fx, fy = headings[x_key][1], headings[y_key][1]
            points.append(
                Point(
                    entry.label,
                    x.value * fx,
                    y.value * fy,
                    i,
                    _range(x, fx),
                    _range(y, fy),
                    bleu.value if bleu else None,
                )
            )
        if points:
            labels = [headings[k][0] + (" (%)" if headings[k][1] == 100 else "") for k in (x_key, y_key)]
            if named == "distinct_1" and all(point.shade is None for point in points):
                caption = "Distinct-1 against entropy (self-BLEU needs several samples per prompt)."
            charts.append({"svg": scatter(points, *labels), "caption": caption})
    return charts


def _range(estimate: Estimate, factor: int) -> tuple[float, float] | None:
    if estimate.low is None or estimate.high is None:
        return None
    return estimate.low * factor, estimate.high * factor


def _curves(entries: Sequence[Entry]) -> list[dict[str, str]]:
    charts = []
    for key, caption in CURVES:
        found = []
        for i, entry in enumerate(entries):
            rows = [row for row in entry.curve if isinstance(row.get(key), int | float)]
            rows = rows[:: math.ceil(len(rows) / _POINTS)] if rows else []
            if len(rows) > 1:
                found.append(Line(entry.label, [row["step"] for row in rows], [row[key] for row in rows], i))
        if found and any(math.isfinite(y) for line in found for y in line.ys):
            charts.append({"svg": lines(found, "step", key), "caption": caption})
    return charts


def _slices(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    key = _quality(entries)
    factor = next(f for k, _, f, _ in COLUMNS if k == key)
    columns = dict.fromkeys(column for entry in entries for column in entry.policy.slices)
    out = []
    for column in columns:
        values = dict.fromkeys(v for entry in entries for v in entry.policy.slices.get(column, {}))
        rows = []
        for value in values:
            found = [entry.policy.slices.get(column, {}).get(value, {}).get(key) for entry in entries]
            shown = [show(e, factor).partition(" [") if e else ("–", "", "") for e in found]
            rows.append(
                {
                    "value": value,
                    "cells": [{"value": a, "interval": f"[{c}" if c else ""} for a, _, c in shown],
                }
            )
        out.append(
            {
                "column": column,
                "labels": [entry.label for entry in entries],
                "rows": rows,
                "note": key.replace("_", " "),
            }
        )
    return out


def _samples(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Prompts with the first answer of every policy, those where the policies differ first."""
    answers: list[dict[str, Sample]] = []
    for entry in entries:
        first = (
            {key: group[0] for key, group in Samples(entry.samples).by_prompt().items()}
            if entry.samples.is_dir()
            else {}
        )
        answers.append(first)
    shared = [key for key in answers[0] if all(key in other for other in answers)]
    ranked = sorted(shared, key=lambda key: -len({other[key].answer for other in answers}))[:_SAMPLES]
    check = _checker(entries)
    return [
        {
            "prompt": answers[0][key].prompt_text[:600],
            "answers": [
                {"text": other[key].answer[:600] or "(empty)", "mark": check(other[key]) if check else ""}
                for other in answers
            ],
        }
        for key in sorted(ranked)
    ]


def _checker(entries: Sequence[Entry]) -> Any:
    """Marks an answer `right` or `wrong`, where the verdict's judge was a checker."""
    name = entries[0].verdict.judge.get("function")
    if not name:
        return None
    function = load_function(name)
    return lambda sample: "right" if function(sample.metadata, sample.answer) else "wrong"


def _origin(entry: Entry, tracker: Tracker) -> dict[str, str]:
    link = tracker.run_link(entry.run_id) if entry.run_id else ""
    return {"label": entry.label, "model": entry.policy.model, "run": entry.run_id or "–", "link": link}

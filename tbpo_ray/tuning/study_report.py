"""What a study leaves for people: `report.html`, `trials.json`, `trials.csv`, `trials.txt`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config
from tbpo_ray.evaluation.charts import Line, Point, lines, number, scatter
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.training.metrics_file import read_metrics
from tbpo_ray.tuning.figures import Path as TrialPath
from tbpo_ray.tuning.figures import bars, parallel, shown
from tbpo_ray.tuning.importance import compared, importances
from tbpo_ray.tuning.space import LISTED, Space
from tbpo_ray.tuning.study_state import StudyState, Trial, interval

KLS = ("eval/kl/k3", "kl/k3", "evaluation/kl_k1")
OTHER, BEST = 7, 0


def write_report(
    config: Config,
    space: Space,
    study: StudyState,
    front: Sequence[Trial],
    note: str,
    folder: Path,
    tracker: Tracker,
) -> list[Path]:
    """Write the page and the tables into the study's folder. Returns the files."""
    head, rows = table(config, space, study.trials)
    page = describe(config, space, study, front, note, folder) | {"hint": tracker.url_hint()}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([head, *rows])
    trials = [{k: v for k, v in asdict(t).items() if k != "reports"} | {"name": t.name} for t in study.trials]
    contents = {
        "report.html": render(page | {"head": head}),
        "trials.json": json.dumps(trials, indent=1),
        "trials.csv": text.getvalue(),
        "trials.txt": plain(head, rows),
    }
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in contents]


def render(page: dict[str, Any]) -> str:
    """The page as HTML; every value but the charts is escaped."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader

    loaders = [PackageLoader(f"tbpo_ray.{part}", ".") for part in ("tuning", "evaluation")]
    return (
        Environment(loader=ChoiceLoader(loaders), autoescape=True)
        .get_template("report.html.jinja")
        .render(**page)
    )


def describe(
    config: Config, space: Space, study: StudyState, front: Sequence[Trial], note: str, folder: Path
) -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    tune, trials, best = config.tune, study.trials, front[0]
    metric = tune.metrics[0]
    step, values = compared(trials, metric)
    ranked = importances(space, trials, values)
    counts = ", ".join(f"{len(study.in_state(s))} {s}" for s in ("finished", "stopped", "failed"))
    seeds = f", {tune.repeats} seeds each" if tune.repeats > 1 else ""
    values_of_best = ", ".join(f"{key} = {shown(value)}" for key, value in best.params.items())
    head, rows = table(config, space, trials)
    when = f"at step {step}" if step else "at the end"
    seconds, work = sum(t.seconds for t in trials), sum(t.seconds * t.workers for t in trials)
    facts = study.facts
    confirmation = study.facts.get("confirmation")
    return {
        "title": f"Search: {config.run.name}",
        "subtitle": (
            f"{len(trials)} trials ({counts}){seeds}, proposals by {tune.algorithm}, "
            f"scheduler {tune.scheduler}; "
            + ", ".join(f"{m} ({d})" for m, d in zip(tune.metrics, tune.modes, strict=True))
        ),
        "best": f"Best: {best.name}, {metric} {_with_interval(best, metric)}, with {values_of_best}",
        "note": note,
        "held_up": bool(confirmation and confirmation["gain"] > 0),
        "warnings": _warnings(tune.repeats, front),
        "bars": bars([(i.key, i.share, f"{i.share:.2f} (p {i.chance:.2f})") for i in ranked])
        if ranked
        else "",
        "bars_caption": (
            f"Share of the variance of {metric} {when} that goes with each parameter ({len(values)} "
            "trials; ranges in three parts), less what chance gives. p: how often "
            "shuffled values do as well. A conditional parameter is judged where it was in force."
        ),
        "parallel": _parallel(space, trials, values, best, metric),
        "parallel_caption": (
            f"Each line is a trial, its {metric} {when} on the right; "
            "dashed: stopped early. Blue: the best. A line skips parameters that were not in force."
        ),
        "charts": _charts(config, trials, front, folder),
        "rows": [
            {"cells": row, "best": t.number == best.number} for row, t in zip(rows, trials, strict=True)
        ],
        "head": head,
        "cost": (
            "Cost: wall seconds with start-up; worker seconds are these times a trial's workers. "
            f"All trials: {seconds:.0f} s, {work:.0f} worker seconds; the search took "
            f"{facts.get('search_seconds', 0):.0f} s. Reference scores were computed for "
            f"{facts.get('reference_scorings', 0)} set(s) of pairs, each once for all trials."
        ),
        "faults": [f"{t.name} failed: {t.reason}" for t in trials if t.reason],
    }


def table(config: Config, space: Space, trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the table of trials."""
    tune = config.tune
    head = ["trial", "state", *tune.metrics, "step", "seconds", "worker seconds", *space.parameters]
    pbt = tune.scheduler == "pbt"
    rows = [
        [
            t.name,
            t.state,
            *(_with_interval(t, m) for m in tune.metrics),
            str(t.step),
            f"{t.seconds:.1f}",
            f"{t.seconds * t.workers:.1f}",
            *(shown(t.params[key]) if key in t.params else "" for key in space.parameters),
            *([", ".join(f"t{x['donor']:03d} at {x['step']}" for x in t.lineage)] if pbt else []),
        ]
        for t in trials
    ]
    return head + (["took over"] if pbt else []), rows


def plain(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table for a terminal, its columns named by the last part of their key."""
    short = [name.rsplit(".", 1)[-1] for name in head]
    widths = [max(len(cell) for cell in column) for column in zip(short, *rows, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
        for row in (short, *rows)
    )


def _with_interval(trial: Trial, metric: str) -> str:
    if metric not in trial.values:
        return "–"
    seeds = [row[metric] for row in trial.repeats if metric in row]
    if len(seeds) < 2:
        return number(trial.values[metric])
    mean, low, high = interval(seeds)
    return f"{number(mean)} [{number(low)}, {number(high)}]"


def _warnings(repeats: int, front: Sequence[Trial]) -> list[str]:
    out = []
    if repeats < 2:
        out.append(
            "Each trial ran with one seed: differences between neighbours in the table may be noise; "
            "tune.repeats=3 gives intervals."
        )
    if len(front) > 1:
        names = ", ".join(trial.name for trial in front)
        out.append(f"No trial beats another of these in every metric: {names}. The first leads in the first.")
    return out


def _parallel(
    space: Space, trials: Sequence[Trial], values: dict[int, float], best: Trial, metric: str
) -> str:
    low, high = (min(values.values()), max(values.values())) if values else (0.0, 1.0)
    axes = [
        (p.key, shown(p.values[0]), shown(p.values[-1])) for p in space.parameters.values()
    ] + [(metric, number(low), number(high))]  # fmt: skip
    paths = []
    for t in trials:
        if t.number not in values:
            continue
        at: list[float | None] = []
        for p in space.parameters.values():
            listed = p.kind in LISTED and len(p.values) == 1
            at.append((0.5 if listed else p.position(t.params[p.key])) if p.key in t.params else None)
        at.append((values[t.number] - low) / (high - low) if high > low else 0.5)
        label = f"{t.name} ({t.state}): {metric} {number(values[t.number])}"
        paths.append(TrialPath(label, at, BEST if t is best else OTHER, t.state == "stopped"))
    return parallel(axes, paths)


def _charts(
    config: Config, trials: Sequence[Trial], front: Sequence[Trial], folder: Path
) -> list[dict[str, str]]:
    metric = config.tune.metrics[0]
    charts = []
    kl = next((k for k in KLS if any(k in t.values for t in trials)), None)
    finished = [t for t in trials if t.state == "finished" and metric in t.values]
    if kl is not None:
        points = [(t, t.values[kl], t.values[metric]) for t in finished if kl in t.values]
        points = [(t, x, y) for t, x, y in points if math.isfinite(x) and math.isfinite(y)]
        sign = 1 if config.tune.modes[0] == "max" else -1
        edge = [
            t for t, x, y in points if not any(
                ox <= x and sign * oy >= sign * y and (ox, oy) != (x, y) for _, ox, oy in points
            )
        ]  # fmt: skip
        if points:
            dots = [
                Point(t.name if t in edge or len(points) < 15 else "", x, y, BEST if t in edge else OTHER)
                for t, x, y in points
            ]
            caption = (
                f"{metric} against the distance from the reference ({kl}, nats per token), finished trials. "
                "Blue: the Pareto front, where no other trial has gained as much at less distance."
            )
            charts.append({"svg": scatter(dots, kl, metric), "caption": caption})
    for name in dict.fromkeys([metric, *config.tune.metrics[1:], *([kl] if kl else [])]):
        curves = []
        for i, t in enumerate(trials):
            run = folder / "trials" / (t.name if not t.generation else f"{t.name}-x{t.generation}")
            rows = [r for r in read_metrics(run) if isinstance(r.get(name), int | float)]
            if t.state == "stopped":
                rows = [r for r in rows if r["step"] <= t.step]
            if rows:
                series = BEST if t is front[0] else OTHER if t.state != "finished" else 1 + i % 6
                curves.append(Line(t.name, [r["step"] for r in rows], [r[name] for r in rows], series))
        if any(math.isfinite(y) for curve in curves for y in curve.ys):
            caption = f"{name} over the steps: blue the best, grey the trials that were not finished."
            charts.append({"svg": lines(curves, "step", name), "caption": caption})
    return charts

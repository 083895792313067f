"""The files of a study that people read: `report.html`, `trials.json`, `trials.csv`, `trials.txt`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config, TuneConfig
from tbpo_ray.evaluation.charts import number
from tbpo_ray.evaluation.win_rates import t_interval
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.json_lines import dumps
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.tuning.figures import bars, format_value
from tbpo_ray.tuning.importance import comparable_values, importances
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_charts import charts, plane_map, trial_paths
from tbpo_ray.tuning.study_state import ENDED, StudyState, Trial


def write_report(
    config: Config,
    space: Space,
    state: StudyState,
    front: Sequence[Trial],
    note: str,
    folder: Path,
    tracker: Tracker,
) -> list[Path]:
    """Write the page and the tables into the study's folder.

    Args:
        front: the best trials, the best first.
        note: whether the best configuration was confirmed with new seeds.

    Returns:
        The files written.
    """
    head, rows = table(config, space, state.trials)
    page = describe(config, space, state, front, note, folder) | {"hint": tracker.url_hint()}
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows])
    trials = [{k: v for k, v in asdict(t).items() if k != "reports"} | {"name": t.name} for t in state.trials]
    contents = {
        "report.html": render(page),
        "trials.json": dumps(trials, indent=1),
        "trials.csv": text.getvalue(),
        "trials.txt": plain_table(head, rows),
    }
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in contents]


def render(page: dict[str, Any]) -> str:
    """The page as HTML; every value except the charts is escaped."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader

    loaders = [PackageLoader(f"tbpo_ray.{part}", ".") for part in ("tuning", "evaluation")]
    return (
        Environment(loader=ChoiceLoader(loaders), autoescape=True)
        .get_template("report.html.jinja")
        .render(**page)
    )


def describe(
    config: Config, space: Space, state: StudyState, front: Sequence[Trial], note: str, folder: Path
) -> dict[str, Any]:
    """Everything that the page shows, as plain values."""
    tune, trials, best = config.tune, state.trials, front[0]
    metric = tune.metrics[0]
    head, rows = table(config, space, trials)
    best_values = ", ".join(f"{key} = {format_value(value)}" for key, value in best.params.items())
    confirmation = state.facts.get("confirmation")
    return {
        "title": f"Search: {config.run.name}",
        "subtitle": _subtitle(tune, state),
        "best": f"Best: {best.name}, {metric} {_with_interval(best, metric)}, with {best_values}",
        "note": note,
        "held_up": bool(confirmation and (confirmation["gain"] or 0) > 0),
        "warnings": _warnings(tune.repeats, front),
        **_parameter_charts(space, trials, best, metric),
        **_plane(config, space, trials, best),
        "charts": charts(tune, trials, best, folder),
        "rows": [
            {"cells": row, "best": t.number == best.number} for row, t in zip(rows, trials, strict=True)
        ],
        "head": head,
        "cost": _cost(state),
        "faults": [f"{t.name} failed: {t.reason}" for t in trials if t.reason],
    }


def _subtitle(tune: TuneConfig, state: StudyState) -> str:
    counts = ", ".join(f"{len(state.in_state(s))} {s}" for s in ENDED)
    seeds = f", {tune.repeats} seeds each" if tune.repeats > 1 else ""
    metrics = ", ".join(f"{m} ({mode})" for m, mode in zip(tune.metrics, tune.modes, strict=True))
    return (
        f"{len(state.trials)} trials ({counts}){seeds}, proposals by {tune.algorithm}, "
        f"scheduler {tune.scheduler}; {metrics}"
    )


def _parameter_charts(space: Space, trials: Sequence[Trial], best: Trial, metric: str) -> dict[str, str]:
    """Parameter importance and parallel coordinates with their captions."""
    step, values = comparable_values(trials, metric)
    when = f"at step {step}" if step else "at the end"
    ranked = importances(space, trials, values)
    return {
        "bars": bars([(i.key, i.share, f"{i.share:.2f} (p {i.p_value:.2f})") for i in ranked])
        if ranked
        else "",
        "bars_caption": (
            f"Share of the variance of {metric} {when} that each parameter explains beyond chance "
            f"({len(values)} trials; ranges are divided into three parts). p: how often shuffled values "
            "explain as much. A conditional parameter is judged over the trials in which it was active."
        ),
        "parallel": trial_paths(space, trials, values, best, metric),
        "parallel_caption": (
            f"Each line is a trial, with its {metric} {when} on the right. Dashed: stopped early. Blue: the "
            "best. A line skips the parameters that were not active."
        ),
    }


def _plane(config: Config, space: Space, trials: Sequence[Trial], best: Trial) -> dict[str, str]:
    """The map of the plane of generators with its caption; empty if the study does not search it."""
    metric = config.tune.metrics[0]
    step, values = comparable_values(trials, metric)
    when = f"at step {step}" if step else "at the end"
    return {
        "plane": plane_map(config, space, trials, values, best),
        "plane_caption": (
            "The plane of proper losses (objective.bregman.generator=beta_family). Each dot is a trial and "
            f"its color the {metric} {when}, brighter is better. Pale: stopped early; ring: the best. "
            "Crosses are divergences with a name. To the left the loss grows faster for pairs that the model "
            "gets wrong; where a + b exceeds a − b, so that both exponents are positive, it levels off, and "
            "pairs with a wrong label stop pulling."
        ),
    }


def _cost(state: StudyState) -> str:
    seconds = sum(t.seconds for t in state.trials)
    worker_seconds = sum(t.seconds * t.workers for t in state.trials)
    return (
        "Cost: seconds are wall-clock time including startup; worker seconds are seconds times the workers "
        f"of a trial. All trials: {seconds:.0f} s, {worker_seconds:.0f} worker seconds; the search took "
        f"{state.facts.get('search_seconds', 0):.0f} s. Reference scores were computed for "
        f"{state.facts.get('reference_scorings', 0)} set(s) of pairs, each once for all trials."
    )


def table(config: Config, space: Space, trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table of trials."""
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
            *(format_value(t.params[key]) if key in t.params else "" for key in space.parameters),
            *([", ".join(f"t{x['donor']:03d} at {x['step']}" for x in t.lineage)] if pbt else []),
        ]
        for t in trials
    ]
    return head + (["takeovers"] if pbt else []), rows


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table for a terminal; its columns are named by the last part of their key."""
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
    mean, low, high = t_interval(seeds)
    return f"{number(mean)} [{number(low)}, {number(high)}]"


def _warnings(repeats: int, front: Sequence[Trial]) -> list[str]:
    out = []
    if repeats < 2:
        out.append(
            "Each trial ran with one seed: small differences between trials may be noise; "
            "tune.repeats=3 gives intervals."
        )
    if len(front) > 1:
        names = ", ".join(trial.name for trial in front)
        out.append(
            f"No trial beats another of these in every metric: {names}. The first leads in the first metric."
        )
    return out

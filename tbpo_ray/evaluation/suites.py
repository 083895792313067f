"""Suites: ready evaluations that set which prompts are read, how many, how they are rendered, and the rubric.

The packaged suites are YAML files in `suites/`; a file of the user's has the same keys. A suite never
downloads anything: its prompts are a file that `evaluation.prompts` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tbpo_ray.config.base import Count, Section
from tbpo_ray.config.loading import read_section
from tbpo_ray.config.schema import Config
from tbpo_ray.data.column_values import is_filled, post_prompt
from tbpo_ray.data.records import BadRecord, Prompt, parse_prompt
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.sources import iter_raw
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.rubrics import load_rubric
from tbpo_ray.storage.json_lines import dumps

KEY = "evaluation.suite"
DEFAULT_MAX_PROMPTS = 400
"""`evaluation.max_prompts: auto` without a suite."""
REFERENCE = "reference"
"""The metadata column in which summarization stores the reference summary."""
SECOND_TURN = "second_turn"
"""The metadata column with the second question of a conversation."""
_REFERENCE_COLUMNS = ("reference", "reference_summary", "summary", "highlights", "completion", "label")
_POST_METADATA = ("id", "subreddit", "site")


class Suite(Section):
    """The settings of a suite. All of them can be overruled by the keys of `evaluation`."""

    prompts: str | None = None
    """Source of the prompts; a relative path may start at the suite's file. `evaluation.prompts` wins."""
    obtain: str | None = None
    """Where the prompts can be obtained, for the message when they are missing."""
    max_prompts: Count | None = 200
    """Number of different prompts, from the beginning; null: all."""
    rubric: str = "general"
    """Rubric of a language model as judge, as `evaluation.judge.rubric`."""
    reading: Literal["prompts", "summarization", "turns"] = "prompts"
    """`prompts`: as any source of prompts. `turns`: two questions in `turns`, of which the second one follows
    the policy's own answer. `summarization`: posts and articles (`post`, `article`, OpenAI's
    `info`) become requests for a summary, and a reference summary the metadata column `reference`."""
    reference_column: str | None = None
    """Metadata column with a reference answer, for ROUGE-L."""
    slice_by: list[str] | None = None
    """Metadata columns whose values are also reported separately."""


def suite_names() -> list[str]:
    """The names of the packaged suites."""
    return sorted(
        file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml")
    )


def load_suite(config: Config) -> Suite | None:
    """The suite of `evaluation.suite`, with the paths of a user's file made absolute.

    Raises:
        InputError: it is neither a packaged suite nor a readable suite file.
    """
    name = config.evaluation.suite
    if name is None:
        return None
    if name in suite_names():
        with resources.as_file(_folder() / f"{name}.yaml") as file:
            return read_section(file, Suite, KEY, "suite.yaml")
    file = Path(name).expanduser()
    if not file.is_file():
        raise InputError(
            f"{KEY}={name}: unknown; must be one of {', '.join(suite_names())}, or the path of a YAML file"
        )
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(
            f"{KEY}={name}: must be a YAML file with the keys of a suite ({', '.join(Suite.model_fields)}); "
            "a file of prompts goes to evaluation.prompts"
        )
    suite = read_section(file, Suite, KEY, "suite.yaml")
    beside = {
        key: str((file.parent / value).absolute())
        for key, value in (("prompts", suite.prompts), ("rubric", suite.rubric))
        if value is not None and (file.parent / value).is_file()
    }
    load_rubric(beside.get("rubric", suite.rubric), f"{KEY}={name}: rubric")
    return suite.model_copy(update=beside)


def prompt_limit(config: Config) -> int | None:
    """The maximum number of prompts; None for all."""
    limit = config.evaluation.max_prompts
    if limit != "auto":
        return limit
    suite = load_suite(config)
    return DEFAULT_MAX_PROMPTS if suite is None else suite.max_prompts


def reference_column(config: Config) -> str | None:
    """The metadata column with the reference answers; None if there is none to compare with."""
    suite = load_suite(config)
    return config.evaluation.reference_column or (suite.reference_column if suite else None)


def slice_columns(config: Config) -> list[str]:
    """The metadata columns whose values are reported separately."""
    suite = load_suite(config)
    return config.evaluation.slice_by or list((suite.slice_by if suite else None) or [])


def judge_settings(config: Config) -> dict[str, Any]:
    """`evaluation.judge`, with the suite's rubric where a language model judges by the packaged prompt."""
    settings = dict(config.evaluation.judge)
    suite = load_suite(config)
    if suite is not None and settings.get("kind") == "llm" and settings.get("prompt_file") is None:
        settings["rubric"] = settings.get("rubric") or suite.rubric
    return settings


def suite_source(config: Config, suite: Suite) -> str:
    """The source of a suite's prompts.

    Raises:
        InputError: neither the suite nor `evaluation.prompts` names one.
    """
    source = config.evaluation.prompts or suite.prompts
    if source is None:
        where = f" from {suite.obtain}" if suite.obtain else ""
        raise InputError(
            f"evaluation.prompts: missing; {KEY}={config.evaluation.suite} needs the path of its prompts, "
            f"which are not part of this package: fetch them once{where}"
        )
    return source


def iter_suite_prompts(
    suite: Suite, source: str, limit: int | None, on_bad: Callable[[BadRecord], None]
) -> Iterator[Prompt]:
    """The first `limit` different prompts of a source, rendered as the suite says.

    A prompt that occurs again, as in comparisons of many answers to one post, is passed over.
    """
    seen: set[str] = set()
    for raw in iter_raw(source):
        if limit is not None and len(seen) >= limit:
            return
        try:
            row = raw.load()
            if suite.reading == "summarization" and isinstance(row, Mapping):
                row = summarization_row(row)
            elif suite.reading == "turns" and isinstance(row, Mapping):
                row = two_turn_row(row)
            prompt = parse_prompt(row, raw.source, raw.row)
        except RecordError as error:
            on_bad(BadRecord(raw.source, raw.row, error.reason, error.detail, raw.as_read()))
            continue
        identity = dumps([prompt.prompt, prompt.tools], default=str)
        if identity not in seen:
            seen.add(identity)
            yield prompt


def summarization_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a summarization set as a prompt with the reference summary in the column `reference`.

    The text is in OpenAI's `info`, or in `post` or `article`; another row keeps its own prompt. The reference
    is the comparison's summary of the policy `ref`, the posts' own `summary`, CNN/DailyMail's `highlights` or
    TRL's `completion`.

    Raises:
        RecordError: `info` without a text.
    """
    info = row.get("info")
    post = info if isinstance(info, Mapping) else row
    has_text = any(is_filled(post.get(name)) for name in ("post", "article"))
    out = dict(row)
    if info is not None or (has_text and not is_filled(row.get("prompt"))):
        out = {"prompt": post_prompt(post)} | {n: post[n] for n in _POST_METADATA if post.get(n) is not None}
    reference = _reference_summary(row)
    return out | ({REFERENCE: reference} if reference else {})


def two_turn_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of MT-Bench as its first question, with the other one in the column `second_turn`.

    Raises:
        RecordError: `turns` is not a list of two texts.
    """
    turns = row.get("turns")
    if not isinstance(turns, list | tuple) or len(turns) != 2 or not all(is_filled(turn) for turn in turns):
        raise RecordError("prompt_missing", "turns: must be a list of two questions")
    kept = {name: row[name] for name in ("question_id", "category") if row.get(name) is not None}
    return {"prompt": str(turns[0]), SECOND_TURN: str(turns[1]), **kept}


def _reference_summary(row: Mapping[str, Any]) -> str | None:
    summaries = row.get("summaries")
    items = summaries if isinstance(summaries, list | tuple) else []
    found = [item.get("text") for item in items if isinstance(item, Mapping) and item.get("policy") == "ref"]
    found += [row.get(name) for name in _REFERENCE_COLUMNS]
    return next((text.strip() for text in found if isinstance(text, str) and text.strip()), None)


def _folder() -> Any:
    return resources.files("tbpo_ray.evaluation").joinpath("suites")

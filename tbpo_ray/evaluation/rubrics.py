"""Rubrics: the criteria by which a language model judges answers, as packaged text files or the user's own.

A rubric is one paragraph of criteria; `judge_prompt.txt` states the task, the format of the reply and what
must not count (length, position, style alone).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from tbpo_ray.errors import InputError

DEFAULT_RUBRIC = "general"
KEY = "evaluation.judge.rubric"
MAX_CHARACTERS = 20_000


def rubric_names() -> list[str]:
    """The names of the packaged rubrics."""
    files = resources.files("tbpo_ray.evaluation").joinpath("rubrics").iterdir()
    return sorted(file.name.removesuffix(".txt") for file in files if file.name.endswith(".txt"))


def load_rubric(rubric: str, key: str = KEY) -> str:
    """The text of a rubric.

    Args:
        rubric: the name of a packaged rubric, or the path of a text file.
        key: the configuration key, for messages.

    Raises:
        InputError: it is neither, or the file is empty, too long or not UTF-8.
    """
    if rubric in rubric_names():
        folder = resources.files("tbpo_ray.evaluation").joinpath("rubrics")
        return folder.joinpath(f"{rubric}.txt").read_text(encoding="utf-8").strip()
    file = Path(rubric).expanduser()
    if not file.is_file():
        raise InputError(
            f"{key}={rubric}: unknown; must be one of {', '.join(rubric_names())}, or the path of a text file"
        )
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}={rubric}: cannot be read as UTF-8 text ({error})") from error
    if not text:
        raise InputError(f"{key}={rubric}: is empty; must state what makes an answer better")
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"{key}={rubric}: has {len(text):,} characters; must have at most {MAX_CHARACTERS:,}, since "
            "every request to the judge contains it"
        )
    return text

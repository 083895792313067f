"""The description of a run in Markdown, which MLflow shows at the top of its page."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tbpo_ray.redaction import redact, redact_text

NOTE_TAG, DIGEST_TAG = "mlflow.note.content", "tbpo.note"
_WHAT = {
    "pipeline": "Supervised fine-tuning, preference training, and an evaluation before and after it",
    "sft": "Supervised fine-tuning on the chosen answers",
    "helper": "Training of a helper model",
    "train": "Preference training",
    "evaluate": "Evaluation of policies on held-out prompts",
    "compare": "Comparison of runs",
    "tune": "Hyperparameter search",
    "trial": "Trial of a hyperparameter search",
}
"""What a run of each kind does."""


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command of this process, with the values of secret keys redacted."""
    words = list(sys.argv if argv is None else argv)
    if not _is_script(words):
        return ""
    script = Path(words[0])
    # Without the folder of the checkout, which says who works where.
    name = "/".join(script.parts[-2:]) if script.is_absolute() else str(script)
    return shlex.join(["python", name, *(_redact_word(word) for word in words[1:])])


def describe(
    kind: str, *, command: str = "", result: str = "", links: Mapping[str, str] | None = None
) -> str:
    """The description: what the run does, the command, the result, and links to related runs.

    Args:
        result: Markdown.
        links: text to path of MLflow's page.
    """
    parts = [f"**{_WHAT.get(kind, kind)}**"]
    if command:
        parts.append(f"```bash\n{command}\n```")
    if result:
        parts.append(f"**Result**\n\n{result}")
    if links:
        parts.append("**Runs:** " + " · ".join(f"[{text}]({page})" for text, page in links.items()))
    return "\n\n".join(parts) + "\n"


def digest(note: str) -> str:
    """What tells a description of ours from one that somebody has edited."""
    return hashlib.sha256(note.encode()).hexdigest()[:16]


def _is_script(words: Sequence[str]) -> bool:
    """Whether the process was started with a Python file: neither by `python -c` nor interactively."""
    return bool(words) and Path(words[0]).suffix == ".py"


def _redact_word(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{key}={redact(key, value)}" if equals else redact_text(word)

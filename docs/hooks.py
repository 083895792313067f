"""A MkDocs hook that writes the generated parts of pages, so that they cannot drift from their source.

`<!-- include FILE -->` is replaced by the file without its title, and `<!-- configuration -->` by the
sections of the reference that the configuration generates from its own types and docstrings.
`<!-- architectures -->` becomes the table of `docs/architectures.json`, each line of which is a test.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = "<!-- configuration -->"
ARCHITECTURES = "<!-- architectures -->"
_INCLUDE = re.compile(r"^<!-- include (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of one page. Called by MkDocs."""
    markdown = _INCLUDE.sub(
        lambda match: without_title((ROOT / match[1]).read_text(encoding="utf-8")), markdown
    )
    if CONFIGURATION in markdown:
        from tbpo_ray.config.reference import reference_markdown

        text = reference_markdown()
        # The page has an introduction of its own; the sections start at the first second-level heading.
        markdown = markdown.replace(CONFIGURATION, text[text.index("\n## ") :])
    return markdown.replace(ARCHITECTURES, architectures_table())


def architectures_table() -> str:
    """What is used for a tiny model of each architecture under the default configuration, as Markdown."""
    rows = json.loads(read("docs/architectures.json"))
    lines = ["| `model_type` | Features of the tested model | Attention | Rows |", "|---|---|---|---|"]
    lines += [
        f"| `{row['model_type']}` | {row['features']} | `{row['attention']}` | {row['rows']} |"
        for row in rows
    ]
    return "\n".join(lines)


def read(name: str) -> str:
    """The text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def without_title(text: str) -> str:
    """The text without its first-level heading; the page has its own."""
    return re.sub(r"\A# .*\n+", "", text)

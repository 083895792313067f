"""The style of an answer: its length and its Markdown, which judges may prefer whatever it says."""

from __future__ import annotations

import re

FEATURES = ("length", "headings", "list_items", "bold")
"""What is counted; `length` in characters."""
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_HEADING = re.compile(r"^ {0,3}#{1,6}\s+\S", re.MULTILINE)
_LIST_ITEM = re.compile(r"^\s*(?:[-*+]|\d{1,3}[.)])\s+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


def style_features(answer: str) -> list[int]:
    """Counts of :data:`FEATURES`, outside of code blocks except for the length."""
    text = _CODE.sub("", answer)
    return [len(answer), *(len(pattern.findall(text)) for pattern in (_HEADING, _LIST_ITEM, _BOLD))]

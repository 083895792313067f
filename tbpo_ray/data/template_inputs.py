"""What a record gives to the chat template beside its messages: tools and the template's own arguments.

Tools are stated once for a conversation, in the column `tools` or `functions` or in a field of that name of a
message. Several of these must state the same tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tbpo_ray.data.messages import Message, check_unicode, parse_json_text, parse_tools
from tbpo_ray.data.rejection_reasons import RecordError

TEMPLATE_COLUMNS = frozenset({"tools", "functions", "chat_template_kwargs"})
"""Columns that are neither part of the pair nor metadata."""
_TOOL_FIELDS = ("tools", "functions")


def template_inputs(columns: Mapping[str, Any], messages: Sequence[Message]) -> dict[str, Any]:
    """`tools` (None if there are none) and `template_kwargs` of a row.

    Args:
        messages: every turn of the row's prompt and answers.

    Raises:
        RecordError: when a value is malformed, or the tools are stated in different ways.
    """
    arguments = parse_json_text(columns.get("chat_template_kwargs"), "template_kwargs_malformed") or {}
    if not isinstance(arguments, Mapping):
        raise RecordError("template_kwargs_malformed", str(arguments)[:80])
    arguments = {**_documents(columns), **arguments}
    stated = [
        (f"the {'column' if holder is columns else 'message field'} {name}", tools)
        for holder in (columns, *messages)
        for name in _TOOL_FIELDS
        if (tools := parse_tools(holder.get(name), bare=name == "functions"))
    ]
    for place, tools in stated[1:]:
        if tools != stated[0][1]:
            raise RecordError("tools_malformed", f"{stated[0][0]} and {place} differ")
    found = stated[0][1] if stated else None
    check_unicode(found, "tools")
    check_unicode(arguments, "chat_template_kwargs")
    return {"tools": found, "template_kwargs": arguments}


def _documents(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The documents of a row as transformers gives them to a template; anything else is metadata."""
    documents = columns.get("documents")
    if isinstance(documents, str):
        with suppress(ValueError, RecursionError):
            documents = json.loads(documents)
    if not isinstance(documents, list) or not documents or not all(isinstance(d, Mapping) for d in documents):
        return {}
    return {"documents": documents}

"""A conversation rendered as the text of a prompt: by a chat template, or as plain text without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tbpo_ray.data.messages import Message
from tbpo_ray.data.rejection_reasons import RecordError

_DATE = "26 Jul 2024"
"""For templates that would otherwise insert today's date, so that tokens do not change overnight."""


def render_prompt(
    messages: list[Message], template: str | None, special_tokens: Mapping[str, str]
) -> str | RecordError:
    """The text of a prompt, with the generation prompt at its end, or why the template refuses it.

    Args:
        template: a Jinja chat template; None joins the contents of the messages with blank lines.
        special_tokens: names to texts (`bos_token`: `<s>`), which templates refer to.
    """
    if template is None:
        return "\n\n".join(message["content"] for message in messages)
    from transformers.utils.chat_template_utils import render_jinja_template

    values: dict[str, Any] = {**special_tokens, "date_string": _DATE}
    try:
        rendered = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True, **values
        )
    except Exception as error:  # templates are programs that may raise anything; all of it means refusal
        return RecordError("template_refused", f"{type(error).__name__}: {error}"[:200])
    return rendered[0][0]

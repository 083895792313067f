"""Find, when a tokenizer is loaded, what makes its chat template unusable for every conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from tbpo_ray.errors import InputError

USED_TEMPLATES = ("default", "tool_use")
"""Of the templates of a tokenizer that has several, those that are run."""
_RANDOM_FILTERS = frozenset({"random"})
_RANDOM_FUNCTIONS = frozenset({"lipsum"})
_OWN_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_PROBE = "Qprobe"
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}>")
"""What Python prints for an object without a text form, different in each process."""


def check_templates(template: Any, *, path: str, chat_template: str | None) -> None:
    """Refuse chat templates that do not compile, or that may write the same conversation differently.

    Args:
        template: the tokenizer's `chat_template`: a text, several by name, or nothing.
        path: the model folder or hub name that the tokenizer was loaded from.
        chat_template: the file that replaced the tokenizer's own template; None if nothing did.

    Raises:
        InputError: naming the file and the line.
    """
    sources = template if isinstance(template, Mapping) else {"default": template}
    for name in USED_TEMPLATES:
        source = sources.get(name)
        if isinstance(source, str) and (fault := _find_fault(source)) is not None:
            line, problem = fault
            where = f"{_place(path, chat_template)}, line {line}" if line else _place(path, chat_template)
            of_several = f" (the template {name!r})" if len(sources) > 1 else ""
            raise InputError(f"{where}{of_several}: {problem}")


def _place(path: str, chat_template: str | None) -> str:
    if chat_template is not None:
        return f"model.chat_template={chat_template}"
    file = next((name for name in _OWN_FILES if (Path(path) / name).is_file()), "of its tokenizer")
    return f"model.name_or_path={path}: the chat template {file}"


@lru_cache(maxsize=32)
def _find_fault(source: str) -> tuple[int, str] | None:
    """The line and the description of the first fault of a template; line 0 where there is none to name."""
    from jinja2 import TemplateSyntaxError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = _compile_jinja_template(source)
        tree = template.environment.parse(source)
    except TemplateSyntaxError as error:
        return (
            error.lineno,
            f"not a valid Jinja template ({error.message}); mend it, or give another template",
        )
    # The compiler nests Python code as the template nests its blocks.
    except (RecursionError, MemoryError, SyntaxError) as error:
        return 0, f"too deeply nested to be compiled ({type(error).__name__}); give another template"
    for node in tree.find_all((nodes.Filter, nodes.Name)):
        name = _random_name(node, nodes)
        if name is not None:
            return node.lineno, (
                f"{name} gives another text each time, so that the tokens of a conversation would not be the "
                "same in preparation, training and sampling; must be a template without it"
            )
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        return node.lineno, (
            f"{type(node).__name__.lower()} loads another file, which chat templates cannot; must be one file"
        )
    written = list(_probes(template))
    if written and not any(_PROBE in text for text in written):
        return 0, "it does not write the content of a user's turn; must be a template of a conversation"
    if any(map(_ADDRESS.search, written)):
        return 0, (
            "it prints an object of Python with its address in memory, which is another one in each process; "
            "must be a template that prints texts only"
        )
    return None


def _random_name(node: Any, nodes: Any) -> str | None:
    """The name of a random filter or function that a node of a template uses."""
    if isinstance(node, nodes.Name):
        return f"{node.name}()" if node.ctx == "load" and node.name in _RANDOM_FUNCTIONS else None
    if node.name in _RANDOM_FILTERS:
        return f"the filter {node.name}"
    # `map('random')` applies the filter to each item.
    named = [item.value for item in node.args if isinstance(item, nodes.Const)]
    return next(
        (f"the filter {value}" for value in named if node.name == "map" and value in _RANDOM_FILTERS), None
    )


def _probes(template: Any) -> Iterator[str]:
    """A short conversation in the two forms of a content, without those that the template refuses."""
    for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
        turns = [{"role": "user", "content": content}]
        # A template is a program of its own: it may refuse a form, or need other values.
        with suppress(Exception):
            yield template.render(messages=turns, tools=None, add_generation_prompt=True)

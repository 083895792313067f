"""Refuse YAML that is valid and that no configuration can be: too deep, self-referring, or explosive.

PyYAML composes and constructs recursively, and an alias costs nothing until the values are copied. All
checks here run before a value is constructed, and name a line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import yaml

MAX_BYTES = 1_000_000
"""Size of a file; PyYAML takes seconds for a megabyte."""
MAX_DEPTH = 50
"""Levels of nesting; the configuration itself has five."""
MAX_NODES = 100_000
"""Values in a document after its aliases have been replaced."""
MAX_DIGITS = 400
"""Characters of a number; the longest float64 that is written out has about 330."""


def fault(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    """An error at a place in the document."""
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def place(error: yaml.YAMLError) -> str:
    """Where in the document an error is, such as `line 3, column 5`; empty if the error does not say."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""


def check_depth(text: str, loader: type[yaml.SafeLoader]) -> None:
    """Refuse a document that is nested too deeply, which takes no recursion to find.

    Raises:
        yaml.YAMLError: the document is too deep, or not YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise fault(
                    f"the values are nested too deeply (more than {MAX_DEPTH} levels)", event.start_mark
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def check_aliases(root: yaml.Node) -> None:
    """Refuse an anchor that refers to a value around it, and aliases that expand to very many values.

    Raises:
        yaml.YAMLError: naming the line of the value.
    """
    _measure(root, set(), {})


def _measure(node: yaml.Node, parents: set[int], known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The number of values and of levels at and below a node, where each alias stands for its values."""
    if id(node) in parents:
        raise fault("a value contains itself", node.start_mark)
    if id(node) not in known:  # values that many aliases share are walked once
        parents.add(id(node))
        below = [_measure(child, parents, known) for child in _children(node)]
        parents.remove(id(node))
        size, levels = 1 + sum(size for size, _ in below), 1 + max((n for _, n in below), default=0)
        if size > MAX_NODES:
            raise fault(f"the aliases expand to more than {MAX_NODES} values", node.start_mark)
        if levels > MAX_DEPTH + 1:
            raise fault(f"the aliases nest too deeply (more than {MAX_DEPTH} levels)", node.start_mark)
        known[id(node)] = size, levels
    return known[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for child in node.value if isinstance(node, yaml.CollectionNode) else []:
        yield from child if isinstance(child, tuple) else (child,)


def check_keys(root: yaml.Node, sections: Collection[str] = ()) -> None:
    """Refuse a value that is given twice: one of the two would be dropped without a word.

    A top-level key may be dotted, so `training.seed` and `seed` below `training` are the same key.

    Args:
        sections: top-level keys whose own keys may be dotted too.

    Raises:
        yaml.YAMLError: naming the key and the line of its second value.
    """
    for key, mark in repeated_keys(root):
        raise fault(f"the key {key!r} is given twice", mark)
    for key_node, value in _entries(root):
        if key_node.value in sections:
            check_keys(value)


def repeated_keys(root: yaml.Node) -> Iterator[tuple[str, yaml.Mark]]:
    """The dotted keys that a mapping, dotted or nested, gives a second value, and where."""
    seen: dict[tuple[str, ...], tuple[int, bool]] = {}
    for number, (key, value) in enumerate(_entries(root)):
        *outer, last = key.value.split(".")
        above = [(tuple(outer[:size]), key.start_mark, False) for size in range(1, len(outer) + 1)]
        for path, mark, is_leaf in [*above, *_paths(key, value, (*outer, last))]:
            first, was_leaf = seen.setdefault(path, (number, is_leaf))
            if first != number and (is_leaf or was_leaf):
                yield ".".join(path), mark


def section_repeats(root: yaml.Node, sections: Collection[str]) -> Iterator[tuple[str, int]]:
    """The dotted keys that sections give a second value, and the line of that value."""
    for key, value in _entries(root):
        if key.value in sections:
            for name, mark in repeated_keys(value):
                yield f"{key.value}.{name}", mark.line + 1


def _paths(
    key: yaml.ScalarNode, value: yaml.Node, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], yaml.Mark, bool]]:
    """A key and all keys below it, where they are, and whether each has a single value."""
    entries = list(_entries(value))
    yield path, key.start_mark, not entries
    for inner, child in entries:
        yield from _paths(inner, child, (*path, inner.value))


def _entries(node: yaml.Node) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The entries of a mapping; merged ones (`<<`) may be replaced, and are not among them."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            yield key, value

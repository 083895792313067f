"""Imports point down the layers, lazy ones inside functions too, and no module imports itself in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    ("errors", "progress", "redaction", "signals"),
    ("config",),
    ("storage", "objectives"),
    ("models", "tracking", "cluster"),
    ("generation", "data"),
    ("training",),
    ("evaluation",),
    ("tuning",),
    ("workflows",),
    ("cli",),
)
"""From the lowest to the highest; packages of one layer do not import one another."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules(root: Path, package: str) -> dict[str, Path]:
    """Module name to file of all modules below `root/package`."""
    found = {}
    for file in (root / package).rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(known: dict[str, Path], module: str) -> Iterator[str]:
    """Modules among `known` that `module` imports anywhere in its file, but for type checking."""
    tree = ast.parse(known[module].read_text(encoding="utf-8"))
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known or node.module in known:
                    yield full if full in known else node.module


def against_the_order(root: Path) -> list[str]:
    known = modules(root, "tbpo_ray")
    faults = []
    for module in known:
        for target in imports(known, module):
            here, there = module.split(".")[1:2], target.split(".")[1:2]
            if here and there and here != there and LEVEL[there[0]] >= LEVEL[here[0]]:
                faults.append(f"{module} imports {target}")
    return faults


def circle(root: Path) -> list[str]:
    known = modules(root, "tbpo_ray")
    graph = {module: {t for t in imports(known, module) if t != module} for module in known}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_point_down_the_layers():
    assert against_the_order(ROOT) == []


def test_no_module_is_in_an_import_circle():
    assert circle(ROOT) == []


def test_the_top_level_keeps_only_what_every_layer_uses():
    top = {file.stem for file in (ROOT / "tbpo_ray").iterdir() if file.suffix == ".py" or file.is_dir()}
    assert top - {"__pycache__"} == {"__init__", *LEVEL}


@pytest.mark.parametrize("folder", ["tbpo_ray", "benchmarks"])
def test_nothing_imports_from_jobs_or_tests(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("jobs", "tests") for n in names), file
            if folder == "tbpo_ray":
                assert not any(n.split(".")[0] == "benchmarks" for n in names), file


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("def f():\n    from tbpo_ray.workflows import train\n", "order"),
        ("import tbpo_ray.data.b\n", "circle"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, text, fault):
    package = tmp_path / "tbpo_ray"
    for name in ("data", "workflows"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    (package / "workflows" / "train.py").touch()
    (package / "data" / "a.py").write_text(text)
    (package / "data" / "b.py").write_text("import tbpo_ray.data.a\n")
    found = against_the_order(tmp_path) if fault == "order" else circle(tmp_path)
    assert any("tbpo_ray.data.a" in item for item in found)

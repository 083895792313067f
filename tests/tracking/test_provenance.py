"""What identifies the code of a run, and who may import MLflow."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import tbpo_ray
from tbpo_ray.tracking.provenance import provenance

PACKAGE = Path(tbpo_ray.__file__).parent


def test_a_change_anywhere_in_the_package_makes_the_run_dirty(monkeypatch):
    def run(command, **_):
        changed = " M tbpo_ray/x.py" if command[-1] == str(PACKAGE) else ""
        return subprocess.CompletedProcess(command, 0, stdout=changed if "status" in command else "abc\n")

    monkeypatch.setattr(subprocess, "run", run)
    tags = provenance()
    assert tags["mlflow.source.git.commit"] == "abc" and tags["git.dirty"] == "true"
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 128, "", "no git")
    )
    assert "git.dirty" not in provenance()


def test_only_the_tracking_package_imports_mlflow():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "mlflow" for name in names):
                assert file.parent.name == "tracking", file

"""The Python interface, and the notebook that shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tbpo_ray
from tbpo_ray.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def cells(kind: str) -> list[dict]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def script(parameters: str) -> str:
    """The notebook's code with other values in the cell that is tagged `parameters`."""
    sources = []
    for cell in cells("code"):
        tagged = "parameters" in cell["metadata"].get("tags", [])
        sources.append(parameters if tagged else "".join(cell["source"]))
    return "\n\n".join(sources)


def test_the_interface_is_imported_when_it_is_used():
    code = "import sys, tbpo_ray; from tbpo_ray import Config, load_config; Config(); load_config()\n"
    code += "print([name for name in ('torch', 'ray', 'mlflow', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "[]\n", done.stderr
    assert all(callable(getattr(tbpo_ray, name)) for name in tbpo_ray.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = tbpo_ray.trian


def test_overrides_may_be_a_mapping():
    config = tbpo_ray.load_config(None, {"run.name": "007", "objective": {"beta": 0.5}})
    assert (config.run.name, config.objective.beta) == ("007", 0.5)
    assert config == tbpo_ray.load_config(None, ['run.name="007"', "objective.beta=0.5"])
    with pytest.raises(InputError, match=r"training\.max_step"):
        tbpo_ray.load_config(None, {"training.max_step": 3})


def test_every_cell_is_valid_python_and_the_parameters_are_tagged():
    compile(script("SFT_STEPS, STEPS, PROMPTS = 1, 1, 1"), "notebook", "exec")
    tagged = [cell for cell in cells("code") if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    identities = [cell["id"] for kind in ("code", "markdown") for cell in cells(kind)]
    assert len(set(identities)) == len(identities)


@pytest.mark.e2e
def test_the_notebook_runs(tmp_path):
    code = script(f'SFT_STEPS, STEPS, PROMPTS = 6, 4, 8\nOUTPUT = "{tmp_path}/runs"')
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "docs",
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exact match" in done.stdout
    for name in ("sft", "tbpo", "dpo"):
        assert (tmp_path / "runs" / name / "DONE").is_file()
    verdict = json.loads((tmp_path / "runs" / "verdict" / "evaluation" / "verdict.json").read_text())
    assert [policy["name"] for policy in verdict["policies"]] == ["sft", "tbpo", "dpo"]

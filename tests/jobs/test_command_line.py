"""The command-line surface of the jobs: a changed option fails here before it breaks somebody's script."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).resolve().parents[2] / "jobs"
COMMON = {"--config", "--dry-run", "--help"}
OPTIONS = {
    "benchmark": COMMON | {"--into", "--json", "--only", "--quick", "--trl-python"},
    "compare": COMMON,
    "evaluate": COMMON,
    "pipeline": COMMON,
    "prepare": COMMON,
    "sft": COMMON,
    "train": COMMON,
    "tune": COMMON | {"--space"},
}


def run_job(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    """Run a job in this process; returns its exit status."""
    file = JOBS / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(file), *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))  # jobs/benchmark.py adds the repository to it
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_every_job_is_listed() -> None:
    assert {file.stem for file in JOBS.glob("*.py")} == set(OPTIONS)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_options_of_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run_job(monkeypatch, name, "--help") == 0
    text = capsys.readouterr().out
    # An option starts its own line; options that a help text mentions do not.
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, flags=re.MULTILINE)
    assert set(listed) == OPTIONS[name]
    assert "dotted.key=value" in text


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_job_without_a_configuration_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run_job(monkeypatch, name) == 2
    assert "--config" in capsys.readouterr().err


def test_an_unknown_part_of_the_benchmark_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(JOBS / "configs" / "tiny.yaml")
    assert run_job(monkeypatch, "benchmark", "--config", config, "--only", "data,speed:x") == 2
    assert "speed:x" in capsys.readouterr().err

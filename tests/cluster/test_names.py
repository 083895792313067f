"""Names that would lead outside the run folder are refused, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tbpo_ray.cli import run_job
from tbpo_ray.errors import InputError

BAD = ["..", "../out", "a/../../out", "/tmp/out", "a#b", "%2e%2e", "a\0b", "a\\b", ".hidden", "a" * 129]


def run(work, tmp_path: Path, *overrides: str) -> int:
    (tmp_path / "c.yaml").write_text("{}\n")
    out = tmp_path / "in" / "runs"
    return run_job(
        work, description="", argv=["--config", str(tmp_path / "c.yaml"), f"run.output_dir={out}", *overrides]
    )


def files(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if p.name != "c.yaml"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("key", ["run.name", "sft.run.name"])
def test_a_run_that_would_lead_elsewhere_is_refused(tmp_path, capsys, key, name):
    from tbpo_ray.workflows.pipeline import run_pipeline

    quoted = '"' + name.replace("\\", "\\\\").replace("\0", "\\0") + '"'
    assert run(run_pipeline, tmp_path, f"{key}={quoted}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "run.name" in line
    assert files(tmp_path) == set()


def test_a_symbolic_link_in_place_of_a_run_folder_is_refused(tmp_path, capsys):
    from tbpo_ray.workflows.train import train

    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "in" / "runs").mkdir(parents=True)
    (tmp_path / "in" / "runs" / "linked").symlink_to(outside)
    before = files(tmp_path)
    assert run(train, tmp_path, "run.name=linked") == 2
    assert "run.name=linked" in capsys.readouterr().err
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["../../none", "%2e%2e/x", "a#b", "a/b/c", "/etc/none", "a b"])
def test_an_invalid_hub_name_is_refused_before_any_request(name, monkeypatch):
    from tbpo_ray.data import sources

    asked = sources.resolve_source
    monkeypatch.setattr(
        sources, "resolve_source", lambda s: pytest.fail(s) if s.startswith("hf://") else asked(s)
    )
    with pytest.raises(InputError, match="hf:OWNER/NAME"):
        sources.resolve_source(f"hf:{name}")


def test_a_nul_in_any_value_is_refused(capsys, tmp_path):
    assert run(lambda config: None, tmp_path, 'data.cache_dir="a\\0b"') == 2
    assert "data.cache_dir" in capsys.readouterr().err


def test_a_password_in_an_address_is_neither_shown_nor_stored_nor_counted_as_a_change(tmp_path):
    from tbpo_ray.config.loading import load_config, to_yaml
    from tbpo_ray.training.resume_checks import refuse_changes

    config = load_config(
        None,
        ["tracking.uri=https://me:canary@mlflow.example.org", "data.train=s3://me:canary@bucket/pairs.jsonl"],
    )
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert "canary" not in to_yaml(config) and "https://mlflow.example.org" in to_yaml(config)
    refuse_changes(config, tmp_path)
    other = load_config(None, ["data.train=s3://me:canary@bucket/others.jsonl"])
    with pytest.raises(InputError, match="others"):
        refuse_changes(other, tmp_path)

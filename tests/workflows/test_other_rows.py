"""Workers start again with other micro-batches where the self-check rules out the rows of the plan."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tbpo_ray.config.loading import load_config
from tbpo_ray.training.resume_checks import adopt_resolved
from tbpo_ray.training.run_plan import OtherRowsError, resolve_run
from tbpo_ray.workflows import train as module


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"training.packing": False}, "shared"),
        ({"training.packing": False, "training.shared_prompt": False}, "separate"),
    ],
)
def test_the_rows_that_the_self_check_chose_are_planned_stored_and_resumed(
    tmp_path, monkeypatch, capsys, changes, rows
):
    config = load_config(
        None, [f"run.output_dir={tmp_path}", "objective.name=dpo", "training.micro_batch_tokens=512"]
    )
    plan = resolve_run(config)
    plan.run_dir.mkdir(parents=True)
    seen = []

    def run_workers(plan: Any, *_: Any) -> dict[str, Any]:
        seen.append(plan.rows)
        if len(seen) == 1:
            raise OtherRowsError(changes, "rows with several pairs give other log-probs")
        return {"step": 1}

    monkeypatch.setattr(module, "run_workers", run_workers)
    anything: Any = None
    assert module._run_workers(plan, anything, anything, anything, None) == {"step": 1}
    assert seen == ["packed", rows]
    said = capsys.readouterr().err
    assert "give other log-probs; the workers start again with training.packing=false" in said
    stored = yaml.safe_load((plan.run_dir / "config.yaml").read_text())["training"]
    assert {f"training.{key}": stored[key] for key in ("packing", "shared_prompt")} == {
        "training.packing": False,
        "training.shared_prompt": changes.get("training.shared_prompt"),
    }
    (plan.run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert resolve_run(adopt_resolved(config, plan.run_dir)).rows == rows

"""Sample and judge a checkpoint's policy while training continues, through Ray Train's validation."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tbpo_ray.cluster.error_summary import error_summary
from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.storage.json_lines import dumps
from tbpo_ray.storage.ownership import LeaseLostError
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.metrics_file import VALIDATION, MetricsFile, append_line
from tbpo_ray.training.run_paths import RunPaths

TASK_CPUS = 0.05
"""The task mostly waits for vLLM engines, which reserve resources of their own."""
_COMMIT_TIMEOUT_SECONDS = 1800.0


def validate_checkpoint(
    checkpoint: Any, tree: dict[str, Any], run_paths: dict[str, Any], step: int
) -> dict[str, float]:
    """Export the checkpoint into `validation/step-N/` of the run's folder, sample and judge it there.

    Runs as a Ray task while training continues. A failure is recorded in `events.log` and does not affect
    training.

    Args:
        checkpoint: a Ray Train checkpoint whose path is the checkpoint's folder.
        tree: the run's configuration.
        run_paths: the fields of the run's `RunPaths`.

    Returns:
        `validation/<metric>` of `evaluation.prompts`, which is also appended to `validation.jsonl`.
    """
    folder, at = Path(checkpoint.path), RunPaths(**run_paths)
    run = Path(at.run_dir)
    try:
        metrics = _validate(folder, run, tree, at, step)
        at.lease.check()
    except LeaseLostError:
        return {}  # the run continues elsewhere, and its files are no longer ours to write
    except Exception as error:  # a policy that cannot be sampled must not end its training
        MetricsFile(run, at.lease).log_event(
            f"sampling the policy of step {step} failed: {error_summary(error)}"
        )
        return {}
    finally:
        (folder / ckpt.PENDING).unlink(missing_ok=True)
    append_line(run / VALIDATION, dumps({"step": step, **metrics}))
    return metrics


def _validate(
    folder: Path, run: Path, tree: dict[str, Any], run_paths: RunPaths, step: int
) -> dict[str, float]:
    from tbpo_ray.evaluation.evaluator import evaluate_policies
    from tbpo_ray.training.exporting import export_checkpoint

    _await_commit(folder)
    config = Config.model_validate(tree)
    output = run / "validation" / folder.name
    output.mkdir(parents=True, exist_ok=True)
    export = export_checkpoint(tree, asdict(run_paths), {"step": step}, str(folder), str(output / "export"))
    (folder / ckpt.PENDING).unlink(missing_ok=True)
    changes = {
        "evaluation.max_prompts": config.training.validation_prompts,
        "evaluation.credit_pairs": 0,
        "evaluation.traces": 0,
        "evaluation.benchmarks": {},
    }
    verdict = evaluate_policies(
        stage_config(config, changes), {"policy": export}, output=output, reference=run_paths.model
    )
    return {f"validation/{name}": e.value for name, e in verdict["policy"].metrics.items()}


def _await_commit(folder: Path) -> None:
    """Wait for the manifest, since a checkpoint may still be being written in the background."""
    deadline = time.monotonic() + _COMMIT_TIMEOUT_SECONDS
    while not (folder / ckpt.MANIFEST).is_file():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder.name} is not complete after {_COMMIT_TIMEOUT_SECONDS:.0f} s")
        time.sleep(0.1)

"""A child of the benchmark: a study as `jobs/tune.py` runs it, or a training run as `jobs/train.py` does.

`python -m benchmarks.search_loop JSON` with a configuration tree and, for a study, a space.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.turns import Measured, TreeClock, child
from tbpo_ray.config.loading import to_tree
from tbpo_ray.config.schema import Config
from tbpo_ray.storage.paths import STUDY_STATE, cache_dir


def run_study(config: Config, space: Mapping[str, Any]) -> Measured:
    """A study in a process of its own.

    Returns:
        seconds: of the whole process, Ray's start and end included; search_seconds: until the last trial
        ended, without preparing; cpu_seconds; trials: finished; scorings: how often a reference was scored.
    """
    return _run({"config": to_tree(config), "space": dict(space)})


def run_training(config: Config) -> Measured:
    """A training run in a process of its own: seconds, cpu_seconds, scorings."""
    return _run({"config": to_tree(config)})


def _run(job: Mapping[str, Any]) -> Measured:
    began = time.perf_counter()
    row = child(["-m", "benchmarks.search_loop"], job)
    return row | {"seconds": time.perf_counter() - began}


def main() -> None:
    """Run the job given as JSON in the first argument; print what was measured."""
    from tbpo_ray.training.reference_scores import scorings

    job = json.loads(sys.argv[1])
    config = Config.model_validate(job["config"])
    out: Measured = {}
    with TreeClock() as clock:
        if "space" in job:
            out = study(config, job["space"])
        else:
            from tbpo_ray.workflows.train import train

            train(config)
    out |= {"cpu_seconds": clock.seconds, "scorings": len(scorings(cache_dir(config)))}
    print(json.dumps(out))


def study(config: Config, source: Mapping[str, Any]) -> Measured:
    """Search; every trial must be finished."""
    from tbpo_ray.tuning.space import Space
    from tbpo_ray.tuning.study_state import StudyState
    from tbpo_ray.workflows.tune import tune

    result = tune(config, Space.parse(source))
    study = StudyState.open(result.folder / STUDY_STATE)
    failed = [f"{trial.name}: {trial.reason}" for trial in study.trials if trial.state != "finished"]
    if failed:
        raise RuntimeError(f"trials that did not finish: {'; '.join(failed)}")
    return {"trials": len(study.trials), "search_seconds": study.facts["search_seconds"]}


if __name__ == "__main__":
    main()

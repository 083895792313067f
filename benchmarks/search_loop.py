"""Child process of the benchmark: a study as in `jobs/tune.py`, or a training run as in `jobs/train.py`.

`python -m benchmarks.search_loop JSON`, with a configuration tree and, for a study, a space.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.measure import Measured, TreeClock, run_child
from tbpo_ray.config.loading import to_tree
from tbpo_ray.config.schema import Config
from tbpo_ray.storage.paths import STUDY_STATE, cache_dir


def run_study(config: Config, space: Mapping[str, Any]) -> Measured:
    """Run a study in a separate process.

    Returns:
        `seconds` of the whole process, including Ray's start and shutdown; `search_seconds` until the last
        trial ended, without preparing; `cpu_seconds`; finished `trials`; `scorings`, how often reference
        scores were computed.
    """
    return _run({"config": to_tree(config), "space": dict(space)})


def run_training(config: Config) -> Measured:
    """Run training in a separate process; returns `seconds`, `cpu_seconds` and `scorings`."""
    return _run({"config": to_tree(config)})


def _run(job: Mapping[str, Any]) -> Measured:
    began = time.perf_counter()
    row = run_child(["-m", "benchmarks.search_loop"], job)
    return row | {"seconds": time.perf_counter() - began}


def main() -> None:
    """Run the job given as JSON in the first argument and print the measurements."""
    from tbpo_ray.training.reference_scores import scorings

    job = json.loads(sys.argv[1])
    config = Config.model_validate(job["config"])
    out: Measured = {}
    with TreeClock() as clock:
        if "space" in job:
            out = run_trials(config, job["space"])
        else:
            from tbpo_ray.workflows.train import train

            train(config)
    out |= {"cpu_seconds": clock.seconds, "scorings": len(scorings(cache_dir(config)))}
    print(json.dumps(out))


def run_trials(config: Config, source: Mapping[str, Any]) -> Measured:
    """Run a study in which every trial must finish.

    Raises:
        RuntimeError: a trial did not finish.
    """
    from tbpo_ray.tuning.space import Space
    from tbpo_ray.tuning.study_state import StudyState
    from tbpo_ray.workflows.tune import tune

    result = tune(config, Space.parse(source))
    state = StudyState.open(result.folder / STUDY_STATE)
    failed = [f"{trial.name}: {trial.reason}" for trial in state.trials if trial.state != "finished"]
    if failed:
        raise RuntimeError(f"trials that did not finish: {'; '.join(failed)}")
    return {"trials": len(state.trials), "search_seconds": state.facts["search_seconds"]}


if __name__ == "__main__":
    main()

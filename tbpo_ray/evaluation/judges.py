"""Build the judge that `evaluation.judge` configures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tbpo_ray.config.open_values import JUDGE_KEYS
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.checker import Checker
from tbpo_ray.evaluation.judge import ImplicitJudge, Judge, refuse_unknown
from tbpo_ray.evaluation.llm_judge import LlmJudge
from tbpo_ray.evaluation.pool_judge import PoolJudge
from tbpo_ray.evaluation.reward_model import RewardModelJudge
from tbpo_ray.evaluation.suites import judge_settings
from tbpo_ray.storage.paths import cache_dir


def make_judge(config: Config, *, source: str, output: Path) -> Judge:
    """Build the judge of `evaluation.judge`.

    Args:
        source: where the prompts come from; the built-in task has its own checker.
        output: folder in which a judge may keep its cache.

    Raises:
        InputError: settings that this kind of judge does not accept.
    """
    settings = judge_settings(config)
    kind = settings.pop("kind", "checker")
    if config.evaluation.suite is not None and kind == "checker" and settings.get("function") is None:
        raise InputError(
            f"evaluation.judge.kind=checker: evaluation.suite={config.evaluation.suite} has no function that "
            "checks its answers; use llm or reward_model, or give evaluation.judge.function"
        )
    builders: dict[str, Callable[[], Judge]] = {
        "checker": lambda: Checker.from_settings(settings, source),
        "reward_model": lambda: RewardModelJudge.from_settings(
            settings,
            attention=config.model.attention,
            gpu_labels=config.cluster.labels.generate if config.cluster.gpus else None,
            cache=cache_dir(config),
        ),
        "llm": lambda: _language_model(settings, config, output),
        "implicit": lambda: _implicit(settings),
    }
    return builders[kind]()  # the configuration accepts only these kinds


def _language_model(settings: dict[str, Any], config: Config, output: Path) -> LlmJudge:
    if "pool" in settings:
        return PoolJudge.on_cluster(settings, config, output)
    return LlmJudge.from_settings(settings, cache=output / "judge_cache.jsonl")


def _implicit(settings: dict[str, Any]) -> ImplicitJudge:
    refuse_unknown(settings, JUDGE_KEYS["implicit"])
    return ImplicitJudge()

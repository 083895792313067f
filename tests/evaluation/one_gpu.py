"""Evaluate policies on a cluster whose one GPU is only a number; print who holds a model when roles change.

The models run on the CPU: the engines by the CPU build of vLLM, the reference by a function that ignores its
device.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tbpo_ray.cluster.session import start_ray
from tbpo_ray.config.loading import load_config
from tbpo_ray.evaluation import evaluator, pool_judge, reference_kl

ROLES: list[tuple[str, list[str]]] = []
SEEN: set[str] = set()
NAMES = ("WatchedEngine", "EngineCore", "score_on_cpu")


def holders() -> list[str]:
    """The processes of this session that hold a model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        found += [name for name in NAMES if name in line]
    return found


def look() -> None:
    while True:
        SEEN.update(holders())
        time.sleep(0.2)


def noting(role: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        ROLES.append((role, holders()))
        return function(*args, **kwargs)

    return call


def main(folder: str, model: str) -> None:
    scored = reference_kl.answer_logprobs

    def score_on_cpu(model: str, pairs: Any, device: str, attention: str) -> Any:
        assert device == "cuda"
        return scored(model, pairs, "cpu", attention)

    for module, name, role in (
        (evaluator, "generate", "policy"),
        (pool_judge, "generate", "judge"),
        (reference_kl, "run_on_gpu", "reference"),
    ):
        setattr(module, name, noting(role, getattr(module, name)))
    setattr(reference_kl, "answer_logprobs", score_on_cpu)  # noqa: B010 (its type is narrower)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    threading.Thread(target=look, daemon=True).start()
    start_ray(num_cpus=4, num_gpus=1, labels={"pool": "generate"})
    config = load_config(
        None,
        [
            f"run.output_dir={folder}",
            "evaluation.prompts=builtin:copyedit?split=test",
            "evaluation.max_prompts=4",
            f"evaluation.judge={{kind: llm, pool: {model}, max_tokens: 4}}",
            "generation={max_tokens: 4, engine: {enforce_eager: true, enable_chunked_prefill: false}}",
            "cluster.use_gpu=auto",
            "cluster.labels.generate={pool: generate}",
        ],
    )
    try:
        evaluator.evaluate_policies(config, {"a": model, "b": model}, output=Path(folder) / "out")
    except Exception as error:  # an untrained judge gives no verdict, which ends the evaluation
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    ROLES.append(("end", holders()))
    print(json.dumps({"roles": ROLES, "seen": sorted(SEEN)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

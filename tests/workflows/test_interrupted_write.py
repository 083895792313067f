"""Ctrl-C or SIGTERM while a checkpoint is being written in the background."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.run_paths import RunPaths
from tbpo_ray.training.run_plan import resolve_run
from tbpo_ray.workflows import trainer


def test_an_interrupted_driver_lets_the_checkpoint_be_completed(tmp_path, monkeypatch):
    checkpoints = tmp_path / "checkpoints"
    partial = ckpt.partial_folder(checkpoints, 5, "group")

    class Interrupted:
        def fit(self) -> None:
            partial.mkdir()
            threading.Timer(0.3, ckpt.publish, (partial, ckpt.step_folder(checkpoints, 5))).start()
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_build_trainer", lambda *_: Interrupted())
    monkeypatch.setattr(trainer, "Follower", lambda *_, **__: nullcontext())
    plan = resolve_run(load_config(None, ["training.max_steps=9"]))
    data: Any = SimpleNamespace(pairs=4, lengths=lambda: np.full((4, 3), 5))
    paths = RunPaths(str(tmp_path), str(checkpoints), "model", "prepared")
    with pytest.raises(KeyboardInterrupt):
        trainer.run_workers(plan, paths, data, SimpleNamespace(), None)  # type: ignore[arg-type]
    assert [f.name for f in checkpoints.iterdir()] == ["step-00000005"]

"""Worker groups that shrink and grow, checkpoints in the background and the best of them, live references."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.workflows.train import train

pytestmark = pytest.mark.e2e


def run(out: Path, model: str, name: str, *more: str) -> Path:
    settings = [
        f"run.name={name}", f"run.output_dir={out}", f"model.name_or_path={model}",
        "data.train=builtin:copyedit?split=train&pairs=40", "data.eval=null", "data.max_length=64",
        "objective.name=tbpo_q", "training.pairs_per_step=4", "training.micro_batch_pairs=2",
        "training.max_steps=9", "training.learning_rate=1e-4", "training.scheduler=constant",
        "training.precision=fp32", "training.checkpoint_every=3", "cluster.use_gpu=false",
        "cluster.threads_per_worker=1", "cluster.num_workers=1",
    ]  # fmt: skip
    return train(load_config(None, [*settings, *more])).run_dir


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory, ray_session) -> Path:
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def whole(out, small_model) -> Path:
    """Nine steps without interruption on one worker."""
    return run(out, small_model, "whole")


def test_two_workers_then_one_then_two(out, small_model, whole):
    for workers, steps in ((2, 3), (1, 6), (2, 9)):
        folder = run(
            out, small_model, "resized", f"cluster.num_workers={workers}", f"training.max_steps={steps}"
        )
    assert "(2 -> 1 workers)" in (folder / "events.log").read_text()
    assert "(1 -> 2 workers)" in (folder / "events.log").read_text()
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-4)


def test_background_checkpoints_and_the_best_of_them(out, small_model, whole):
    folder = run(
        out, small_model, "background", "training.async_checkpoints=true", "training.keep_checkpoints=1",
        "training.keep_best=1", "training.best_metric=loss", "training.best_mode=max", "training.export=best",
    )  # fmt: skip
    assert losses(folder) == losses(whole)
    logged = losses(folder)
    best = max((3, 6, 9), key=lambda step: logged[step - 1])
    kept = {f.name for f in (folder / "checkpoints").glob("step-*")}
    assert kept == {"step-00000009", f"step-{best:08d}"}
    assert all(ckpt.find_corruption(folder / "checkpoints" / name) is None for name in kept)

    from safetensors import safe_open

    (file,) = (folder / "checkpoints" / f"step-{best:08d}").glob("optimizer-*")
    with safe_open(file, "pt") as saved, safe_open(folder / "export" / "model.safetensors", "pt") as exported:
        name = "model.layers.0.mlp.up_proj.weight"
        assert saved.get_tensor(f"model.{name}@0@master").equal(exported.get_tensor(name).flatten())


def test_a_damaged_checkpoint_is_found_by_the_worker_that_reads_it(out, small_model, whole):
    """The stream is set up for the damaged one; the workers resume from the one before, to the same end."""
    two = ("cluster.num_workers=2", "training.async_checkpoints=true")
    folder = run(out, small_model, "damaged", *two, "training.max_steps=6")
    file = folder / "checkpoints" / "step-00000006" / "optimizer-0001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    run(out, small_model, "damaged", *two)
    events = (folder / "events.log").read_text()
    assert f"step-00000006 is not used: {file.name} has changed since it was written" in events
    assert "continuing from step-00000003 (2 -> 2 workers)" in events
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-4)


def test_live_and_cached_reference_scores_give_the_same_losses(out, small_model):
    """The live reference is the policy with its adapter disabled; the cached one never had an adapter."""
    more = ["training.max_steps=4", "objective.name=dpo", "training.learning_rate=1e-3"]
    more += ["model.lora.r=4", "model.lora.dropout=0"]
    live, cached = (
        losses(run(out, small_model, kind, f"training.reference_scores={kind}", *more))
        for kind in ("live", "cached")
    )
    assert live[0] == pytest.approx(math.log(2), abs=1e-5)
    assert len(set(live)) == 4
    assert live == pytest.approx(cached, abs=1e-6)


def test_a_checkpoint_is_sampled_during_training(out, small_model):
    prompts = "builtin:copyedit?split=test&pairs=5"
    folder = run(
        out, small_model, "sampled", "training.validate_every=4", "training.validation_prompts=4",
        f"evaluation.prompts={prompts}", "evaluation.judge.kind=checker", "generation.max_tokens=6",
        "evaluation.judge.function=tbpo_ray.data.copyedit:check", "cluster.resources_per_worker.CPU=0.5",
    )  # fmt: skip
    assert "failed" not in ((folder / "events.log").read_text() if (folder / "events.log").exists() else "")
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert sorted(row["step"] for row in rows) == [4, 8]
    assert all(0 <= row["validation/exact_match"] <= 1 for row in rows)

    from mlflow import MlflowClient

    run_id = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
    history = MlflowClient(f"sqlite:///{out}/mlflow.db").get_metric_history(run_id, "validation/exact_match")
    assert sorted(point.step for point in history) == [4, 8]

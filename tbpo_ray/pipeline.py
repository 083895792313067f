"""SFT -> preference training -> evaluation before and after, as one parent run with children."""

from __future__ import annotations

import json
from pathlib import Path

from tbpo_ray.cluster import fit_to_cluster, start_ray
from tbpo_ray.config import Config
from tbpo_ray.configuration import stage_config
from tbpo_ray.evaluation.evaluate import evaluate_policies
from tbpo_ray.evaluation.verdict import Verdict
from tbpo_ray.storage import write_atomic
from tbpo_ray.tracking import Tracker
from tbpo_ray.training.driver import say, train
from tbpo_ray.training.plan import run_dir

RUN_FILE = "pipeline.json"


def stages(config: Config) -> tuple[Config | None, Config]:
    """The configurations of SFT (None without an `sft` section) and of preference training.

    SFT owns the folder `<run.name>-sft`; preference training owns `<run.name>` and starts from its export.

    Raises:
        InputError: for faults in the `sft` section.
    """
    if not config.sft:
        return None, config
    sft = stage_config(config, config.sft, objective__name="sft", run__name=f"{config.run.name}-sft")
    start = str(run_dir(sft) / "export")
    return sft, stage_config(config, {}, model__name_or_path=start, model__gguf_file=None)


def run_pipeline(config: Config) -> Verdict:
    """Run all stages; stages that are finished are left as they are.

    Raises:
        InputError, RunFailed: as the stages do.
    """
    sft, preference = stages(config)
    folder = run_dir(config)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / RUN_FILE
    known = json.loads(note.read_text(encoding="utf-8"))["mlflow_run_id"] if note.is_file() else None
    with Tracker.start(
        config.tracking,
        config.run.output_dir,
        name=config.run.name,
        kind="pipeline",
        config=config,
        run_id=known,
    ) as tracker:
        write_atomic(note, json.dumps({"mlflow_run_id": tracker.run_id}))
        policies = {}
        if sft is not None:
            say("stage 1 of 3: supervised fine-tuning")
            policies["sft"] = str(train(sft, kind="sft", parent_run_id=tracker.run_id).export)
        say("stage 2 of 3: preference training")
        result = train(preference, kind="train", parent_run_id=tracker.run_id)
        if sft is None:
            policies["base"] = preference.model.name_or_path
        policies[preference.objective.name] = str(result.export)
        say("stage 3 of 3: evaluation")
        start_ray()
        preference = fit_to_cluster(preference)
        with Tracker.start(
            config.tracking, config.run.output_dir, name=f"{config.run.name}-evaluate", kind="evaluate",
            config=preference, parent_run_id=tracker.run_id,
        ) as child:  # fmt: skip
            verdict = evaluate_policies(preference, policies, output=folder / "evaluation", tracker=child)
        after = verdict[preference.objective.name].metrics
        tracker.log_metrics({name: estimate.value for name, estimate in after.items()})
        tracker.log_artifact(Path(folder / "evaluation" / "verdict.txt"))
    print(verdict.table())
    print(f"\nMLflow: {tracker.url_hint()}")
    return verdict

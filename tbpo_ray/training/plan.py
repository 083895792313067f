"""What a run's workers need, what may change when it goes on, and what it is going to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tbpo_ray.config.loading import flatten, to_yaml
from tbpo_ray.config.schema import Config
from tbpo_ray.data.schedule import ORDER, Schedule
from tbpo_ray.errors import InputError
from tbpo_ray.objectives import build_objective
from tbpo_ray.storage.ownership import WriteLease
from tbpo_ray.storage.paths import STUDY_STATE
from tbpo_ray.training.checkpoint import last_state

NO_EFFECT = (
    "run.output_dir", "tracking.", "cluster.", "evaluation.", "generation.", "compare.", "tune.", "sft",
    "runs",
    "data.cache_dir", "data.quarantine_limit", "data.card_column", "data.eval", "data.max_eval_pairs",
    "training.log_every", "training.checkpoint_every", "training.keep_checkpoints", "training.eval_every",
    "training.keep_best", "training.best_metric", "training.best_mode", "training.export",
    "training.async_checkpoints", "training.validate_every", "training.validation_prompts",
    "training.on_nonfinite",
)  # fmt: skip
"""Keys (or beginnings of keys) that do not alter what a run computes."""
READ_BY = {
    "objective.bregman.": ("tbpo_q", "tbpo_a", "bpo"),
    "objective.state_baseline.": ("tbpo_q", "tbpo_a"),
    "objective.token_weights.": ("tis_dpo", "sepo", "t_reg"),
    "objective.alpha": ("tdpo2", "t_reg"),
    "objective.gamma": ("simpo",),
    "objective.select_ratio": ("sepo",),
}
"""Keys (or beginnings of keys) that alter only what these objectives compute."""
EXTENDS = ("training.max_steps", "training.epochs")


@dataclass(frozen=True)
class RunPaths:
    """Paths that a worker needs; all on storage that every node sees."""

    run_dir: str
    checkpoints: str
    model: str
    prepared: str
    owner: str = ""
    """Token of the driver's claim on the run."""
    prepared_eval: str | None = None
    reference: str | None = None
    """Folder of the frozen reference, where it is held live and is not the policy itself."""
    extra: list[str] = field(default_factory=list)
    """Folders with columns that go beside the prepared pairs: reference scores, token weights."""
    extra_eval: list[str] = field(default_factory=list)

    @property
    def lease(self) -> WriteLease:
        """The driver's right to write into the run's folder, for those who work for it."""
        return WriteLease(self.run_dir, self.owner)


def cuts_tail(config: Config) -> bool:
    """Whether answers are cut at the shorter one's length."""
    objective = build_objective(config.objective.model_dump(exclude_none=True, exclude={"token_weights"}))
    return objective.compares_to_shorter and config.training.cut_dead_tail


def make_schedule(config: Config, lengths: Any) -> Schedule:
    """The order in which the prepared pairs are trained on."""
    training = config.training
    return Schedule(
        lengths,
        seed=config.run.seed,
        pairs_per_step=training.pairs_per_step,
        micro_batch_pairs=training.micro_batch_pairs,
        length_batches=training.length_batches,
        cut_tail=cuts_tail(config),
        epochs=training.epochs,
        max_steps=training.max_steps,
    )


def refuse_changes(config: Config, folder: Path) -> None:
    """Compare with the configuration that a run was started with.

    Raises:
        InputError: one sentence for each change that would alter the run's result; a study of that name.
    """
    if (folder / STUDY_STATE).is_file():
        raise InputError(
            f"run.name={config.run.name}: {folder} holds a study; use another run.name for the run"
        )
    file = folder / "config.yaml"
    if not file.is_file() or not any((folder / "checkpoints").glob("step-*")):
        return
    old = _flat(yaml.safe_load(file.read_text(encoding="utf-8")))
    new = _flat(yaml.safe_load(to_yaml(config)))
    name = config.objective.name
    unread = (*NO_EFFECT, *(key for key, readers in READ_BY.items() if name not in readers))
    faults = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if was == now or any(_under(key, k) for k in unread):
            continue
        if key in EXTENDS and was is not None and now is not None and now > was:
            continue
        faults.append(
            f"{key}={now!r}: run {config.run.name} was started with {was!r}; "
            + ("only a larger value extends a run" if key in EXTENDS else "use another run.name")
        )
    if faults:
        raise InputError(*faults)


def refuse_other_order(config: Config, folder: Path, *, extended: bool) -> None:
    """Compare the order of the batches with the one that a run's checkpoints were trained in.

    Args:
        extended: whether steps come behind those that the run had.

    Raises:
        InputError: there are steps left, and this code would take them in another order.
    """
    state = last_state(folder / "checkpoints")
    was = state.get("order", 1)
    if not state or was == ORDER or (state["step"] == state.get("steps_total") and not extended):
        return
    raise InputError(
        f"run.name={config.run.name}: its steps up to {state['step']} took the pairs in order {was}, of "
        f"{'older' if was < ORDER else 'newer'} code; this code has order {ORDER}: it would repeat some "
        "pairs and leave others out; go on with the code that began it, or use another run.name"
    )


def _under(key: str, beginning: str) -> bool:
    return key == beginning or (beginning.endswith(".") and key.startswith(beginning))


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(tree)
    return {k: v for k, v in flat.items() if not (k == "sft" or k.startswith("sft."))}

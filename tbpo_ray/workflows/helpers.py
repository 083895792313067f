"""The models that an objective needs beside the policy, each trained as an ordinary run of its own.

`sepo` needs an oracle, `tis_dpo` a model trained towards chosen answers and one trained towards rejected ones
(:data:`tbpo_ray.config.helpers.HELPERS`). A helper starts from the model that the policy starts from. Its run
is in `<run>/helpers/NAME/`, and its export becomes `objective.token_weights.positive` or `negative`, or
`objective.guide.model`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from tbpo_ray.config.helpers import HELPERS, HelperTraits
from tbpo_ray.config.loading import expand_dotted, flatten, is_at_or_below, merge, stage_config
from tbpo_ray.config.objective import ObjectiveConfig
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import check_same_tokenizer
from tbpo_ray.models.resolve import policy_folder
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.paths import cache_dir, output_dir, run_dir
from tbpo_ray.tracking.store import store_uri
from tbpo_ray.training.run_result import RunResult
from tbpo_ray.workflows.train import check_run, train

FOLDER = "helpers"
"""The folder of the helpers' runs, in the run's own."""
SET_BY_THE_JOB = ("run.name", "run.output_dir", "data.cache_dir", "tracking", "sft", "objective.helpers")
"""Keys and sections of a helper that follow from the run that needs it."""
_OWN: Mapping[str, Any] = {
    "sft": {},
    "data.eval": None,
    "training.eval_every": None,
    "training.validate_every": None,
    "training.keep_best": 0,
    "training.export": "last",
}
"""What a helper does not inherit: it is neither evaluated nor chosen by a metric."""
HAVE_ORACLES = ("sepo", "arc_bpo")
"""Objectives that compare one helper with its own reference, whichever that is."""
_BUDGET = ("training.max_steps", "training.epochs")


@dataclass(frozen=True)
class Helper:
    """A helper of a run, with the configuration of its own run."""

    name: str
    traits: HelperTraits
    config: Config

    @property
    def key(self) -> str:
        """The configuration key of its settings."""
        return f"objective.helpers.{self.name}"

    @property
    def export(self) -> str:
        """Folder of its policy once it is trained."""
        return str(run_dir(self.config) / "export")

    @property
    def reference(self) -> str:
        """The model that its log-probs are to be compared with."""
        return _reference(self.config)


def plan_helpers(start: Config) -> list[Helper]:
    """The helpers that a run needs and its configuration does not name, with their configurations.

    Args:
        start: the run's configuration, with the model that training starts from.

    Raises:
        InputError: a name that the objective does not have, or an invalid setting of a helper.
    """
    known = HELPERS.get(start.objective.name, {})
    _check_names(start, known)
    return [
        Helper(name, traits, _helper_config(start, name, traits))
        for name, traits in known.items()
        if _is_needed(start, name, traits)
    ]


def check_helpers(start: Config, helpers: Sequence[Helper], base: Config) -> None:
    """Refuse helpers that do not fit the run, before anything is trained.

    Args:
        start: the run's configuration, with the model that training starts from.
        base: the same with a model that exists already: the one before supervised fine-tuning.

    Raises:
        InputError: naming the helper's key, the value and the remedy.
    """
    if helpers:
        check_run(base)  # first, so that faults of the run are not reported as faults of its helpers
    for helper in helpers:
        own = helper.config.objective
        if own.needs_weights and not own.weights_from_records and not _names_models(helper.config):
            raise InputError(
                f"{helper.key}.objective.name={own.name}: needs helper models itself; use an objective "
                "without them, such as dpo or sft"
            )
        with _key_of(helper):
            check_run(helper.config)
            if helper.config.model.name_or_path != start.model.name_or_path:
                check_same_tokenizer(policy_folder(base), policy_folder(helper.config), "model.name_or_path")
    _check_references(start, helpers)


def with_helpers(start: Config, helpers: Sequence[Helper]) -> Config:
    """The run's configuration with the helpers' exports as its token weight models."""
    fixed = {helper.traits.model_key.replace(".", "__"): helper.export for helper in helpers}
    for helper in helpers:
        if start.objective.name in HAVE_ORACLES and not _is_same_model(
            helper.reference, start.model.name_or_path
        ):
            fixed["objective__token_weights__negative"] = helper.reference
    return stage_config(start, {}, **fixed) if fixed else start


def train_helper(helper: Helper, start: Config, *, parent_run_id: str | None) -> RunResult:
    """Train a helper, resume it, or find it finished with the same settings.

    Raises:
        InputError: it was trained with other settings.
        RunFailedError: it could not be finished; its checkpoints are kept.
    """
    log_progress(f"{helper.key}: {helper.config.objective.name} on {data_description(start, helper)}")
    with _key_of(helper):
        return train(helper.config, kind="helper", parent_run_id=parent_run_id, wait=True)


def data_description(start: Config, helper: Helper) -> str:
    """Which pairs a helper is trained on, and whether the run itself trains on them too."""
    own = helper.config
    low, high = own.data.share_range
    drawn = (low, high) != (0.0, 1.0)
    share = f"{high - low:.0%} of the records" if drawn else "all records"
    swapped = ", answers swapped" if own.data.swap_answers else ""
    return f"{share}{swapped}; {_overlap(start, own)}"


def _overlap(start: Config, own: Config) -> str:
    sources = ("train", "max_pairs", "format", "pairing", "pairing_gap")
    if any(getattr(start.data, key) != getattr(own.data, key) for key in sources):
        return "from other sources than the run's pairs"
    (low, high), (run_low, run_high) = own.data.share_range, start.data.share_range
    if start.run.seed != own.run.seed and ((low, high) != (0, 1) or (run_low, run_high) != (0, 1)):
        return "drawn with another seed, so that some may be among the run's pairs"
    if high <= run_low or run_high <= low:
        return "disjoint from the run's pairs"
    inside = run_low <= low and high <= run_high
    return "all among the run's pairs" if inside else "some among the run's pairs"


def _check_names(start: Config, known: Mapping[str, HelperTraits]) -> None:
    name = start.objective.name
    for unknown in [helper for helper in start.objective.helpers if helper not in known]:
        if start.objective.needs_weights:
            accepted = f"it has {', '.join(known)}" if known else "it needs none"
            raise InputError(
                f"objective.helpers.{unknown}: objective.name={name} has no helper model of this name "
                f"({accepted}); remove it, or set objective.helpers={{}}"
            )
        log_progress(f"objective.helpers.{unknown}: not trained; objective.name={name} reads no helper model")


def _is_needed(start: Config, name: str, traits: HelperTraits) -> bool:
    weights = start.objective.token_weights
    if not start.objective.needs_weights:
        if name in start.objective.helpers:
            log_progress(f"objective.helpers.{name}: not trained; objective.arc.shape reads no token weights")
        return False
    if start.objective.weights_from_records:
        return False
    given = start.objective.guide.model if traits.own_key else getattr(weights, traits.side)
    if given is not None:
        if name in start.objective.helpers:
            key = traits.model_key
            log_progress(f"objective.helpers.{name}: not trained, because {key}={given} is given")
        return False
    # One model under two instructions needs no other model, unless a helper is asked for.
    instructions = not traits.own_key and (weights.positive_instruction or weights.negative_instruction)
    return not instructions or name in start.objective.helpers


def _helper_config(start: Config, name: str, traits: HelperTraits) -> Config:
    settings = expand_dotted(start.objective.helpers.get(name, {}))
    key = f"objective.helpers.{name}"
    given = flatten(settings)
    for fixed in SET_BY_THE_JOB:
        taken = next((setting for setting in given if is_at_or_below(setting, fixed)), None)
        if taken is not None:
            raise InputError(f"{key}.{taken}={given[taken]!r}: follows from the run itself; remove it")
    # The objective is the helper's own: the run's beta or label smoothing belong to another loss.
    own = start.model_copy(update={"objective": ObjectiveConfig()})
    overrides = merge(merge(expand_dotted(_OWN), expand_dotted(traits.overrides)), settings)
    try:
        config = stage_config(
            own,
            overrides,
            run__name=name,
            run__output_dir=str(run_dir(start) / FOLDER),
            tracking__uri=store_uri(start.tracking, output_dir(start)),
            data__cache_dir=str(cache_dir(start)),
        )
    except InputError as error:
        raise InputError(*(f"{key}.{fault}" for fault in error.faults)) from error
    return _with_budget(config, given)


def _with_budget(config: Config, given: Mapping[str, Any]) -> Config:
    """The number of steps that a helper gets: its share of the run's, unless its own settings say more.

    A helper that has begun keeps its number of steps when the run that needs it is extended.
    """
    if "training.max_steps" in given:
        return config
    if "training.epochs" in given:
        return stage_config(config, {}, training__max_steps=None)
    stored = _stored_budget(run_dir(config))
    if stored is not None:
        if stored != (config.training.max_steps, config.training.epochs):
            log_progress(f"objective.helpers.{config.run.name}: keeps the number of steps that it has")
        return stage_config(config, {}, training__max_steps=stored[0], training__epochs=stored[1])
    if config.training.max_steps is None:
        return config
    low, high = config.data.share_range
    return stage_config(
        config, {}, training__max_steps=max(1, math.ceil(config.training.max_steps * (high - low) - 1e-9))
    )


def _stored_budget(folder: Path) -> tuple[int | None, float] | None:
    file = folder / "config.yaml"
    if not file.is_file() or not any((folder / "checkpoints").glob("step-*")):
        return None
    training = yaml.safe_load(file.read_text(encoding="utf-8"))["training"]
    return training["max_steps"], training["epochs"]


def _check_references(start: Config, helpers: Sequence[Helper]) -> None:
    """Token scores are differences of log-probs: they mean something only against the right reference."""
    if start.objective.name == "tgdpo":
        for guide in helpers:
            if not _is_same_model(guide.reference, _reference(start)):
                raise InputError(
                    f"{_reference_key(guide)}={guide.reference}: the guide's reference is not the run's own, "
                    f"{_reference(start)}, with which its log-probs are compared; use the same"
                )
        return
    if start.objective.name in HAVE_ORACLES:
        given = start.objective.token_weights.negative
        for oracle in helpers:
            expected = given or _reference(start)
            if not _is_same_model(oracle.reference, expected):
                what = f"objective.token_weights.negative={given}" if given else f"the run's own, {expected}"
                raise InputError(
                    f"{_reference_key(oracle)}={oracle.reference}: the oracle's reference is not {what}; use "
                    f"the same, or set objective.token_weights.negative={oracle.reference}"
                )
        return
    for first, second in pairwise(helpers):
        if not _is_same_model(first.reference, second.reference):
            other = _reference(start)
            odd, even = (first, second) if _is_same_model(second.reference, other) else (second, first)
            raise InputError(
                f"{_reference_key(odd)}={odd.reference}: models whose log-probs are compared must have one "
                f"reference, and {even.key} has {even.reference}; use that one for both"
            )


def _reference_key(helper: Helper) -> str:
    key = "reference" if helper.config.model.reference is not None else "name_or_path"
    return f"{helper.key}.model.{key}"


def _reference(config: Config) -> str:
    """The frozen model that a run's log-ratios are relative to, or the model that it starts from."""
    model = config.model
    reference = (
        model.reference if config.objective.needs_reference or config.objective.needs_weights else None
    )
    return reference or model.name_or_path


def _is_same_model(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().absolute() == Path(other).expanduser().absolute()


def _names_models(config: Config) -> bool:
    weights = config.objective.token_weights
    given = (weights.positive, weights.negative, weights.positive_instruction, weights.negative_instruction)
    if config.objective.name == "tgdpo":
        return config.objective.guide.model is not None
    return config.objective.name == "t_reg" or any(given)


@contextmanager
def _key_of(helper: Helper) -> Iterator[None]:
    """Prefix the keys that errors name with the helper's own."""
    try:
        yield
    except InputError as error:
        raise InputError(*(f"{helper.key}.{fault}" for fault in error.faults)) from error

"""A run resumes only in the batch order and with the definition of its objective that it was started with."""

from __future__ import annotations

import pytest
import yaml

from tbpo_ray.config.loading import load_config, to_yaml
from tbpo_ray.config.objective import OBJECTIVES
from tbpo_ray.data.schedule import ORDER_VERSION
from tbpo_ray.errors import InputError
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.resume_checks import (
    generator_source,
    refuse_other_objective,
    refuse_other_order,
    refuse_other_sizes,
)
from tbpo_ray.workflows.train import train

STEPS = 10


def started(tmp_path, step, **state):
    """Configuration and folder of a run that has reached `step` of ten."""
    config = load_config(None, [f"run.output_dir={tmp_path}", "run.name=old", f"training.max_steps={STEPS}"])
    folder = tmp_path / "old"
    checkpoint = ckpt.step_folder(folder / "checkpoints", step)
    checkpoint.mkdir(parents=True)
    ckpt.commit_checkpoint(checkpoint, {"step": step, "steps_total": STEPS, **state}, {})
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n')
    return config, folder


@pytest.mark.parametrize(
    ("state", "words"), [({}, "order 1, of older code"), ({"order": 99}, "order 99, of newer code")]
)
def test_an_unfinished_run_of_another_order_is_refused_before_anything_starts(tmp_path, state, words):
    config, folder = started(tmp_path, 5, **state)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with pytest.raises(InputError) as refusal:
        train(config)
    (fault,) = refusal.value.faults
    assert fault.startswith("run.name=old: its steps up to 5") and words in fault
    assert f"this code has order {ORDER_VERSION}" in fault and "use another run.name" in fault
    assert {f: f.read_bytes() for f in before} == before


def test_a_run_with_the_same_order_is_resumed(tmp_path):
    config, folder = started(tmp_path, 5, order=ORDER_VERSION)
    refuse_other_order(config, folder, extended=False)
    refuse_other_order(config, tmp_path / "none", extended=False)


def test_a_run_at_its_last_step_may_still_be_exported(tmp_path):
    config, folder = started(tmp_path, STEPS)
    refuse_other_order(config, folder, extended=False)
    with pytest.raises(InputError):
        refuse_other_order(config, folder, extended=True)


def test_a_finished_run_of_another_order_can_be_read_but_not_extended(tmp_path):
    config, folder = started(tmp_path, STEPS)
    (folder / "DONE").write_text("{}")
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    result = train(config)
    assert (result.already_finished, result.metrics) == (True, {"step": 10, "loss": 0.5})
    more = load_config(None, [f"run.output_dir={tmp_path}", "run.name=old", "training.max_steps=20"])
    with pytest.raises(InputError, match="steps up to 10"):
        train(more)
    assert (folder / "DONE").is_file()
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["max_steps"] == STEPS
    assert train(config).already_finished


def test_the_newest_readable_state_counts(tmp_path):
    config, folder = started(tmp_path, 5, order=ORDER_VERSION)
    started(tmp_path, 8)
    with pytest.raises(InputError, match="up to 8"):
        refuse_other_order(config, folder, extended=False)
    (ckpt.step_folder(folder / "checkpoints", 8) / "state.json").write_text("")
    refuse_other_order(config, folder, extended=False)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_of_an_older_definition_is_refused_by_name(tmp_path, name):
    _, folder = started(tmp_path, 5, order=ORDER_VERSION)
    config = load_config(None, [f"run.output_dir={tmp_path}", "run.name=old", f"objective.name={name}"])
    if name not in ("t_reg", "sepo", "tis_dpo", "ipo"):
        refuse_other_objective(config, folder, extended=False)
        return
    with pytest.raises(InputError) as refusal:
        refuse_other_objective(config, folder, extended=False)
    (fault,) = refusal.value.faults
    assert fault.startswith(f"objective.name={name}: run old minimized definition 1 of {name} up to step 5")
    assert "older code" in fault and "definition 2" in fault and "use another run.name" in fault
    refuse_other_objective(config, tmp_path / "none", extended=False)
    _, folder = started(tmp_path, 6, order=ORDER_VERSION, objective_definition=2)
    refuse_other_objective(config, folder, extended=False)
    _, folder = started(tmp_path, STEPS, order=ORDER_VERSION)
    refuse_other_objective(config, folder, extended=False)
    with pytest.raises(InputError, match=f"minimized definition 1 of {name}"):
        refuse_other_objective(config, folder, extended=True)


def test_a_run_is_refused_whose_own_generator_has_changed(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def loss(u):\n    return u\n")
    config = load_config(
        None,
        [f"run.output_dir={tmp_path}", "run.name=old", f"objective.bregman.generator={file}:loss"],
    )
    source = generator_source(config)
    _, folder = started(tmp_path, 5, order=ORDER_VERSION, generator_source=source)
    refuse_other_objective(config, folder, extended=False)
    file.write_text("def loss(u):\n    return 2 * u\n")
    with pytest.raises(InputError, match=f"objective.bregman.generator={file}:loss: the file has changed"):
        refuse_other_objective(config, folder, extended=False)
    assert generator_source(load_config(None, [])) is None


def test_training_refuses_the_older_definition_before_anything_starts(tmp_path):
    _, folder = started(tmp_path, 5, order=ORDER_VERSION)
    config = load_config(None, [f"run.output_dir={tmp_path}", "run.name=old", f"training.max_steps={STEPS}",
                                "objective.name=ipo"])  # fmt: skip
    (folder / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(InputError, match="ipo: run old minimized definition 1"):
        train(config)


def test_sizes_of_pairs_with_context_that_were_counted_differently_are_refused(tmp_path):
    config, folder = started(tmp_path, 5)  # by code that did not record how it counted
    refuse_other_sizes(config, folder, 3, STEPS)
    refuse_other_sizes(config, folder, 9, 5)
    with pytest.raises(InputError, match=r"its steps up to 5 .* use another run\.name"):
        refuse_other_sizes(config, folder, 9, STEPS)
    _, folder = started(tmp_path, 6, size_columns=9)
    refuse_other_sizes(config, folder, 9, STEPS)

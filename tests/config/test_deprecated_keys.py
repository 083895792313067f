"""Deprecated keys are accepted under their present names, and never shown again."""

from __future__ import annotations

import pytest
import yaml

from tbpo_ray.config import loading
from tbpo_ray.config.comparison import changed_values
from tbpo_ray.config.loading import known_keys, load_config, rename_deprecated_keys, stage_config, to_yaml
from tbpo_ray.config.schema import RENAMED_KEYS
from tbpo_ray.errors import InputError

OLD, NEW = "training.cut_dead_tail", "training.truncate_to_shorter"


@pytest.fixture(autouse=True)
def _log_again() -> None:
    loading._log_deprecated.cache_clear()


def test_deprecated_names_are_unknown_and_their_replacements_known() -> None:
    known = set(known_keys())
    assert not known & set(RENAMED_KEYS) and known >= set(RENAMED_KEYS.values())
    assert all(old.rsplit(".", 1)[0] == new.rsplit(".", 1)[0] for old, new in RENAMED_KEYS.items())


@pytest.mark.parametrize("text", ["training: {cut_dead_tail: false}\n", "training.cut_dead_tail: false\n"])
def test_a_file_with_the_old_name(tmp_path, capsys, text) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    config = load_config(file)
    assert config.training.truncate_to_shorter is False
    assert "cut_dead_tail" not in to_yaml(config) and "truncate_to_shorter: false" in to_yaml(config)
    load_config(file)
    lines = [line for line in capsys.readouterr().err.splitlines() if OLD in line]
    assert len(lines) == 1 and NEW in lines[0]


def test_an_override_with_the_old_name() -> None:
    assert load_config(None, [f"{OLD}=false"]).training.truncate_to_shorter is False


def test_the_same_value_under_both_names_is_accepted() -> None:
    assert load_config(None, [f"{OLD}=false", f"{NEW}=false"]).training.truncate_to_shorter is False


def test_different_values_under_both_names_are_refused(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training: {cut_dead_tail: false}\n", encoding="utf-8")
    for arguments in ((file, [f"{NEW}=true"]), (None, [f"{OLD}=false", f"{NEW}=true"])):
        with pytest.raises(InputError) as error:
            load_config(*arguments)
        assert f"{OLD}=False" in str(error.value) and NEW in str(error.value)


@pytest.mark.parametrize("stage", [{OLD: False}, {"training": {"cut_dead_tail": False}}])
def test_a_stage_with_the_old_name(stage) -> None:
    config = load_config(None)
    assert stage_config(config, stage).training.truncate_to_shorter is False
    assert stage_config(config, {}, training__cut_dead_tail=False).training.truncate_to_shorter is False
    resolved = to_yaml(loading.validate({"sft": stage}))
    assert "cut_dead_tail" not in resolved
    assert stage_config(config, yaml.safe_load(resolved)["sft"]).training.truncate_to_shorter is False


def test_a_search_space_with_the_old_name() -> None:
    entry = {"choice": [True, False]}
    assert rename_deprecated_keys({OLD: entry}) == {NEW: entry}


def test_a_stored_configuration_is_compared_silently(capsys) -> None:
    assert rename_deprecated_keys({"training": {"cut_dead_tail": True}}, log=False) == {
        "training": {"truncate_to_shorter": True}
    }
    assert capsys.readouterr().err == ""


def test_a_run_stored_under_the_old_name_compares_equal() -> None:
    new = {"training": {"truncate_to_shorter": True, "epochs": 1.0}, "sft": {NEW: False}}
    old = {"training": {"cut_dead_tail": True, "epochs": 1.0}, "sft": {OLD: False}}
    assert changed_values(old, new) == {}
    other = {"training": {"cut_dead_tail": False, "epochs": 1.0}, "sft": {OLD: False}}
    assert changed_values(other, new) == {NEW: (False, True)}

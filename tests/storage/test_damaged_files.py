"""A damaged file in a run's folder is named in a sentence; it is never a traceback and never ignored."""

from __future__ import annotations

import json

import pytest

from tbpo_ray.config.loading import load_config, to_yaml
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.collect import _rows
from tbpo_ray.storage.json_lines import read_object
from tbpo_ray.storage.ownership import OWNER, RunLock
from tbpo_ray.tracking.run_note import RUN_NOTE, read_run_note, write_run_note
from tbpo_ray.training.resume_checks import refuse_changes, steps_changed

GARBLED = {
    "empty": b"", "blank": b" \n", "cut": b'{"mlflow_run_id": "a', "list": b"[1]", "null": b"null",
    "text": b"x: [",
    "zeros": b"\0" * 64, "bytes": b"\xff\xfe{", "other keys": b'{"a": 1}', "deep": b"[" * 100_000,
}  # fmt: skip


@pytest.fixture(params=list(GARBLED.values()), ids=list(GARBLED))
def garbled(request):
    return request.param


def test_an_object_is_read_whole_or_refused(tmp_path, garbled):
    file = tmp_path / "x.json"
    file.write_bytes(garbled)
    with pytest.raises(InputError, match=r"x\.json: .*; do this") as caught:
        read_object(file, "do this", ("b",))
    assert "\n" not in str(caught.value)
    file.write_text('{"b": null}')
    assert read_object(file, "", ("b",)) == {"b": None}
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "y.json", "")


def test_a_damaged_note_of_the_mlflow_run(tmp_path, garbled):
    note = tmp_path / RUN_NOTE
    assert read_run_note(note) is None
    note.write_bytes(garbled)
    with pytest.raises(InputError, match=rf"{RUN_NOTE}: .*remove it"):
        read_run_note(note)
    write_run_note(note, "abc")
    assert read_run_note(note) == "abc"


def test_a_damaged_owner_file_refuses_the_run_and_ends_no_other(tmp_path, garbled):
    (tmp_path / OWNER).write_bytes(garbled)
    with pytest.raises(InputError, match=rf"{OWNER}: .*remove it if no driver"), RunLock(tmp_path):
        pass
    (tmp_path / OWNER).unlink()
    with RunLock(tmp_path) as lease:
        (tmp_path / OWNER).write_bytes(garbled)
        with pytest.raises(InputError, match=OWNER):
            lease.check()
    assert (tmp_path / OWNER).read_bytes() == garbled


def test_a_damaged_configuration_of_a_run(tmp_path, garbled):
    config = load_config(None, ["training.max_steps=3"])
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    refuse_changes(config, tmp_path)
    assert not steps_changed(config, tmp_path)
    file.write_bytes(garbled)
    for check in (refuse_changes, steps_changed):
        with pytest.raises(InputError, match=r"config\.yaml: .*another run\.name") as caught:
            check(config, tmp_path)
        assert "\n" not in str(caught.value)


def test_a_bad_line_of_metrics_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2' + "\n" + '{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2"):
        _rows(file)
    file.write_text('{"step": 1}\n7\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2"):
        _rows(file)
    file.write_text('{"step": 1, "loss": 2.5}\n{"st')
    assert _rows(file) == [{"step": 1, "loss": 2.5}]

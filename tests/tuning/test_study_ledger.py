"""The state of a study on disk: a snapshot and an append-only ledger, read together."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from tbpo_ray.config.schema import TuneConfig
from tbpo_ray.errors import InputError
from tbpo_ray.tuning.ledger import Ledger
from tbpo_ray.tuning.ray_tune import Proposals, Recorder
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_state import StudyState, Trial

SPACE = Space.parse({"objective.beta": {"uniform": [0.1, 1.0]}})
METRIC = "eval/rewards/accuracy"


def run_study(folder, trials: int, reports: int) -> StudyState:
    """Record a study through the callback of Tune, whose objective is not finite at the last report."""
    settings = TuneConfig(metric=METRIC, trials=trials, algorithm="random")
    state = StudyState(folder / "study.json", {"config": {"tune": {"trials": trials}}})
    state.save()
    search, recorder = (
        Proposals(SPACE, state, settings, 0, trials),
        Recorder(state, settings, None, workers=2),
    )
    recorder.setup()
    for index in range(trials):
        trial = SimpleNamespace(config=search.suggest(str(index)), get_error=lambda: "boom")
        event: dict[str, Any] = {"iteration": 0, "trials": [], "trial": trial}
        recorder.on_trial_start(**event)
        for step in range(1, reports + 1):
            value = 0.1 * step if step < reports else math.nan
            row = {"step": float(step), METRIC: value}
            recorder.on_trial_result(
                **event, result={"step": step, "objective": value, "row": row, "time_total_s": step}
            )
        if index % 3 == 0:
            done = {"state": "finished", "repeats": [{METRIC: 0.5, "step": 9.0}], "time_total_s": 9.0}
            recorder.on_trial_result(**event, result=done)
            recorder.on_trial_complete(**event)
        elif index % 3 == 1:
            recorder.on_trial_complete(**event)
        else:
            recorder.on_trial_error(**event)
    return state


def strict(trials: list[Trial]) -> str:
    return json.dumps([asdict(trial) for trial in trials])


def test_the_ledger_alone_restores_every_trial(tmp_path):
    state = run_study(tmp_path, trials=7, reports=3)
    before = (tmp_path / "study.json").read_text()
    assert json.loads(before)["trials"] == []
    read = StudyState.open(state.file)
    assert strict(read.trials) == strict(state.trials)
    assert [t.state for t in read.trials[:3]] == ["finished", "stopped", "failed"]
    assert math.isnan(read.trials[1].reports[-1][METRIC]) and len(read.trials[1].reports) == 3
    assert read.facts == state.facts and read.facts["search_seconds"] > 0


def test_what_the_snapshot_includes_is_not_applied_twice(tmp_path):
    state = run_study(tmp_path, trials=3, reports=2)
    state.save()
    read = StudyState.open(state.file)
    assert strict(read.trials) == strict(state.trials)
    read.trials[2].state = "waiting"
    read.record(read.trials[2])
    again = StudyState.open(state.file)
    assert strict(again.trials) == strict(read.trials) != strict(state.trials)


def test_a_report_after_a_resume_replaces_the_later_ones(tmp_path):
    state = StudyState(tmp_path / "study.json", {}, [Trial(0, {})])
    state.save()
    for step in (2, 4, 6, 4):
        state.trials[0].add_report({"step": step, "loss": float(step)})
        state.record(state.trials[0], state.trials[0].reports[-1])
    read = StudyState.open(state.file)
    assert [r["step"] for r in read.trials[0].reports] == [2, 4] and strict(read.trials) == strict(
        state.trials
    )


def test_an_entry_costs_the_same_for_any_number_of_trials(tmp_path):
    sizes = []
    for count in (4, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        run_study(folder, count, reports=2)
        lines = (folder / "study.jsonl").read_bytes().splitlines()
        sizes.append(max(map(len, lines[-5:])))
    assert sizes[1] < sizes[0] + 40  # more digits, nothing else


def test_a_study_of_an_earlier_version_is_read(tmp_path):
    file = tmp_path / "study.json"
    old = {"number": 0, "params": {"objective.beta": 0.3}, "values": {METRIC: None}, "reports": [{"step": 2}]}
    file.write_text(json.dumps({"facts": {"note": "x"}, "trials": [old]}))
    read = StudyState.open(file)
    assert read.trials[0].params == old["params"] and math.isnan(read.trials[0].values[METRIC])
    read.trials[0].state = "running"
    read.record(read.trials[0])
    assert StudyState.open(file).trials[0].state == "running"


@pytest.mark.parametrize("torn", [b'{"n": 99, "tri', b"\0\0\0\0", b'{"n": 4, "trial": {"number": 0}}'],
                         ids=["half", "zeros", "no-line-break"])  # fmt: skip
def test_a_torn_last_line_is_dropped_and_never_glued(tmp_path, capsys, torn):
    state = run_study(tmp_path, trials=1, reports=1)
    ledger = tmp_path / "study.jsonl"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole + torn)
    read = StudyState.open(state.file)
    said = capsys.readouterr()
    assert "study.jsonl: dropped the incomplete last line" in said.out + said.err
    assert strict(read.trials) == strict(state.trials)
    assert ledger.read_bytes() == whole + torn  # opening changes nothing
    read.trials[0].state = "waiting"
    read.record(read.trials[0])
    lines = ledger.read_bytes().splitlines()
    assert ledger.read_bytes().startswith(whole) and len(lines) == len(whole.splitlines()) + 1
    assert StudyState.open(state.file).trials[0].state == "waiting"
    assert "dropped" not in capsys.readouterr().out


def test_damage_in_the_middle_is_refused_by_line(tmp_path):
    state = run_study(tmp_path, trials=2, reports=1)
    ledger = tmp_path / "study.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    for damaged, sentence in (
        ([lines[0], b"{oops\n", *lines[2:]], "line 2 is not an entry"),
        ([lines[0], *lines[2:]], "line 2 is entry 3, but entry 2 must come next"),
        ([b"[]\n", *lines], "line 1 is not an entry"),
    ):
        ledger.write_bytes(b"".join(damaged))
        with pytest.raises(InputError, match=sentence):
            StudyState.open(state.file)


def test_a_ledger_without_its_study_is_refused(tmp_path):
    state = run_study(tmp_path, trials=1, reports=1)
    state.file.unlink()
    with pytest.raises(InputError, match=r"study\.json: missing, but study\.jsonl exists"):
        StudyState.open(state.file)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "x.jsonl")
    ledger.append({"a": 1}, durable=True)

    class Full:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def write(self, data):
            if len(data) < 5:
                raise OSError(28, "No space left on device")
            return self.inner.write(bytes(data[: len(data) // 2]))

    inner = ledger._handle
    ledger._handle = Full(inner)
    with pytest.raises(OSError, match="No space"):
        ledger.append({"a": 2}, durable=False)
    ledger._handle = inner
    ledger.append({"a": 3}, durable=False)
    assert [entry["a"] for entry in Ledger(ledger.file).read()] == [1, 3]
    assert os.path.getsize(ledger.file) == ledger._size


def test_proposals_and_ends_are_on_the_disk_before_anything_depends_on_them(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("tbpo_ray.tuning.ledger.os.fsync", lambda fd: synced.append(fd))
    run_study(tmp_path, trials=3, reports=5)
    assert len(synced) == 1 + 2 * 3  # the first state, then a proposal and an end of each trial

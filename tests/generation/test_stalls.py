"""Which engines the driver takes for stalled, and what it does about them."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from tbpo_ray.cluster.processes import NodeProcess
from tbpo_ray.generation import stalls
from tbpo_ray.generation.stalls import START_SECONDS, EngineReport, ProgressReporter, StalledError, StallWatch


class Engines:
    """Reports of engines that do not exist, under a clock that the test moves."""

    def __init__(self, folder, monkeypatch):
        self.now, self.lost = 0.0, False
        self.killed: list[list[int]] = []
        monkeypatch.setattr(stalls, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(stalls, "kill", lambda found: self.killed.append([p.pid for p in found]))
        monkeypatch.setattr(stalls, "running", lambda found: [] if self.lost else list(found))
        monkeypatch.setattr(
            stalls, "read_worker_log", lambda node, pid: "one\n\ntwo\nNCCL waits\nfor rank 3\n:actor_name:x\n"
        )
        monkeypatch.setattr(stalls, "log_progress", self.say)
        self.said: list[str] = []
        self.watch = StallWatch(folder, 60)

    def say(self, text: str) -> None:
        self.said.append(text)

    def report(self, pid: int, **changes: Any) -> None:
        known: dict[str, Any] = {"ready": True, "steps": 1, "reports": 1, "unfinished": [1, 2]}
        found = EngineReport(
            [NodeProcess("n", pid, 0.0), NodeProcess("n", pid + 1, 0.0)], **(known | changes)
        )
        (self.watch.folder / f"{pid}.json").write_text(json.dumps(asdict(found)))

    def after(self, seconds: float) -> list[list[int]]:
        self.now += seconds
        self.watch.check()
        return self.killed


@pytest.fixture
def engines(tmp_path, monkeypatch):
    return Engines(tmp_path, monkeypatch)


def test_an_engine_without_a_new_token_is_killed_with_its_processes(engines):
    engines.report(10)
    engines.after(0)
    engines.report(10, reports=2)  # it still reports, but has no new token
    assert engines.after(59) == [] and engines.after(2) == [[10, 11]]
    assert "computed no token for 60 s with 2 unfinished prompts" in engines.said[0]
    assert "its last lines: two / NCCL waits / for rank 3" in engines.said[0]
    assert engines.watch.failure is None and engines.watch.stalls == 1
    assert engines.after(600) == [[10, 11]]


def test_a_long_answer_is_not_a_stall(engines):
    for step in range(100):
        engines.report(10, steps=step)
        assert engines.after(59) == []


def test_an_engine_without_prompts_may_idle_but_not_freeze(engines):
    for number in range(10):
        engines.report(10, unfinished=[], reports=number)
        assert engines.after(59) == []
    assert engines.after(61) == [[10, 11]]


def test_loading_a_model_may_take_longer(engines):
    engines.report(10, ready=False, steps=0, unfinished=[])
    for number in range(10):  # the reports' number does not change while prompts are unfinished
        engines.report(10, ready=False, steps=0, unfinished=[0], reports=number)
        engines.after(60)
    assert engines.killed == []
    assert engines.after(START_SECONDS) == [[10, 11]] and "was not ready after 1800 s" in engines.said[0]


def test_the_same_prompts_on_a_second_engine_end_the_run(engines):
    for pid in (10, 20):
        assert engines.watch.failure is None
        engines.report(pid, unfinished=[2, 3] if pid == 20 else [1, 2])
        engines.after(0)
        engines.after(61)
    assert engines.killed == [[10, 11], [20, 21]]
    assert "for rank 3" in engines.watch.failure and "generation.stall_timeout_s=60" in engines.watch.failure


def test_other_prompts_get_their_own_second_attempt(engines):
    for pid, rows in ((10, [1]), (20, [2]), (30, [3])):
        engines.report(pid, unfinished=rows)
        engines.after(0)
        engines.after(61)
    assert len(engines.killed) == 3 and engines.watch.failure is None


def test_an_engine_that_died_on_its_own_is_not_counted(engines):
    engines.report(10)
    engines.after(0)
    engines.lost = True
    assert engines.after(61) == [] and engines.watch.stalls == 0


def test_a_report_that_is_being_replaced_is_read_later(engines):
    (engines.watch.folder / "10.json").write_text("")
    assert engines.after(0) == [] and engines.watch.reports() == {}


def test_the_folder_of_a_killed_driver_is_removed(tmp_path):
    first = StallWatch(tmp_path, 60).folder
    with StallWatch(tmp_path, 60) as second:
        assert second.folder.is_dir() and not first.exists()
    assert list(tmp_path.iterdir()) == []


def test_an_engine_reports_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(stalls, "own_processes", lambda: [NodeProcess("node", 7, 1.0)])
    monkeypatch.setattr(ProgressReporter, "_keep_reporting", lambda self: None)
    engine = ProgressReporter(str(tmp_path), 60)
    (file,) = tmp_path.glob("*.json")

    def now() -> tuple[Any, ...]:
        engine.report()
        found = EngineReport.read(file)
        assert found is not None
        return found.ready, found.steps, found.unfinished

    assert now() == (False, 0, [])
    engine.engine_started()
    engine.begin([3, 1])
    assert now() == (True, 0, [1, 3])
    engine.step()
    engine.finish([3])
    assert now() == (True, 2, [1])
    (tmp_path / "given-up").touch()
    with pytest.raises(StalledError, match="stalled twice"):
        ProgressReporter(str(tmp_path), 60)

"""Only the driver that holds a run, and the workers that it started last, may write into it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from tbpo_ray.config.schema import TrainingConfig
from tbpo_ray.errors import InputError
from tbpo_ray.storage import ownership
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.ownership import LeaseLostError, RunLock, WriteLease
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.callbacks import FailureLog
from tbpo_ray.training.metrics_file import MetricsFile
from tbpo_ray.training.rank_store import RankStore
from tbpo_ray.training.saver import CheckpointError, Saver
from tbpo_ray.training.tensor_files import write_tensors

HOLDER = """
import sys, time
from pathlib import Path
from tbpo_ray.storage.ownership import RunLock
with RunLock(Path(sys.argv[1])) as lease:
    print(lease.token, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the run, and its token."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    token = process.stdout.readline().strip()
    assert token
    yield process, token
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch):
    """Shorter waits; a heartbeat may still be late by thirty intervals, as on a busy machine."""
    for name, seconds in (("HEARTBEAT", 0.2), ("SILENCE", 6.0), ("PATIENCE", 1.0), ("LEASE", 30.0)):
        monkeypatch.setattr(ownership, f"{name}_SECONDS", seconds)


def from_elsewhere(folder, monkeypatch):
    """Make the owner a driver on another machine, for which the lock of this one has no effect."""
    owner = json.loads((folder / ownership.OWNER).read_text())
    write_atomic(folder / ownership.OWNER, json.dumps(owner | {"machine": "another", "host": "another"}))
    monkeypatch.setattr(RunLock, "_try_lock", lambda self: True)


def test_a_second_driver_is_refused_while_the_first_one_lives(tmp_path, holder, monkeypatch):
    process, token = holder
    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 3.0)
    with pytest.raises(InputError, match=rf"run\.name={tmp_path.name}: .*process id {process.pid} on "):
        RunLock(tmp_path).__enter__()
    WriteLease(str(tmp_path), token).check()


def test_after_kill_9_the_run_is_free_at_once_and_the_dead_drivers_workers_may_not_write(tmp_path, holder):
    process, token = holder
    process.send_signal(signal.SIGKILL)  # not reaped yet: a process id that is still there
    began = time.monotonic()
    with RunLock(tmp_path) as lease:
        assert time.monotonic() - began < 2
        lease.check()
        with pytest.raises(LeaseLostError, match=f"taken over by .*process id {os.getpid()} on"):
            WriteLease(str(tmp_path), token).check()


def test_after_a_driver_has_ended_its_workers_may_not_write(tmp_path):
    with RunLock(tmp_path) as lease:
        lease.check()
    with pytest.raises(LeaseLostError, match="ended"):
        lease.check()
    assert not (tmp_path / ownership.OWNER).exists()


def test_a_driver_that_waits_gets_the_run_when_the_other_one_ends(tmp_path, quick):
    first = RunLock(tmp_path)
    first.__enter__()
    began = time.monotonic()
    threading.Timer(3.0, first.__exit__, (None, None, None)).start()
    with RunLock(tmp_path, wait=True) as lease:
        assert time.monotonic() - began >= 3.0 > ownership.PATIENCE_SECONDS
        lease.check()


@pytest.mark.heavy
def test_the_heartbeat_shows_whether_a_driver_on_another_machine_is_alive(tmp_path, quick, monkeypatch):
    lives = RunLock(tmp_path)
    lives.__enter__()
    from_elsewhere(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=rf"run\.name={tmp_path.name}: .* on another "):
        RunLock(tmp_path).__enter__()
    lives._stop.set()  # as after kill -9: no heartbeat any more, and nothing is cleaned up
    lives._thread.join()
    last = threading.Timer(0.5, (tmp_path / ownership.HEARTBEAT).write_text, (f"{lives.lease.token} 999",))
    last.start()  # becomes visible late, as over a network, and does not mean that it is alive
    began = time.monotonic()
    with RunLock(tmp_path) as lease:
        assert time.monotonic() - began >= ownership.SILENCE_SECONDS
        lease.check()
        with pytest.raises(LeaseLostError):
            lives.lease.check()
        lives.__exit__()
        lease.check()  # the lock of another driver is not released


def test_of_two_drivers_without_an_effective_lock_the_later_has_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(RunLock, "_await_turn", lambda self: None)
    with RunLock(tmp_path) as earlier, RunLock(tmp_path) as later:
        later.check()
        with pytest.raises(LeaseLostError):
            earlier.check()


def test_only_the_workers_that_were_started_last_may_write(tmp_path):
    with RunLock(tmp_path) as lease:
        cut_off = lease.for_new_worker_group()
        cut_off.check()
        worker_group = lease.for_new_worker_group()
        worker_group.check()
        with pytest.raises(LeaseLostError, match="started later"):
            cut_off.check()
    with RunLock(tmp_path), pytest.raises(LeaseLostError):
        lease.for_new_worker_group()


def test_a_worker_without_a_lease_changes_no_metrics(tmp_path):
    with RunLock(tmp_path) as lease:
        orphan = MetricsFile(tmp_path, lease)
        orphan.write({"step": 1}, {"step": 1})
    writes = (
        lambda: orphan.write({"step": 2}, {}),
        lambda: orphan.log_event("more"),
        lambda: orphan.rewind(0),
    )
    with RunLock(tmp_path) as lease:
        MetricsFile(tmp_path, lease).log_event("mine")
        before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if not f.name.startswith(".")}
        for write in writes:
            with pytest.raises(LeaseLostError):
                write()
        FailureLog(orphan.lease).after_exception(None, {0: ValueError("late")})
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if not f.name.startswith(".")} == before


@pytest.mark.parametrize("background", [False, True])
def test_a_write_in_progress_when_the_run_changes_hands_corrupts_no_checkpoint(tmp_path, background):
    """The orphan is writing step 5 when the next driver's worker writes the same step."""
    training = TrainingConfig()
    checkpoints = tmp_path / "checkpoints"
    with RunLock(tmp_path) as lease:
        group = lease.for_new_worker_group()
        orphan = Saver(checkpoints, RankStore(), training, group, background=background)
        writing, go_on = threading.Event(), threading.Event()

        def slowly(target, files):
            writing.set()
            assert go_on.wait(30)
            target.partial.mkdir(parents=True, exist_ok=True)
            return {"files": {n: write_tensors(target.partial / n, t).to_json() for n, t in files.items()}}

        orphan._write_part = slowly  # type: ignore[method-assign]
        failed = []

        def save():
            try:
                orphan.save(5, {"optimizer-0000.safetensors": {"a": torch.zeros(9)}}, {"step": 5, "by": 1})
                orphan.wait()
            except CheckpointError as error:
                failed.append(str(error))

        thread = threading.Thread(target=save)
        thread.start()
        assert writing.wait(30)
    with RunLock(tmp_path) as lease:
        group = lease.for_new_worker_group()
        saver = Saver(checkpoints, RankStore(), training, group, background=background)
        saver.save(5, {"optimizer-0000.safetensors": {"a": torch.ones(9)}}, {"step": 5, "by": 2})
        saver.wait()
        go_on.set()
        thread.join()
        (sentence,) = failed
        assert "step 5 was not written" in sentence and "writes nothing more" in sentence
        found = ckpt.newest(checkpoints)
        assert found.folder is not None and (found.state["by"], found.rejected) == (2, ())
        assert load_file(found.folder / "optimizer-0000.safetensors")["a"].eq(1).all()
        assert [f.name for f in checkpoints.glob("step-*")] == ["step-00000005"]
        ckpt.remove_partial(checkpoints)
        assert [f.name for f in checkpoints.iterdir()] == ["step-00000005"]


def test_a_refused_job_exits_with_status_2(tmp_path, holder, capsys, monkeypatch):
    from tbpo_ray.cli import run_job
    from tbpo_ray.workflows.train import train

    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 3.0)
    (tmp_path / "c.yaml").write_text("{}\n")
    overrides = [f"run.output_dir={tmp_path.parent}", f"run.name={tmp_path.name}"]
    assert run_job(train, description="", argv=["--config", str(tmp_path / "c.yaml"), *overrides]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: run.name={tmp_path.name}: the driver with process id {holder[0].pid}")

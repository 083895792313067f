"""Waiting for the end of processes, and killing them, stopped ones and their successors included."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from tbpo_ray.cluster import processes
from tbpo_ray.cluster.processes import NodeProcess, await_end, kill, running
from tbpo_ray.errors import RunFailedError


@pytest.fixture(autouse=True)
def one_node(monkeypatch):
    """All processes are on this node, and Ray is not asked."""
    monkeypatch.setattr(processes, "_on_nodes", lambda function, found: function(list(found)))


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def described(child: subprocess.Popen[bytes]) -> NodeProcess:
    return NodeProcess("here", child.pid, psutil.Process(child.pid).create_time())


def test_a_stopped_process_is_killed_and_a_zombie_has_ended(child):
    found = described(child)
    child.send_signal(signal.SIGSTOP)
    assert running([found]) == [found]
    kill([found])
    await_end([found], seconds=20)
    assert child.poll() is None or child.returncode == -signal.SIGKILL
    assert running([found]) == []


def test_what_does_not_end_in_time_is_killed(child):
    await_end([described(child)], seconds=0.2)
    assert child.wait(10) == -signal.SIGKILL


def test_a_later_process_with_the_same_id_is_left_alone(child):
    other = replace(described(child), started=described(child).started - 60)
    kill([other])
    await_end([other])
    assert child.poll() is None


def test_a_process_that_cannot_be_killed_is_an_error(child, monkeypatch):
    monkeypatch.setattr(processes, "_kill_here", lambda found: found)
    with pytest.raises(RunFailedError, match=f"{child.pid} on node here"):
        await_end([described(child)], seconds=0.1)

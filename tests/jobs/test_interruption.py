"""Ctrl-C and SIGTERM: exit status, last line, and an end even where cleaning up hangs."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
import sys, threading, time
from tbpo_ray import signals
from tbpo_ray.cli import run_job
from tbpo_ray.cluster.session import keep_handlers

signals.GRACE_SECONDS = 2.0

def work(config):
    import signal
    with keep_handlers():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray.init does
    print("working", flush=True)
    try:
        time.sleep(60)
    finally:
        {cleanup}

sys.exit(run_job(work, description="", argv=["--config", {config!r}]))
"""


def interrupt(config: str, number: signal.Signals, cleanup: str = "pass") -> tuple[int, str]:
    """Exit status and stderr of a job that gets a signal while it works."""
    script = textwrap.dedent(SCRIPT).format(cleanup=cleanup, config=config)
    job = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout is not None and job.stdout.readline() == "working\n"
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    return job.returncode, err


@pytest.mark.parametrize("cleanup", ["pass", "time.sleep(50)"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_a_job_with_its_status_and_a_last_line(number, status, cleanup):
    code, err = interrupt("jobs/configs/tiny.yaml", number, cleanup)
    assert code == status
    last = err.strip().splitlines()[-1]
    assert number.name in last and "same command" in last
    assert "Traceback" not in err

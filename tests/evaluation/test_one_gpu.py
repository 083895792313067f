"""Policies, reference and judge hold the GPUs one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("one_gpu.py")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_role_begins_when_no_process_of_another_is_left(tiny_model, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TBPO_"))}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), tiny_model],
        env=environment, capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    roles = found["roles"]
    assert [name for name, _ in roles] == ["policy", "policy", "reference", "judge", "end"], done.stderr
    assert [held for _, held in roles] == [[]] * 5
    assert {"EngineCore", "WatchedEngine"} <= set(found["seen"])  # while the roles are at work

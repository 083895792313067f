"""Heavy libraries are imported without optional dependencies that this project never uses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tbpo_ray.models.hidden_modules import hide_modules
from tbpo_ray.models.tiny import build_tiny


def test_modules_are_hidden_only_inside_the_block():
    assert "this" not in sys.modules and "json" in sys.modules
    with hide_modules("this", "json"):
        assert importlib.util.find_spec("this") is None
        assert importlib.util.find_spec("json") is not None  # loaded before: stays
    assert importlib.util.find_spec("this") is not None
    assert "this" not in sys.modules


@pytest.mark.heavy
def test_a_worker_does_not_import_unused_libraries(tmp_path):
    code = """
import sys

import pytest
import torch
from tbpo_ray.config.schema import Config
from tbpo_ray.models.load import load_model
from tbpo_ray.training.deepspeed_engine import Engine
model = load_model(sys.argv[1], dtype=torch.float32)
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
Engine(model, Config(), torch.device("cpu"))
print(sorted({"sklearn", "mlflow"} & sys.modules.keys()))
import sklearn.metrics
"""
    command = [sys.executable, "-c", code, str(build_tiny(tmp_path / "model", 0)), str(tmp_path / "group")]
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"

"""The mathematics stands on torch alone."""

from __future__ import annotations

import subprocess
import sys


def test_imports_torch_and_nothing_else() -> None:
    code = (
        "import sys, tbpo_ray.objectives\n"
        "heavy = {'ray', 'mlflow', 'transformers', 'deepspeed', 'pydantic', 'yaml', 'peft', 'vllm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

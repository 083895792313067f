"""The mathematics needs torch and the typed configuration, and no other library of this project."""

from __future__ import annotations

import subprocess
import sys


def test_imports_no_platform_library() -> None:
    code = (
        "import sys, tbpo_ray.objectives\n"
        "heavy = {'ray', 'mlflow', 'transformers', 'deepspeed', 'yaml', 'peft', 'vllm'}\n"
        "own = {m for m in sys.modules if m.startswith('tbpo_ray.') and m.count('.') == 1}\n"
        "allowed = {'tbpo_ray.objectives', 'tbpo_ray.config', 'tbpo_ray.errors'}\n"
        "print(sorted(heavy & set(sys.modules) | own - allowed))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The files that `ray job submit --working-dir .` uploads, according to Ray's own packaging."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECRETS = (
    ".env",
    ".env.local",
    "deploy.pem",
    "tls.key",
    "hf_token",
    "my_secret.txt",
    ".netrc",
    ".aws/credentials",
)
HEAVY = ("model.safetensors", "m.gguf", "runs/a/config.yaml", ".venv/bin/python", "mlflow.db", ".git/config")


def package(folder: Path, target: Path) -> set[str]:
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), target, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(target) as archive:
        return set(archive.namelist())


def test_secrets_and_large_files_are_not_uploaded(tmp_path):
    home = tmp_path / "project"
    home.mkdir()
    shutil.copy(ROOT / ".rayignore", home)
    for name in (*SECRETS, *HEAVY, "jobs/train.py"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("x")
    names = {n for n in package(home, tmp_path / "p.zip") if not n.endswith("/")}
    assert {n for n in names if not n.endswith(".rayignore")} == {"jobs/train.py"}


def test_the_whole_library_is_uploaded(tmp_path):
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "tbpo_ray", "jobs"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(listed) > 50
    home = tmp_path / "project"
    for name in [*listed, ".rayignore"]:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, home / name)
    names = package(home, tmp_path / "p.zip")
    assert set(listed) - names == set()

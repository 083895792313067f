"""Hub names and GGUF files are resolved to model folders that every part can load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.prompts import resolve_policy
from tbpo_ray.models.load import split_revision
from tbpo_ray.models.resolve import local_model, policy_folder

RESOLVE = """
import json, sys
from pathlib import Path
from tbpo_ray.errors import InputError
from tbpo_ray.models.resolve import local_model
name, cache, revision = json.loads(sys.argv[1])
try:
    print(json.dumps({"folder": local_model(name, Path(cache), revision=revision)}))
except InputError as error:
    print(json.dumps({"error": str(error)}))
"""


def resolve_offline(name, cache, revision=None):
    """Resolve in a new process, because the hub library reads its environment at import."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HUB_OFFLINE": "1"}
    job = json.dumps([name, str(cache), revision])
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, job], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cache(tiny_model, tmp_path_factory):
    """A cache with acme/tiny at two revisions, as the hub library stores it."""
    folder = tmp_path_factory.mktemp("cache")
    repository = folder / "hub" / "models--acme--tiny"
    for commit, ref in (("a" * 40, "main"), ("b" * 40, "v2")):
        shutil.copytree(tiny_model, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return folder


@pytest.mark.heavy
def test_a_hub_name_becomes_a_folder_at_its_revision(cache):
    assert resolve_offline("acme/tiny", cache)["folder"].endswith("a" * 40)
    assert resolve_offline("acme/tiny", cache, "v2")["folder"].endswith("b" * 40)
    assert resolve_offline("acme/tiny@v2", cache)["folder"].endswith("b" * 40)
    assert "another revision than v2" in resolve_offline("acme/tiny@main", cache, "v2")["error"]


def test_the_revision_in_a_name(tmp_path):
    for name, expected in (
        ("acme/tiny@v2", ("acme/tiny", "v2")),
        ("acme/tiny@refs/pr/7", ("acme/tiny", "refs/pr/7")),
        ("tiny@0123456", ("tiny", "0123456")),
        ("acme/tiny", ("acme/tiny", None)),
        ("builtin:tiny", ("builtin:tiny", None)),
        ("/a/b@c", ("/a/b@c", None)),
        ("a/b/c@d", ("a/b/c@d", None)),
    ):
        assert split_revision(name) == expected
    assert split_revision("acme/tiny@v2", "v2") == split_revision("acme/tiny", "v2") == ("acme/tiny", "v2")
    folder = tmp_path / "acme" / "tiny@v2"
    folder.mkdir(parents=True)
    assert split_revision(str(folder)) == (str(folder), None)


def test_a_revision_of_a_folder_is_said_to_have_no_effect(tiny_model, tmp_path, capfd):
    assert local_model(tiny_model, tmp_path, revision="v2") == tiny_model
    assert "revision v2 has no effect" in "".join(capfd.readouterr())


@pytest.mark.heavy
def test_an_unknown_name_is_a_clear_error(cache):
    error = resolve_offline("acme/other", cache)["error"]
    assert "model.name_or_path=acme/other: neither a local folder nor on the hub" in error
    assert "at revision v9" in resolve_offline("acme/tiny", cache, "v9")["error"]


def test_a_missing_or_unreadable_gguf_file_is_a_clear_error(tiny_model, tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"model\.gguf_file=none\.gguf: no such file.*weights\.gguf"):
        local_model(str(tmp_path), tmp_path / "cache", gguf_file="none.gguf")
    with pytest.raises(InputError, match=r"weights\.gguf: cannot be read"):
        local_model(str(tmp_path), tmp_path / "cache", gguf_file="weights.gguf")
    assert not list((tmp_path / "cache").glob("gguf-*"))


def test_the_built_in_model_is_also_a_policy(tmp_path):
    config = load_config(None, [f"run.output_dir={tmp_path}", "run.seed=3"])
    folder = policy_folder(config)
    assert resolve_policy("base", "builtin:tiny", config).model == folder
    assert (tmp_path / ".prepared").resolve() in Path(folder).resolve().parents

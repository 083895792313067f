"""A checkpoint is valid only if its manifest exists and matches its files."""

from __future__ import annotations

import json

import pytest

from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.tensor_files import FileFacts


def make(checkpoints, step, content=b"weights"):
    folder = ckpt.step_folder(checkpoints, step)
    folder.mkdir(parents=True)
    (folder / "optimizer-0000.safetensors").write_bytes(content * 100)
    files = {f.name: FileFacts.read(f) for f in folder.iterdir()}
    ckpt.commit_checkpoint(folder, {"step": step}, files)
    return folder


def truncate(folder):
    file = folder / "optimizer-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder):
    file = folder / "optimizer-0000.safetensors"
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)


def delete(folder):
    (folder / "optimizer-0000.safetensors").unlink()


def empty_manifest(folder):
    (folder / ckpt.MANIFEST).write_text("", encoding="utf-8")


def listless_manifest(folder):
    (folder / ckpt.MANIFEST).write_text(json.dumps({"version": 1, "files": {}}), encoding="utf-8")


def no_manifest(folder):
    (folder / ckpt.MANIFEST).unlink()


def change_state(folder):
    (folder / "state.json").write_text(json.dumps({"step": 99}), encoding="utf-8")


def point_outside(folder):
    manifest = json.loads((folder / ckpt.MANIFEST).read_text())
    manifest["files"]["../step-00000010/state.json"] = manifest["files"]["state.json"]
    (folder / ckpt.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


DAMAGES = [
    truncate,
    flip,
    delete,
    empty_manifest,
    listless_manifest,
    no_manifest,
    change_state,
    point_outside,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(tmp_path, damage):
    make(tmp_path, 10)
    newest = make(tmp_path, 20)
    assert ckpt.newest(tmp_path).step == 20
    damage(newest)
    found = ckpt.newest(tmp_path)
    assert found.step == 10
    assert len(found.rejected) == 1
    assert "step-00000020" in found.rejected[0]


def test_nothing_to_resume(tmp_path):
    assert ckpt.newest(tmp_path / "none").folder is None
    (tmp_path / "step-00000001").mkdir()
    found = ckpt.newest(tmp_path)
    assert (found.folder, found.step, len(found.rejected)) == (None, 0, 1)


def test_prune_keeps_the_newest(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    ckpt.prune(tmp_path, 2, protected={"step-00000010"})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000010", "step-00000020", "step-00000030"]
    ckpt.prune(tmp_path, 2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]

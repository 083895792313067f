"""A resume verifies every file once, each rank its own, and refuses a damaged one by name."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.rank_store import RankStore
from tbpo_ray.training.restore import find_resume_point, share_of
from tbpo_ray.training.tensor_files import FileFacts
from tests.training.rank_threads import on_ranks

NAMES = (
    "optimizer-0000.safetensors", "optimizer-0001.safetensors",
    "rng-0000.safetensors", "rng-0001.safetensors",
    "head.safetensors",
)  # fmt: skip


def make(checkpoints, step, names=NAMES):
    folder = ckpt.step_folder(checkpoints, step)
    folder.mkdir(parents=True)
    for name in names:
        save_file({"w": torch.full((9,), float(step))}, folder / name)
    ckpt.commit_checkpoint(folder, {"step": step}, {n: FileFacts.read(folder / n) for n in names})
    return folder


def flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_file_has_one_rank_and_a_rank_its_own_files(world):
    names = [*NAMES, "optimizer-0002.safetensors", "state.json"]
    shares = [share_of(names, rank, world) for rank in range(world)]
    assert Counter(name for share in shares for name in share) == Counter(names)
    for rank in range(min(world, 2)):
        assert {f"optimizer-{rank:04d}.safetensors", f"rng-{rank:04d}.safetensors"} <= shares[rank]


def test_a_file_is_read_once_by_the_rank_that_loads_it(tmp_path, monkeypatch):
    make(tmp_path, 10)
    make(tmp_path, 20)
    read, plain = [], FileFacts.read

    def recorded(file):
        read.append(file.name)
        return plain(file)

    monkeypatch.setattr(FileFacts, "read", recorded)
    points = on_ranks(monkeypatch, 2, lambda ranks: find_resume_point(tmp_path, ranks))
    assert [(p.newest.step, p.newest.rejected, p.stream_step) for p in points] == [(20, (), 20)] * 2
    counts = Counter(read)
    assert {counts[name] for name in NAMES} == {1}


@pytest.mark.parametrize("name", [*NAMES, "state.json", ckpt.MANIFEST])
@pytest.mark.parametrize("world", [1, 2])
def test_a_flipped_byte_is_refused_by_name_and_the_previous_checkpoint_offered(
    tmp_path, monkeypatch, name, world
):
    make(tmp_path, 10)
    flip(make(tmp_path, 20) / name)
    for point in on_ranks(monkeypatch, world, lambda ranks: find_resume_point(tmp_path, ranks)):
        assert point.newest.step == 10 and point.newest.folder == ckpt.step_folder(tmp_path, 10)
        (sentence,) = point.newest.rejected
        assert sentence.startswith("checkpoint step-00000020 is not used: ")
        assert (name if name != ckpt.MANIFEST else "manifest") in sentence
        # Where only reading finds the damage, the stream was set up for the damaged one.
        assert point.stream_step == (20 if name in NAMES else 10)


def test_an_older_checkpoint_is_verified_as_well(tmp_path):
    make(tmp_path, 5)
    flip(make(tmp_path, 10) / "state.json")
    flip(make(tmp_path, 20) / "head.safetensors")
    (ckpt.step_folder(tmp_path, 30)).mkdir()
    point = find_resume_point(tmp_path, RankStore())
    assert point.newest.step == 5
    steps = [sentence.split()[1] for sentence in point.newest.rejected]
    assert steps == ["step-00000030", "step-00000020", "step-00000010"]
    assert point.stream_step == 20


def test_nothing_to_resume(tmp_path):
    point = find_resume_point(tmp_path / "none", RankStore())
    assert (point.newest.folder, point.newest.step, point.stream_step) == (None, 0, 0)
    flip(make(tmp_path, 10) / NAMES[0])
    point = find_resume_point(tmp_path, RankStore())
    assert (point.newest.folder, len(point.newest.rejected), point.stream_step) == (None, 1, 10)


def test_a_checkpoint_of_the_version_before_is_valid(tmp_path):
    """Written file by file, with a manifest made afterwards by reading them."""
    folder = ckpt.step_folder(tmp_path, 4)
    folder.mkdir()
    save_file({"w@0@master": torch.ones(5)}, folder / NAMES[0])
    (folder / "state.json").write_text(json.dumps({"step": 4, "world": 1, "metrics_bytes": 0}, indent=1))
    entries = {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in sorted(folder.iterdir())
    }
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": entries}, indent=1))
    point = find_resume_point(tmp_path, RankStore())
    assert point.newest.state == {"step": 4, "world": 1, "metrics_bytes": 0}

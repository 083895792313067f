"""Ranks write a checkpoint together, at once or in the background, and all learn of a failure."""

from __future__ import annotations

import errno
import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from tbpo_ray.config.schema import TrainingConfig
from tbpo_ray.storage.ownership import RunLock
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training import saver as saver_module
from tbpo_ray.training.rank_store import RankStore
from tbpo_ray.training.readback import Readback
from tbpo_ray.training.saver import SAVE_FAILED, CheckpointError, Saver
from tbpo_ray.training.tensor_files import FileFacts, write_tensors
from tests.training.rank_threads import on_ranks

MODES = pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])


@pytest.fixture
def lease(tmp_path):
    with RunLock(tmp_path) as lease:
        yield lease.for_new_worker_group()


def saver(tmp_path, lease, ranks=None, *, background=True, **training):
    settings = TrainingConfig(**training)
    return Saver(tmp_path / "checkpoints", ranks or RankStore(), settings, lease, background=background)


def files(rank=0, value=1.0):
    return {f"optimizer-{rank:04d}.safetensors": {"w@0@master": torch.full((1000,), value)}}


@MODES
def test_the_manifest_gathers_the_digests_of_all_ranks(tmp_path, lease, monkeypatch, background):
    """No file is read again by anybody."""
    with monkeypatch.context() as patched:
        patched.setattr(FileFacts, "read", lambda file: pytest.fail(f"{file} is read"))

        def work(ranks):
            mine = saver(tmp_path, lease, ranks, background=background)
            folder = mine.save(5, files(ranks.rank, float(ranks.rank)), {"step": 5})
            mine.wait()
            return folder

        (folder, *others) = on_ranks(patched, 3, work)
    assert others == [folder] * 2 and folder.name == "step-00000005"
    listed = json.loads((folder / ckpt.MANIFEST).read_text())["files"]
    assert list(listed) == [*(f"optimizer-{rank:04d}.safetensors" for rank in range(3)), "state.json"]
    assert ckpt.find_corruption(folder) is None
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]
    assert load_file(folder / "optimizer-0002.safetensors")["w@0@master"].eq(2).all()


def test_a_background_save_is_a_copy_and_the_next_one_waits_for_it(tmp_path, lease, monkeypatch):
    writing, go_on = threading.Event(), threading.Event()

    def slowly(file, tensors):
        writing.set()
        assert go_on.wait(30)
        return write_tensors(file, tensors)

    monkeypatch.setattr(saver_module, "write_tensors", slowly)
    mine, tensors = saver(tmp_path, lease), files()
    folder = mine.save(1, tensors, {"step": 1})
    assert writing.wait(30) and not folder.exists()
    tensors["optimizer-0000.safetensors"]["w@0@master"].zero_()
    memory = mine._copy._memory.data_ptr()
    threading.Timer(0.2, go_on.set).start()
    mine.save(2, tensors, {"step": 2})
    assert ckpt.find_corruption(folder) is None
    assert load_file(folder / "optimizer-0000.safetensors")["w@0@master"].eq(1).all()
    mine.wait()
    assert ckpt.newest(folder.parent).step == 2
    assert mine._copy._memory.data_ptr() == memory  # one copy, used again


def test_waiting_and_background_write_the_same_bytes_and_waiting_copies_nothing(tmp_path, lease):
    contents = []
    for background in (False, True):
        mine = saver(tmp_path, lease, background=background)
        folder = mine.save(3, files() | {"head.safetensors": {"x": torch.ones(3)}}, {"step": 3})
        mine.wait()
        contents.append({f.name: f.read_bytes() for f in folder.iterdir()})
        assert (mine._copy._memory.numel() > 0) is background
    assert contents[0] == contents[1] and len(contents[0]) == 4


@MODES
def test_a_full_disk_of_one_rank_is_the_same_sentence_on_all(tmp_path, lease, monkeypatch, background):
    def full(file, tensors):
        if file.name.startswith("optimizer-0001") and "00000002" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_tensors(file, tensors)

    monkeypatch.setattr(saver_module, "write_tensors", full)

    def work(ranks):
        mine = saver(tmp_path, lease, ranks, background=background)
        mine.save(1, files(ranks.rank), {"step": 1})
        with pytest.raises(CheckpointError) as caught:
            mine.save(2, files(ranks.rank), {"step": 2})
            mine.wait()
        with pytest.raises(CheckpointError):
            mine.save(3, files(ranks.rank), {"step": 3})
        readback = Readback(torch.device("cpu"))
        mine.offer(readback)
        assert readback[SAVE_FAILED] == [1.0]
        with pytest.raises(CheckpointError):
            mine.check(readback)
        return str(caught.value)

    first, second = on_ranks(monkeypatch, 2, work)
    assert first == second
    assert "step 2 was not written: rank 1: [Errno 28] No space left" in first and "\n" not in first
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@MODES
def test_ranks_that_have_lost_the_run_write_nothing_and_say_so_once(tmp_path, lease, monkeypatch, background):
    lease.for_new_worker_group()

    def work(ranks):
        mine = saver(tmp_path, lease, ranks, background=background)
        with pytest.raises(CheckpointError, match=r"rank 0, 1: .*writes nothing more") as caught:
            mine.save(1, files(ranks.rank), {"step": 1})
            mine.wait()
        return str(caught.value).count("nothing more")

    assert on_ranks(monkeypatch, 2, work) == [1, 1]
    assert not (tmp_path / "checkpoints").exists()


def test_a_failure_that_another_rank_knows_first_is_raised_here_too(tmp_path, lease, monkeypatch):
    go_on = threading.Event()

    def late(file, tensors):
        assert go_on.wait(30)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saver_module, "write_tensors", late)
    mine = saver(tmp_path, lease)
    mine.save(1, files(), {"step": 1})
    readback = Readback(torch.device("cpu"))
    mine.offer(readback)
    mine.check(readback)  # nobody knows yet
    threading.Timer(0.2, go_on.set).start()
    with pytest.raises(CheckpointError, match="Input/output"):
        mine.check({SAVE_FAILED: [1.0]})  # type: ignore[arg-type]


def test_waiting_has_a_limit_where_one_is_given(tmp_path, lease, monkeypatch):
    go_on = threading.Event()

    def stuck(file, tensors):
        assert go_on.wait(30)
        return write_tensors(file, tensors)

    monkeypatch.setattr(saver_module, "write_tensors", stuck)
    mine = saver(tmp_path, lease)
    folder = mine.save(1, files(), {"step": 1})
    mine.wait(0.05)
    assert not folder.exists()
    go_on.set()
    mine.wait()
    assert folder.exists()


def test_an_interrupted_driver_waits_for_what_is_being_written(tmp_path):
    partial = ckpt.partial_folder(tmp_path, 3, "group")
    partial.mkdir()
    assert not ckpt.await_writers(tmp_path, 0.1)
    timer = threading.Timer(0.2, lambda: ckpt.publish(partial, ckpt.step_folder(tmp_path, 3)))
    timer.start()
    assert ckpt.await_writers(tmp_path, 20)
    timer.join()
    assert ckpt.await_writers(tmp_path, 0) and ckpt.step_folder(tmp_path, 3).is_dir()


def test_background_is_for_gpus_unless_it_is_configured():
    assert [TrainingConfig().writes_in_background(gpus=gpus) for gpus in (False, True)] == [False, True]
    for value in (False, True):
        training = TrainingConfig(async_checkpoints=value)
        assert {training.writes_in_background(gpus=gpus) for gpus in (False, True)} == {value}
    assert [TrainingConfig().checkpoint_steps(total) for total in (3, 100, 103)] == [1, 20, 20]
    assert TrainingConfig(checkpoint_every=7).checkpoint_steps(100) == 7

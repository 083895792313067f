"""A process that is killed while it writes in the background resumes bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tbpo_ray.config.schema import TrainingConfig
from tbpo_ray.storage.ownership import RunLock
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training import saver as saver_module
from tbpo_ray.training.optim import build_optimizer
from tbpo_ray.training.random_state import load_random_states, random_states
from tbpo_ray.training.rank_store import RankStore
from tbpo_ray.training.restore import find_resume_point
from tbpo_ray.training.saver import Saver
from tbpo_ray.training.state import fragment_tensors, load_fragments
from tests.device.step_cases import batch, parts

pytestmark = pytest.mark.e2e
STEPS, EVERY = 6, 2
OPTIMIZER, RANDOM = "optimizer-0000.safetensors", "rng-0000.safetensors"


def train(folder: str, *, background: bool, kill: str | None = None) -> None:
    """Train to the last step from where the folder's checkpoints end.

    Args:
        kill: `copied` or `written`: SIGKILL when the checkpoint of step 4 has been copied, or written but not
            published.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    training = TrainingConfig(optimizer="adamw", learning_rate=1e-3, keep_checkpoints=100)
    found = parts({"name": "dpo"})
    optimizer = build_optimizer(found.scorer.parameters(), training)
    names = {id(p): n for n, p in found.scorer.named_parameters()}
    engine: Any = SimpleNamespace(
        module=found.scorer, client_optimizer=optimizer, optimizer=optimizer, names=names, stage=0
    )
    checkpoints = Path(folder) / "checkpoints"
    with RunLock(Path(folder)) as lease:
        ckpt.remove_partial(checkpoints)
        newest = find_resume_point(checkpoints, RankStore()).newest
        if newest.folder is not None:
            load_fragments(engine, [newest.folder / OPTIMIZER])
            load_random_states(newest.folder / RANDOM)
        saver = Saver(checkpoints, RankStore(), training, lease.for_new_worker_group(), background=background)
        for step in range(newest.step + 1, STEPS + 1):
            loss, _ = found.step(found.scorer, batch())
            # What is drawn has to be drawn again after resuming.
            (loss * (1 + torch.rand(()))).backward()
            saver.hold_updates()
            optimizer.step()
            optimizer.zero_grad()
            if step % EVERY == 0:
                if step == 4 and kill is not None:
                    saver.wait()  # the checkpoint before is not the one to be interrupted
                    die_when(kill)
                saver.save(
                    step, {OPTIMIZER: fragment_tensors(engine), RANDOM: random_states()}, {"step": step}
                )
        saver.wait()


def die_when(moment: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "copied":
        setattr(saver_module, "write_tensors", die)  # noqa: B010 - it is imported there
    else:
        setattr(ckpt, "publish", die)  # noqa: B010


def test_a_run_killed_while_it_writes_in_the_background_resumes_bit_for_bit(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    train(str(whole), background=False)
    expected = load_file(ckpt.step_folder(whole / "checkpoints", STEPS) / OPTIMIZER)
    spawn = multiprocessing.get_context("spawn")
    for moment in ("copied", "written"):
        folder = tmp_path / moment
        folder.mkdir()
        killed = spawn.Process(target=train, args=(str(folder),), kwargs={"background": True, "kill": moment})
        killed.start()
        killed.join(200)
        assert killed.exitcode == -signal.SIGKILL
        # The checkpoint that was being written is not there; the one before it is.
        (partial,) = (folder / "checkpoints").glob(".step-*")
        assert (partial / ckpt.MANIFEST).exists() is (moment == "written")
        assert ckpt.newest(folder / "checkpoints").step == 2
        train(str(folder), background=True)
        last = ckpt.newest(folder / "checkpoints")
        assert last.step == STEPS and last.folder is not None
        found = load_file(last.folder / OPTIMIZER)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert (last.folder / RANDOM).read_bytes() == (
            ckpt.step_folder(whole / "checkpoints", STEPS) / RANDOM
        ).read_bytes()
    at_2 = load_file(ckpt.step_folder(whole / "checkpoints", 2) / OPTIMIZER)
    assert any(not torch.equal(at_2[name], value) for name, value in expected.items())

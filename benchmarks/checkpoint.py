"""What a checkpoint costs training: the time that training waits, and the time until the checkpoint is whole.

The same weights and optimizer state are written in turn
  plainly          one file, whose bytes are in memory already: write, fsync, fsync of the folder
  synchronously    a checkpoint while training waits: files, digests, manifest, fsync, publication, pruning
  asynchronously   the same from a copy, while training steps go on

into `run.output_dir`, so the storage is that of the runs. The first checkpoint of each mode, which also
allocates, is not counted.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Measured, machine, median, ratio, run_in_rounds
from benchmarks.tables import goal_cell, ratio_cell, section
from tbpo_ray.config.schema import Config, TrainingConfig
from tbpo_ray.storage.ownership import RunLock
from tbpo_ray.storage.paths import output_dir
from tbpo_ray.training.optim import build_optimizer
from tbpo_ray.training.rank_store import RankStore
from tbpo_ray.training.saver import Saver
from tbpo_ray.training.state import fragment_tensors

MODES = ("synchronous", "asynchronous")
GOALS = {"synchronous": 1.2, "asynchronous": 0.1}
"""Most that training may wait, in plain writes of the same bytes."""
ROUNDS, QUICK_ROUNDS = 7, 2
WIDTH, LAYERS, QUICK_LAYERS = 1024, 12, 2
"""Of the model: 12 layers are 12.6 million weights, 100 MB of state with RMSprop."""
FILE = "optimizer-0000.safetensors"


class Trained:
    """A model whose weights and optimizer state are saved."""

    def __init__(self, layers: int):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))).to(self.device)
        self.optimizer = build_optimizer(self.model.parameters(), TrainingConfig(learning_rate=1e-4))
        self.batch = torch.randn(64, WIDTH, device=self.device)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.engine: Any = SimpleNamespace(
            module=self.model, client_optimizer=self.optimizer, optimizer=None, names=names, stage=0
        )
        self.saver: Saver | None = None

    def step(self) -> float:
        """The seconds of an optimizer step, until the device has done it."""
        began = time.perf_counter()
        self.model(self.batch).square().mean().backward()
        if self.saver is not None:
            self.saver.hold_updates()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def tensors(self) -> dict[str, torch.Tensor]:
        return fragment_tensors(self.engine)


def run(config: Config, *, quick: bool = False) -> list[dict[str, Any]]:
    """Write plainly, synchronously and asynchronously in turn.

    Args:
        quick: a smaller state and fewer rounds, to check that the benchmark runs.

    Returns:
        A row for each mode with `mode`, `stall_ratio` (training waits, over a plain write) and
        `total_ratio` (until the checkpoint is whole), medians with `low` and `high` of the rounds, their
        seconds, `slower_steps` (how much longer steps take meanwhile), and the machine.
    """
    about = machine()
    trained = Trained(QUICK_LAYERS if quick else LAYERS)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    output_dir(config).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=output_dir(config)) as name:
        for mode in MODES:
            (Path(name) / mode).mkdir()
        with RunLock(Path(name) / MODES[0]) as waiting, RunLock(Path(name) / MODES[1]) as background:
            savers = {
                mode: Saver(
                    Path(name) / mode / "checkpoints",
                    RankStore(),
                    TrainingConfig(keep_checkpoints=1),
                    lease.for_new_worker_group(),
                    trained.device,
                    background=mode == "asynchronous",
                )
                for mode, lease in zip(MODES, (waiting, background), strict=True)
            }
            trained.step()
            steps = itertools.count(1)
            data = [_one_file(Path(name), savers["synchronous"], trained)]
            for saver in savers.values():
                _save(saver, trained, steps)
            found = run_in_rounds(
                {
                    "plain": lambda: _write_plainly(Path(name) / "plain", data[0]),
                    **{mode: partial(_save, saver, trained, steps) for mode, saver in savers.items()},
                },
                rounds,
            )
    return [_row(mode, found, len(data[0]), about) for mode in MODES]


def _one_file(folder: Path, saver: Saver, trained: Trained) -> bytes:
    """The bytes that the checkpoint's tensors have in a file."""
    saved = saver.save(0, {FILE: trained.tensors()}, {"step": 0})
    saver.wait()
    return (saved / FILE).read_bytes()


def _write_plainly(folder: Path, data: bytes) -> Measured:
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    folder.mkdir()
    with (folder / "file").open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    seconds = time.perf_counter() - began
    return {"stall": seconds, "total": seconds}


def _save(saver: Saver, trained: Trained, steps: Iterator[int]) -> Measured:
    trained.saver, step = saver, next(steps)
    alone = [trained.step() for _ in range(3)]
    began = time.perf_counter()
    saver.save(step, {FILE: trained.tensors()}, {"step": step})
    stall = time.perf_counter() - began
    meanwhile = []
    while saver.is_writing:
        meanwhile.append(trained.step())
    saver.wait()
    total = time.perf_counter() - began
    mean = sum(alone) / len(alone)
    if trained.device.type == "cuda" and meanwhile:
        # Where the device copies, its next update waits for the copy.
        stall += max(0.0, meanwhile[0] - mean)
    slower = sum(meanwhile) / len(meanwhile) / mean - 1 if meanwhile else 0.0
    return {"stall": stall, "total": total, "slower_steps": slower}


def _row(mode: str, found: dict[str, list[Measured]], size: int, about: dict[str, Any]) -> dict[str, Any]:
    stall, total = (ratio(found[mode], found["plain"], key) for key in ("stall", "total"))
    return {
        "mode": mode,
        "stall_ratio": stall["ratio"],
        "stall": stall,
        "total_ratio": total["ratio"],
        "total": total,
        "seconds": median(found[mode], "stall"),
        "plain_seconds": median(found["plain"], "total"),
        "slower_steps": median(found[mode], "slower_steps"),
        "bytes": size,
        "rounds": len(found[mode]),
        "machine": about,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table."""
    cells = [
        [
            row["mode"],
            f"{1000 * row['seconds']:.0f}",
            ratio_cell(row["stall"], 3),
            goal_cell(row["stall_ratio"], GOALS[row["mode"]], at_most=True),
            ratio_cell(row["total"]),
            f"{row['slower_steps']:+.0%}" if row["mode"] == "asynchronous" else "-",
        ]
        for row in rows
    ]
    head = [
        "checkpoint",
        "training waits, ms",
        "over a plain write",
        "goal",
        "until it is whole, over a plain write",
        "steps meanwhile",
    ]
    first = rows[0]
    intro = (
        f"{first['bytes'] / 1e6:.0f} MB of weights and optimizer state of one worker, against a plain write "
        f"of the same bytes with fsync ({1000 * first['plain_seconds']:.0f} ms); medians, smallest and "
        f"largest of {first['rounds']} rounds."
    )
    return section(intro, head, cells, first["machine"])

"""The loop that every Ray Train worker runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tbpo_ray.config.schema import Config
from tbpo_ray.data.schedule import ORDER, Schedule
from tbpo_ray.data.shards import Prepared
from tbpo_ray.data.stream import MicroBatch, MicroBatchIterator, local_micro_batches
from tbpo_ray.models.load import quiet_transformers
from tbpo_ray.storage.ownership import NotOursError, WriteLease
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.batch import PairBatch, collate_columns
from tbpo_ray.training.components import TrainingComponents, build_parts
from tbpo_ray.training.deepspeed_engine import Engine, without_partitions
from tbpo_ray.training.metrics_file import MetricsFile, MetricSums
from tbpo_ray.training.optim import HeadOptimizer, NonFiniteGradientError, learning_rate
from tbpo_ray.training.plan import RunPaths, make_schedule
from tbpo_ray.training.saver import Cadence, Saver, finite
from tbpo_ray.training.state import copy_fragments, load_fragments

PREEMPTION_SECONDS = 5.0
"""How often workers ask whether one of their nodes is about to go."""


def train_loop(payload: dict[str, Any]) -> dict[str, Any]:
    """Entry point of a Ray Train worker. `payload`: `config` (a tree) and `run_paths`."""
    config = Config.model_validate(payload["config"])
    run_paths = RunPaths(**payload["run_paths"])
    try:
        worker = Worker(config, run_paths)
    except NotOursError as error:  # on all ranks
        return {"failed": str(error)}
    return worker.run()


class UnknownMetricError(ValueError):
    """Raised on every rank in the same step."""


class Worker:
    """One rank: engine, data stream, checkpoints."""

    def __init__(self, config: Config, run_paths: RunPaths):
        import ray.train

        self.config, self.run_paths = config, run_paths
        self.checkpoints = Path(run_paths.checkpoints)
        self.context = ray.train.get_context()
        self.rank, self.world = self.context.get_world_rank(), self.context.get_world_size()
        self.device = _device(config)
        lease = _gang_permit(run_paths, self.rank, self.world)
        _threads(config, self.context.get_local_world_size())
        quiet_transformers()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.tf32
        torch.manual_seed(config.run.seed)

        self.prepared = Prepared.load(run_paths.prepared)
        self.schedule = make_schedule(config, self.prepared.lengths())
        self.eval_data = Prepared.load(run_paths.prepared_eval) if run_paths.prepared_eval else None
        self.parts: TrainingComponents = build_parts(config, run_paths, self.device)
        self.engine = Engine(self.parts.scorer, without_partitions(config, self.world), self.device)
        head = self.parts.head
        self.head_optimizer = (
            HeadOptimizer(head, config.objective.state_baseline.lr) if head is not None else None
        )
        self.step = 0
        self.pairs_seen = 0
        self.saver = Saver(self.checkpoints, self.rank, self.world, config.training, lease)
        self.preemption = Cadence(PREEMPTION_SECONDS, self.device)
        self.notice: Any = None
        self.metrics = MetricsFile(Path(run_paths.run_dir), lease, enabled=self.rank == 0)
        # Dropout differs between ranks; weights do not.
        torch.manual_seed(config.run.seed * 1_000_003 + self.rank)

    def run(self) -> dict[str, Any]:
        import ray.train

        self.resume()
        total = self.schedule.steps_total
        shard = ray.train.get_dataset_shard("train")
        stream = MicroBatchIterator(shard)
        result: dict[str, Any] = {}
        try:
            while self.step < total:
                self.train_step(stream, total)
        except NonFiniteGradientError:  # on all ranks in the same step
            result["failed"] = self._nonfinite()
        except UnknownMetricError as error:
            result["failed"] = str(error)
        except torch.OutOfMemoryError as error:  # perhaps on this rank only: the group has to end
            raise RuntimeError(self._out_of_memory(error)) from error
        self.saver.wait()
        return result | {"step": self.step, "pairs_seen": self.pairs_seen}

    def train_step(self, stream: Iterator[MicroBatch], total: int) -> None:
        """One optimizer step over this rank's micro-batches of it."""
        began = time.perf_counter()
        sums = MetricSums()
        waited, done, tokens, real = 0.0, False, 0, 0
        pairs_in_step = 0
        while not done:
            asked = time.perf_counter()
            micro = next(stream)
            waited += time.perf_counter() - asked
            if micro.step != self.step:
                raise AssertionError(f"the stream is at step {micro.step}, training at {self.step}")
            done = micro.index == micro.count - 1
            pairs_in_step = micro.pairs_in_step
            batch = self.collate(micro)
            loss_sum, metrics = self.parts.step(self.engine, batch, self.step)
            # The engine averages over ranks; a pair weighs 1 / pairs_in_step wherever it lands.
            self.engine.backward(loss_sum * (self.world / pairs_in_step), last=done)
            count = len(micro.pair_ids)
            sums.add(loss_sum, metrics, count)
            tokens += batch.input_ids.numel()
            real += int((batch.segment >= 0).sum())
        rate = learning_rate(self.step, total, self.config.training)
        skipped = self.engine.skipped
        norm = self.engine.step(rate, sums.loss)
        if self.head_optimizer is not None:
            if self.engine.skipped == skipped:
                self.head_optimizer.step()
            else:
                self.head_optimizer.adamw.zero_grad(set_to_none=True)
        self.step += 1
        self.pairs_seen += pairs_in_step
        self.after_step(sums, norm, rate, total, time.perf_counter() - began, waited, tokens, real)

    def after_step(
        self,
        sums: MetricSums,
        norm: float,
        rate: float,
        total: int,
        seconds: float,
        waited: float,
        tokens: int,
        real: int,
    ) -> None:
        """Log, evaluate and checkpoint where this step asks for it; all ranks agree on what happens."""
        training = self.config.training
        last = self.step == total
        save_every = training.checkpoint_every or max(1, total // 10)
        save = last or self.step % save_every == 0 or self._validates()
        judged = save and training.keep_best > 0
        log = last or judged or self.step % training.log_every == 0
        evaluate = self.eval_data is not None and (
            last
            or (judged and training.best_metric.startswith("eval/"))
            or (training.eval_every is not None and self.step % training.eval_every == 0)
        )
        self.check_best_metric(sums)
        row: dict[str, float] = {}
        if log:
            row = {
                "step": self.step,
                "epoch": self.pairs_seen / max(1, self.prepared.pairs),
                "pairs_seen": self.pairs_seen,
                **sums.reduce(self.device),
                "grad_norm": norm,
                "learning_rate": rate,
            }
            if self.engine.skipped:
                row["steps_skipped"] = self.engine.skipped
        if evaluate:
            row = {"step": self.step, **row, **{f"eval/{k}": v for k, v in self.evaluate().items()}}
        if row and self.rank == 0:
            self.metrics.write(
                row,
                {
                    "step": self.step,
                    "total": total,
                    "step_seconds": seconds,
                    "data_wait_share": waited / seconds,
                    "tokens_per_second": self.world * real / seconds,
                    "padding_share": 1 - real / max(1, tokens),
                    "time": time.time(),
                },
            )
        if save or self.preempted():
            self.save(row)

    def check_best_metric(self, sums: MetricSums) -> None:
        """Raises UnknownMetric in the first step where `training.best_metric` is nothing that is logged."""
        name = self.config.training.best_metric
        if self.config.training.keep_best and name.removeprefix("eval/") not in sums.sums:
            raise UnknownMetricError(
                f"training.best_metric={name}: not logged; {', '.join(sorted(sums.sums))} are, and the same "
                "with eval/ where data.eval is given"
            )

    def preempted(self) -> bool:
        """Whether a node under some worker has newly been told to go: time for a checkpoint."""
        import ray.train

        if not self.preemption.due():
            return False
        before, self.notice = self.notice, ray.train.get_preemption_info()
        news = self.notice is not None and self.notice != before
        if news and self.rank == 0:
            ranks = ", ".join(str(rank) for rank in self.notice.preempted_ranks)
            self.metrics.log_event(
                f"the node of worker {ranks} is about to go: checkpoint at step {self.step}"
            )
        return news

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on held-out pairs, each pair once."""
        assert self.eval_data is not None
        module = self.parts.scorer
        was_training = module.training
        module.eval()
        sums = MetricSums()
        per_step = self.config.training.micro_batch_pairs * self.world
        schedule = Schedule(
            self.eval_data.lengths(),
            seed=0,
            pairs_per_step=per_step,
            micro_batch_pairs=self.config.training.micro_batch_pairs,
            length_batches=True,
            cut_tail=self.parts.cut,
            epochs=1,
        )
        for micro in local_micro_batches(
            self.eval_data, schedule, self.rank, self.world, 0, extra_dirs=self.run_paths.extra_eval
        ):
            loss_sum, metrics = self.parts.step(self.engine, self.collate(micro), self.step)
            sums.add(loss_sum, metrics, len(micro.pair_ids))
        module.train(was_training)
        return sums.reduce(self.device)

    def collate(self, micro: MicroBatch) -> PairBatch:
        columns: dict[str, Any] = micro.columns()
        if not len(micro.pair_ids):
            # A rank without pairs runs one masked pair, so that collectives stay in step.
            empty: Any = [torch.zeros(0).numpy()]
            columns = {k: empty for k in columns} | {
                "prompt_ids": [torch.zeros(1, dtype=torch.int64).numpy()]
            }
        return collate_columns(
            columns,
            sides=self.parts.step.sides,
            pad_id=self.parts.pad_id,
            shared=self.parts.shared,
            cut=self.parts.cut,
        ).to(self.device)

    def save(self, row: dict[str, float]) -> None:
        """Write a checkpoint and tell Ray Train; all ranks together."""
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode
        from ray.train.v2.api.validation_config import ValidationTaskConfig

        files = {
            f"optimizer-{self.rank:04d}.safetensors": copy_fragments(self.engine),
            f"rng-{self.rank:04d}.safetensors": _rng_states(),
        }
        if self.rank == 0 and self.head_optimizer is not None:
            files["head.safetensors"] = self.head_optimizer.state_dict()
        state = {
            "step": self.step,
            "pairs_seen": self.pairs_seen,
            "world": self.world,
            "steps_total": self.schedule.steps_total,
            "metrics_bytes": self.metrics.offset(),
            "metrics": finite(row),
            "skipped": self.engine.skipped,
            "data": self.prepared.fingerprint,
            "order": ORDER,
        }
        validates = self._validates()
        folder = self.saver.save(self.step, files, state, pending=validates)
        numbers = {k: float(v) for k, v in row.items()} or {"step": float(self.step)}
        validation: Any = ValidationTaskConfig(fn_kwargs={"step": self.step}) if validates else False
        ray.train.report(
            numbers,
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            validation=validation,
        )

    def _validates(self) -> bool:
        every = self.config.training.validate_every
        return every is not None and self.step % every == 0

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one; the same one on every rank."""
        if self.rank == 0:
            ckpt.remove_partial(self.checkpoints)
        found = [ckpt.newest(self.checkpoints) if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(found, src=0)
        newest = found[0]
        assert newest is not None
        if self.rank == 0:
            for sentence in newest.rejected:
                self.metrics.log_event(sentence)
        if newest.folder is None:
            self.metrics.rewind(0)
            return
        state, folder = newest.state, newest.folder
        load_fragments(self.engine, sorted(folder.glob("optimizer-*.safetensors")))
        if self.head_optimizer is not None:
            from safetensors.torch import load_file

            self.head_optimizer.load_state_dict(load_file(folder / "head.safetensors"))
        if state["world"] == self.world:
            _load_rng(folder / f"rng-{self.rank:04d}.safetensors")
        self.step, self.pairs_seen = int(state["step"]), int(state["pairs_seen"])
        self.engine.client_optimizer.skipped = int(state.get("skipped", 0))  # type: ignore[attr-defined]
        self.metrics.rewind(int(state["metrics_bytes"]))
        if self.rank == 0:
            self.metrics.log_event(
                f"continuing from {folder.name} ({state['world']} -> {self.world} workers)"
            )

    def _nonfinite(self) -> str:
        rate = self.config.training.learning_rate
        return (
            f"training.on_nonfinite=stop: the loss or a gradient of step {self.step + 1} is NaN or infinite; "
            f"on all workers nothing moved; lower training.learning_rate={rate}, or skip such steps"
        )

    def _out_of_memory(self, error: Exception) -> str:
        pairs, length = self.config.training.micro_batch_pairs, self.config.data.max_length
        return (
            f"out of memory in step {self.step + 1} with training.micro_batch_pairs={pairs} and "
            f"data.max_length={length}: lower either, or set training.activation_checkpointing=true "
            f"({str(error).splitlines()[0]})"
        )


def _gang_permit(run_paths: RunPaths, rank: int, world: int) -> WriteLease:
    """The right to write of all ranks that start together.

    Raises:
        NotOursError: on all ranks, where the driver has lost the run.
    """
    found: list[WriteLease | str | None] = [None]
    if rank == 0:
        try:
            found = [run_paths.lease.for_new_worker_group()]
        except NotOursError as error:
            found = [str(error)]
    if world > 1:
        dist.broadcast_object_list(found, src=0)
    (lease,) = found
    if isinstance(lease, str):
        raise NotOursError(lease)
    assert lease is not None
    return lease


def _device(config: Config) -> torch.device:
    if not config.cluster.gpus:
        return torch.device("cpu")
    from ray.train.torch import get_device

    return get_device()  # type: ignore[return-value]


def _threads(config: Config, local_world: int) -> None:
    import os

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.cluster.threads_per_worker or max(1, cores // local_world))


def _rng_states() -> dict[str, Tensor]:
    states: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _load_rng(file: Path) -> None:
    from safetensors.torch import load_file

    states = load_file(file)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

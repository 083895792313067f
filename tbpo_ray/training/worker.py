"""The loop that every Ray Train worker runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tbpo_ray.config.schema import Config
from tbpo_ray.data.schedule import ORDER_VERSION
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.data.stream import MicroBatch, MicroBatchIterator, local_micro_batches
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import quiet_transformers
from tbpo_ray.storage.ownership import LeaseLostError, WriteLease
from tbpo_ray.training import checkpoint as ckpt
from tbpo_ray.training.batch import PairBatch, collate_columns
from tbpo_ray.training.components import build_components
from tbpo_ray.training.deepspeed_engine import Engine, without_partitions
from tbpo_ray.training.distributed import broadcast_object
from tbpo_ray.training.failures import nonfinite_step, out_of_memory
from tbpo_ray.training.metrics_file import MetricsFile, MetricSums
from tbpo_ray.training.optim import HeadOptimizer, NonFiniteGradientError, learning_rate
from tbpo_ray.training.prefetch import BatchPrefetcher
from tbpo_ray.training.random_state import load_random_states, random_states
from tbpo_ray.training.rank_store import RankStore
from tbpo_ray.training.readback import Readback
from tbpo_ray.training.restore import find_resume_point
from tbpo_ray.training.resume_checks import generator_source
from tbpo_ray.training.run_paths import RunPaths
from tbpo_ray.training.run_plan import (
    OtherRowsError,
    check_rows,
    evaluation_schedule,
    make_schedule,
    resolve_run,
)
from tbpo_ray.training.saver import Cadence, CheckpointError, Saver, finite
from tbpo_ray.training.state import fragment_tensors, load_fragments

PREEMPTION_SECONDS = 5.0
"""How often workers check whether one of their nodes is being preempted."""
DRAIN_SECONDS = 60.0
"""How long a rank that failed lets a checkpoint be completed that is being written."""


def train_loop(payload: dict[str, Any]) -> dict[str, Any]:
    """Run one worker; the entry point for Ray Train.

    Args:
        payload: `config`, the run's configuration as a tree, and `run_paths`, the fields of its `RunPaths`.
    """
    config = Config.model_validate(payload["config"])
    run_paths = RunPaths(**payload["run_paths"])
    try:
        worker = Worker(config, run_paths)
    except LeaseLostError as error:
        # Raised on all ranks together. Returned instead of raised: Ray Train would restart the workers, and
        # a lost lease does not come back.
        return {"failed": str(error)}
    except InputError as error:
        # Likewise on all ranks: the model or a combination of settings is at fault, not the workers.
        return {"refused": str(error)}
    except OtherRowsError as error:
        return {"other_rows": (error.changes, error.sentence)}
    return worker.run()


class UnknownMetricError(ValueError):
    """`training.best_metric` is not logged; raised on every rank in the same step."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step measured on this rank."""

    metrics: dict[str, float]
    """Means over the pairs of the step, of all ranks."""
    grad_norm: float
    learning_rate: float
    seconds: float
    data_wait_seconds: float
    tokens: int
    """Positions that went through the model, padding included."""
    real_tokens: int
    """The same without padding."""
    preemption_due: bool
    """Whether it is time to ask for preemption notices."""


@dataclass(frozen=True)
class DueActions:
    """What follows a step; the same on every rank, since saving and evaluating are collective."""

    log: bool
    evaluate: bool
    save: bool


class Worker:
    """One rank: engine, data stream, checkpoints."""

    def __init__(self, config: Config, run_paths: RunPaths):
        import ray.train

        self.config, self.run_paths = config, run_paths
        self.plan = resolve_run(config)
        self.checkpoints = Path(run_paths.checkpoints)
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = _device(config)
        lease = _worker_group_lease(run_paths, self.rank)
        _set_threads(config, context.get_local_world_size())
        quiet_transformers()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.tf32
        torch.manual_seed(config.run.seed)

        self.prepared = PreparedPairs.load(run_paths.prepared)
        self.schedule = make_schedule(self.plan, self.prepared.lengths())
        self.eval_data = PreparedPairs.load(run_paths.prepared_eval) if run_paths.prepared_eval else None
        self.components = build_components(self.plan, run_paths, self.device)
        layout, said = self.components.layout, "; ".join(self.components.sentences)
        check_rows(self.plan, packed=layout.packed, shared_prompt=layout.shared_prompt, sentence=said)
        self.engine = Engine(self.components.scorer, without_partitions(config, self.world), self.device)
        head = self.components.head
        self.head_optimizer = (
            HeadOptimizer(head, config.objective.state_baseline.lr) if head is not None else None
        )
        self.generator_source = generator_source(config)
        self.step = 0
        self.pairs_seen = 0
        self.ranks = RankStore()
        background = config.training.writes_in_background(gpus=config.cluster.gpus)
        self.saver = Saver(
            self.checkpoints, self.ranks, config.training, lease, self.device, background=background
        )
        self.preemption = Cadence(PREEMPTION_SECONDS, self.rank)
        self.notice: Any = None
        self.metrics = MetricsFile(Path(run_paths.run_dir), lease, enabled=self.rank == 0)
        for sentence in self.components.sentences:
            self._log_once(sentence)
        # From here on dropout draws differently on each rank; the weights above were drawn alike.
        torch.manual_seed(config.run.seed * 1_000_003 + self.rank)

    def run(self) -> dict[str, Any]:
        batches = BatchPrefetcher(self._stream(self.resume()), self.collate, self.device)
        faults: list[str] = []
        try:
            while self.step < self.schedule.steps_total:
                self.after_step(self.train_step(batches))
        # The first two are raised on all ranks in the same step: the loop ends in an orderly way everywhere.
        except NonFiniteGradientError:
            faults.append(nonfinite_step(self.config, self.step + 1))
        except (UnknownMetricError, CheckpointError) as error:
            faults.append(str(error))
        except BaseException as error:
            # Possibly on this rank only: an error ends the group, whose other ranks wait in a collective.
            self._end_saving(DRAIN_SECONDS)
            if isinstance(error, torch.OutOfMemoryError):
                raise RuntimeError(out_of_memory(self.config, self.step + 1, error)) from error
            raise
        faults += [fault for fault in self._end_saving() if fault not in faults]
        failed = {"failed": "; ".join(faults)} if faults else {}
        return failed | {"step": self.step, "pairs_seen": self.pairs_seen}

    def _end_saving(self, seconds: float | None = None) -> list[str]:
        """Wait for what is being written in the background; returns what is wrong with it."""
        try:
            self.saver.wait(seconds)
        except CheckpointError as error:
            return [str(error)]
        return []

    def _stream(self, expected_step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches from its step on; `expected_step` is where Ray's stream starts."""
        import ray.train

        if self.step == expected_step:
            return MicroBatchIterator(ray.train.get_dataset_shard("train"))
        # A damaged checkpoint was found after Ray's stream was set up; this rank reads the same one itself.
        return local_micro_batches(
            self.prepared, self.schedule, self.rank, self.world, self.step, extra_dirs=self.run_paths.extra
        )

    def train_step(self, batches: BatchPrefetcher) -> StepReport:
        """One optimizer step over this rank's micro-batches of it."""
        began = time.perf_counter()
        sums = MetricSums()
        waited = batches.seconds_waited
        done, tokens, real_tokens, pairs_in_step = False, 0, 0, 0
        while not done:
            micro, batch = next(batches)
            if micro.step != self.step:
                raise AssertionError(f"the stream is at step {micro.step}, training at {self.step}")
            done = micro.index == micro.count - 1
            pairs_in_step = micro.pairs_in_step
            loss_sum, metrics = self.components.step(self.engine, batch, self.step)
            # DeepSpeed averages gradients over ranks; this way each pair of the step has the same weight,
            # whatever rank and micro-batch it is in.
            self.engine.backward(loss_sum * (self.world / pairs_in_step), last=done)
            sums.add(loss_sum, metrics, len(micro.pair_ids))
            tokens += batch.input_ids.numel()
            real_tokens += batch.real_tokens
        rate = learning_rate(self.step, self.schedule.steps_total, self.config.training)
        readback = Readback(self.device)
        sums.offer(readback)
        self.preemption.offer(readback)
        self.saver.offer(readback)
        if self.head_optimizer is not None:
            self.head_optimizer.offer(readback)
        skipped = self.engine.skipped
        self.saver.hold_updates()
        norm = self.engine.step(rate, readback)
        if self.head_optimizer is not None:
            # A skipped step moves neither the policy nor the head.
            self.head_optimizer.step(readback, skip=self.engine.skipped != skipped)
        self.step += 1
        self.pairs_seen += pairs_in_step
        self.saver.check(readback)
        return StepReport(
            metrics=sums.means(readback),
            grad_norm=norm,
            learning_rate=rate,
            seconds=time.perf_counter() - began,
            data_wait_seconds=batches.seconds_waited - waited,
            tokens=tokens,
            real_tokens=real_tokens,
            preemption_due=self.preemption.due(readback),
        )

    def after_step(self, report: StepReport) -> None:
        """Log, evaluate and save where they are due."""
        self.check_best_metric(report.metrics)
        due = self._due_actions()
        row = self._metrics_row(report) if due.log else {}
        if due.evaluate:
            row = {"step": self.step, **row, **{f"eval/{k}": v for k, v in self.evaluate().items()}}
        if row and self.rank == 0:
            self.metrics.write(row, self._timing_row(report))
        preempted = report.preemption_due and self.preempted()
        if due.save or preempted:
            self.save(row)

    def _due_actions(self) -> DueActions:
        training, total = self.config.training, self.schedule.steps_total
        last = self.step == total
        save = last or self._is_every(training.checkpoint_steps(total)) or self._is_validated()
        # A checkpoint that competes for `keep_best` has to have its metric in its state.
        scored = save and training.keep_best > 0
        needs_score = scored and training.best_metric.startswith("eval/")
        evaluate = last or needs_score or self._is_every(training.eval_every)
        return DueActions(
            log=last or scored or self._is_every(training.log_every),
            evaluate=evaluate and self.eval_data is not None,
            save=save,
        )

    def _is_every(self, steps: int | None) -> bool:
        """Whether something that takes place every so many steps is due; never for None."""
        return steps is not None and self.step % steps == 0

    def _metrics_row(self, report: StepReport) -> dict[str, float]:
        row: dict[str, float] = {
            "step": self.step,
            "epoch": self.pairs_seen / max(1, self.prepared.pairs),
            "pairs_seen": self.pairs_seen,
            **report.metrics,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
        }
        if self.engine.skipped:
            row["steps_skipped"] = self.engine.skipped
        return row

    def _timing_row(self, report: StepReport) -> dict[str, float]:
        return {
            "step": self.step,
            "total": self.schedule.steps_total,
            "step_seconds": report.seconds,
            "data_wait_share": report.data_wait_seconds / report.seconds,
            "tokens_per_second": self.world * report.real_tokens / report.seconds,
            "padding_share": 1 - report.real_tokens / max(1, report.tokens),
            "time": time.time(),
        }

    def check_best_metric(self, metrics: dict[str, float]) -> None:
        """Raise UnknownMetricError in the first step if `training.best_metric` is not logged."""
        name = self.config.training.best_metric
        if self.config.training.keep_best and name.removeprefix("eval/") not in metrics:
            raise UnknownMetricError(
                f"training.best_metric={name}: not logged; choose one of {', '.join(sorted(metrics))}, or "
                "one of these with the prefix eval/ if data.eval is set"
            )

    def preempted(self) -> bool:
        """Whether a node of some worker has newly been announced as preempted; then a checkpoint is due."""
        import ray.train

        before, self.notice = self.notice, ray.train.get_preemption_info()
        is_new = self.notice is not None and self.notice != before
        if is_new and self.rank == 0:
            ranks = ", ".join(str(rank) for rank in self.notice.preempted_ranks)
            self.metrics.log_event(
                f"the node of worker {ranks} is being preempted: checkpoint at step {self.step}"
            )
        return is_new

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on held-out pairs, each pair once."""
        assert self.eval_data is not None
        module = self.components.scorer
        was_training = module.training
        module.eval()
        sums = MetricSums()
        schedule = evaluation_schedule(self.plan, self.eval_data.lengths(), self.world)
        stream = local_micro_batches(
            self.eval_data, schedule, self.rank, self.world, 0, extra_dirs=self.run_paths.extra_eval
        )
        for micro, batch in BatchPrefetcher(stream, self.collate, self.device):
            loss_sum, metrics = self.components.step(self.engine, batch, self.step)
            sums.add(loss_sum, metrics, len(micro.pair_ids))
        module.train(was_training)
        return sums.reduce(self.device)

    def collate(self, micro: MicroBatch) -> PairBatch:
        """The micro-batch's tensors, on the host."""
        columns: dict[str, Any] = micro.columns()
        if not len(micro.pair_ids):
            # A rank without pairs runs one fully masked pair, so that the collectives stay in step.
            columns = {name: [np.zeros(0, dtype=np.int64)] for name in columns}
            columns["prompt_ids"] = [np.zeros(1, dtype=np.int64)]
        return collate_columns(columns, self.components.layout)

    def save(self, row: dict[str, float]) -> None:
        """Write a checkpoint and report it to Ray Train. Collective: all ranks call it together."""
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode
        from ray.train.v2.api.validation_config import ValidationTaskConfig

        files = {
            f"optimizer-{self.rank:04d}.safetensors": fragment_tensors(self.engine),
            f"rng-{self.rank:04d}.safetensors": random_states(),
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
            "order": ORDER_VERSION,
            "size_columns": self.prepared.lengths().shape[1],
            "objective_definition": self.config.objective.traits.definition,
            "generator_source": self.generator_source,
        }
        validated = self._is_validated()
        folder = self.saver.save(self.step, files, state, pending=validated)
        numbers = {k: float(v) for k, v in row.items()} or {"step": float(self.step)}
        validation: Any = ValidationTaskConfig(fn_kwargs={"step": self.step}) if validated else False
        ray.train.report(
            numbers,
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            validation=validation,
        )

    def _is_validated(self) -> bool:
        """Whether the policy of this step is sampled and judged."""
        return self._is_every(self.config.training.validate_every)

    def resume(self) -> int:
        """Load the newest valid checkpoint, if there is one; the same one on every rank.

        Returns:
            The step at which Ray's stream starts: of the newest checkpoint, valid or not.
        """
        if self.rank == 0:
            ckpt.remove_partial(self.checkpoints)
        point = find_resume_point(self.checkpoints, self.ranks)
        newest = point.newest
        for sentence in newest.rejected:
            self.metrics.log_event(sentence)
        if newest.folder is None:
            self.metrics.rewind(0)
            return point.stream_step
        self._load(newest.folder, newest.state)
        self.metrics.rewind(int(newest.state["metrics_bytes"]))
        self.metrics.log_event(
            f"continuing from {newest.folder.name} ({newest.state['world']} -> {self.world} workers)"
        )
        return point.stream_step

    def _log_once(self, sentence: str) -> None:
        """Log an event that every start of the workers repeats, unless the log has it."""
        log = self.metrics.events_path
        if not log.is_file() or sentence not in log.read_text(encoding="utf-8").splitlines():
            self.metrics.log_event(sentence)

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        files = sorted(folder.glob("optimizer-*.safetensors"))
        load_fragments(self.engine, files, meet=self.ranks.meet)
        if self.head_optimizer is not None:
            from safetensors.torch import load_file

            self.head_optimizer.load_state_dict(load_file(folder / "head.safetensors"))
        # With another number of ranks the random states do not correspond; the fresh seeds serve as well.
        if state["world"] == self.world:
            load_random_states(folder / f"rng-{self.rank:04d}.safetensors")
        self.step, self.pairs_seen = int(state["step"]), int(state["pairs_seen"])
        self.engine.client_optimizer.skipped = int(state.get("skipped", 0))  # type: ignore[attr-defined]


def _worker_group_lease(run_paths: RunPaths, rank: int) -> WriteLease:
    """The write lease that all ranks of this worker group share.

    Raises:
        LeaseLostError: on all ranks, if the driver has lost the run.
    """
    result: WriteLease | str | None = None
    if rank == 0:
        try:
            result = run_paths.lease.for_new_worker_group()
        except LeaseLostError as error:
            result = str(error)
    result = broadcast_object(result)
    if isinstance(result, str):
        raise LeaseLostError(result)
    assert isinstance(result, WriteLease)
    return result


def _device(config: Config) -> torch.device:
    if not config.cluster.gpus:
        return torch.device("cpu")
    from ray.train.torch import get_device

    return get_device()


def _set_threads(config: Config, local_world: int) -> None:
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.cluster.threads_per_worker or max(1, cores // local_world))

"""The pool: vLLM engines as Ray Data actors (`ray.data.llm`) that sample answers to prompts."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_ray.cluster.error_summary import error_summary
from tbpo_ray.cluster.worker_logs import keep_dead_workers_logs
from tbpo_ray.config.loading import digest, to_tree
from tbpo_ray.config.schema import GenerationConfig
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.generation.engine_count import EngineCount, EngineNodes, engine_count
from tbpo_ray.generation.quiet import quiet_ray_data, remove_telemetry_actor
from tbpo_ray.generation.rows import input_rows, output_row, to_request, to_result
from tbpo_ray.generation.samples import (
    PromptTokens,
    Samples,
    done_indices,
    open_folder,
    read_parts,
    write_manifest,
    write_part,
)
from tbpo_ray.generation.stalls import StallWatch
from tbpo_ray.generation.vllm_engine import (
    TASK_CPUS,
    check_length,
    check_model,
    engine_arguments,
    engine_length,
    engine_resources,
    environment,
    needed_length,
)
from tbpo_ray.models.chat import stop_token_ids
from tbpo_ray.progress import log_progress

if TYPE_CHECKING:
    import pandas as pd
    from ray.data import Dataset

ENGINE_RESTARTS = 3
"""How often an engine that died is restarted."""
_STAGE = "vLLMEngineStage"
SAMPLING_VERSION = 2
"""Changes when the same settings give other samples. Since 2, an answer ends at any stop token."""
ENGINE_LOG = "engine.log"
"""In the folder of the samples: what the engines printed that died in the last call."""


def generate(
    model: str | Path,
    prompts: Sequence[PromptTokens],
    generation: GenerationConfig,
    *,
    output: str | Path,
    seed: int = 0,
    nodes: EngineNodes | None = None,
    adapter: str | Path | None = None,
) -> Samples:
    """Sample `generation.samples` answers to each prompt into Parquet parts under `output`.

    Ray must be running. Every (prompt, sample) has its own seed, so that a sample does not depend on its
    batch. A prompt that the engine rejects becomes a row with `error`. A call after a crash samples only the
    rows that are missing; a call with complete samples starts no engine. When this function returns or raises
    a RunFailedError, all processes of all engines have ended, and their memory is free.

    Args:
        model: a model folder that vLLM loads (safetensors, no remote code).
        prompts: the prompts, with unique ids.
        output: a folder on storage that all nodes share, either empty or from an earlier call with the same
            arguments.
        seed: seeds each sample together with the prompt's id and the sample's number.
        nodes: where the engines run; default: on CPUs of any node.
        adapter: a LoRA adapter folder, served without merging.

    Raises:
        InputError: no prompts, not a model folder, an adapter of another model, a length that the model does
            not have, or other samples in `output`.
        RunFailedError: the engines could not start, kept dying, stalled twice with the same prompts, or
            answered no prompt.
    """
    model, adapter = str(model), str(adapter) if adapter is not None else None
    if not prompts:
        raise InputError("no prompts: the source is empty, or everything in it was filtered out")
    if len({prompt.id for prompt in prompts}) != len(prompts):
        raise InputError("prompt ids must be unique")
    check_model(model, adapter)
    check_length(model, generation)
    nodes = nodes or EngineNodes()
    folder = Path(output).absolute()
    manifest = open_folder(
        folder, sampling_fingerprint(model, prompts, generation, seed=seed, adapter=adapter)
    )
    if manifest["complete"]:
        log_progress(f"reusing the samples from {_short(model)} in {folder}")
        return Samples(folder)
    manifest |= {"model": model, "adapter": adapter, "seed": seed, "generation": to_tree(generation)}
    write_manifest(folder, manifest)

    rows = input_rows(prompts, generation, seed, adapter, stop_token_ids(model))
    done = done_indices(folder)
    todo = [row for row in rows if row["index"] not in done]
    started = time.monotonic()
    if todo:
        # Of all prompts, so that an engine that completes a folder is the one that began it.
        lengths = [len(prompt.token_ids) for prompt in prompts]
        arguments = engine_arguments(
            generation,
            use_gpu=nodes.use_gpu,
            adapter=adapter,
            length=needed_length(model, max(lengths), generation),
        )
        manifest |= _length_facts(engine_length(model, max(lengths), generation), lengths, generation)
        batches = -(-len(todo) // generation.batch_size)
        size = engine_count(generation, batches, nodes)
        manifest |= {"engines": [size.smallest, size.largest]}
        pool = _Pool(model, generation, arguments, nodes, size)
        manifest |= {"stalls": _run(pool, todo, len(rows), folder)}
    return _finish(folder, manifest, len(rows), time.monotonic() - started)


def sampling_fingerprint(
    model: str | Path,
    prompts: Sequence[PromptTokens],
    generation: GenerationConfig,
    *,
    seed: int,
    adapter: str | Path | None = None,
) -> str:
    """Digest of everything that samples depend on: model files, prompts, sampling parameters and seed.

    The model files include those that the stop tokens come from. The prompts' texts are what judges read.
    """
    settings = to_tree(generation)
    for key in ("engines", "batch_size", "tensor_parallel", "stall_timeout_s"):  # do not change the samples
        settings.pop(key)
    contents = [
        (p.id, p.token_ids, p.metadata, p.text, *([list(p.stop_ids)] if p.stop_ids else [])) for p in prompts
    ]
    files = [_files(model), _files(adapter) if adapter else None]
    return digest([*files, digest(contents), settings, seed, SAMPLING_VERSION])


def _files(folder: str | Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of the files that determine a model: hashing weights takes minutes."""
    suffixes = (".safetensors", ".json", ".jinja", ".model", ".gguf")
    files = sorted(f for f in Path(folder).iterdir() if f.suffix in suffixes)
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


@dataclass(frozen=True)
class _Pool:
    """The engines of one call."""

    model: str
    generation: GenerationConfig
    arguments: dict[str, Any]
    """vLLM's engine arguments."""
    nodes: EngineNodes
    size: EngineCount

    def processor(self, watch: StallWatch) -> Any:
        """The pipeline from prompts to answers, as a function of a dataset."""
        import ray
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        from tbpo_ray.generation.watched_engine import WatchedEngine

        free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        resources = engine_resources(
            self.generation, use_gpu=self.nodes.use_gpu, free_cpus=free, engines=self.size.smallest
        )
        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=self.model,
                engine_kwargs=self.arguments,
                runtime_env={"env_vars": environment(use_gpu=self.nodes.use_gpu, engines=self.size.per_node)},
                placement_group_config={"bundles": [resources]},
                concurrency=(self.size.smallest, self.size.largest),
                batch_size=self.generation.batch_size,
                max_concurrent_batches=2,
                should_continue_on_error=True,
                log_engine_metrics=False,
                chat_template_stage=False,
                tokenize_stage=False,
                detokenize_stage=False,
            ),
            preprocess=to_request,
            postprocess=to_result,
            preprocess_map_kwargs={"num_cpus": TASK_CPUS},
            postprocess_map_kwargs={"num_cpus": TASK_CPUS},
        )
        stage = processor.get_stage_by_name(_STAGE)
        # The default is to restart forever. A restart after the loss of a node is not counted by Ray.
        options = stage.map_batches_kwargs | {"max_restarts": ENGINE_RESTARTS}
        if self.nodes.labels:
            options["label_selector"] = dict(self.nodes.labels)
        reports = {"reports": str(watch.folder), "stall_timeout_s": self.generation.stall_timeout_s}
        changes = {
            "fn": WatchedEngine,
            "fn_constructor_kwargs": stage.fn_constructor_kwargs | reports,
            "map_batches_kwargs": options,
        }
        # A copy, because an assignment would derive the engine's resources again, and give it a GPU.
        processor.stages[_STAGE] = stage.model_copy(update=changes)
        return processor


def _run(pool: _Pool, rows: list[dict[str, Any]], total: int, folder: Path) -> int:
    """Run the pool over the rows and write every block when it is finished; return the stalls."""
    import pyarrow as pa
    import ray

    step = pool.generation.batch_size
    blocks = [pa.Table.from_pylist(rows[start : start + step]) for start in range(0, len(rows), step)]
    log_progress(f"sampling {len(rows)} answers from {_short(pool.model)} with {pool.size}")
    watch = StallWatch(folder, pool.generation.stall_timeout_s)
    began = time.time()
    with quiet_ray_data(), remove_telemetry_actor(), watch:
        written = pool.processor(watch)(ray.data.from_blocks(blocks)).map_batches(
            partial(_write_block, folder=folder), batch_size=None, batch_format="pandas", num_cpus=TASK_CPUS
        )
        failure = None
        try:
            _follow(written, total - len(rows), total)
        except (ray.exceptions.RayError, RuntimeError) as error:
            log = keep_dead_workers_logs(folder / ENGINE_LOG, since=began)
            failure = RunFailedError(
                f"sampling from {pool.model} failed, finished samples are kept in {folder}: "
                f"{_failure(error, watch.failure, log)}"
            )
            failure.__cause__ = error
            # The pool's actors end with the iteration, unless a frame of the exception still refers to it.
            traceback.clear_frames(error.__traceback__)
        finally:
            del written
            gc.collect()
    watch.await_engines_end()
    if failure is not None:
        raise failure
    return watch.stalls


def _follow(written: Dataset, done: int, total: int) -> None:
    """Run the pipeline and log its progress."""
    started, tokens = time.monotonic(), 0
    for batch in written.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        done += int(batch["rows"].sum())
        tokens += int(batch["tokens"].sum())
        seconds = time.monotonic() - started
        log_progress(f"sampled {done} of {total} answers, {tokens} tokens, {seconds:.0f} s")


def _write_block(batch: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Write answered and failed rows of one block as a Parquet part; return the number of rows and tokens."""
    import pandas as pd

    rows = [output_row(row) for row in batch.to_dict("records")]
    if rows:
        write_part(folder, rows)
    return pd.DataFrame({"rows": [len(rows)], "tokens": [sum(len(row["token_ids"]) for row in rows)]})


def _finish(folder: Path, manifest: dict[str, Any], expected: int, seconds: float) -> Samples:
    table = read_parts(folder)
    if table.num_rows != expected:
        raise RunFailedError(
            f"{folder}: has {table.num_rows} of {expected} answers; run the command again to add the rest"
        )
    errors = [text for text in table["error"].to_pylist() if text]
    tokens = sum(len(ids) for ids in table["token_ids"].to_pylist())
    if len(errors) == expected:
        raise RunFailedError(f"all {expected} answers failed; the first error: {errors[0]}")
    if errors:
        log_progress(f"{len(errors)} of {expected} answers failed; the first error: {errors[0]}")
    write_manifest(
        folder,
        manifest
        | {
            "complete": True,
            "rows": expected,
            "failed": len(errors),
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        },
    )
    return Samples(folder)


def _short(model: str) -> str:
    """The last two parts of a model folder's path: the parent of an export is its run."""
    return "/".join(Path(model).parts[-2:])


def _length_facts(limit: int | None, lengths: Sequence[int], generation: GenerationConfig) -> dict[str, Any]:
    """The manifest's entries about lengths, which are also logged.

    Args:
        limit: maximum number of tokens of a prompt and its answer; None if vLLM's own applies.
        lengths: tokens of each prompt.
    """
    if limit is None:
        return {"max_model_len": None}
    too_long = sum(length >= limit for length in lengths)
    shortened = sum(limit - generation.max_tokens < length < limit for length in lengths)
    log_progress(f"engines hold at most {limit} tokens of a prompt and its answer")
    if too_long:
        log_progress(f"{too_long} of {len(lengths)} prompts do not fit and fail")
    if shortened:
        log_progress(
            f"{shortened} of {len(lengths)} prompts leave room for less than generation.max_tokens="
            f"{generation.max_tokens}"
        )
    return {"max_model_len": limit, "prompts_too_long": too_long, "answers_shortened": shortened}


def _failure(error: Exception, stall: str | None, log: str) -> str:
    """One sentence about an error of the pipeline, and `log`, what the engines printed about it."""
    from ray.exceptions import ActorDiedError

    summary = stall or error_summary(error)
    if stall is None and isinstance(error, ActorDiedError) and not error.actor_init_failed:
        summary = f"an engine died {ENGINE_RESTARTS + 1} times"
    return f"{summary}; {log}" if log else summary

"""The pool: vLLM engines as Ray Data actors (`ray.data.llm`) that sample answers to prompts."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_ray.cluster.error_summary import error_summary
from tbpo_ray.cluster.worker_logs import keep_dead_workers_logs
from tbpo_ray.config.loading import digest, to_tree
from tbpo_ray.config.schema import GenerationConfig
from tbpo_ray.errors import InputError, RunFailedError
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
from tbpo_ray.generation.vllm_engine import (
    TASK_CPUS,
    check_model,
    engine_arguments,
    engine_resources,
    environment,
    needed_length,
    pool_size,
)
from tbpo_ray.models.chat import stop_token_ids
from tbpo_ray.progress import log_progress

if TYPE_CHECKING:
    import pandas as pd
    from ray.data import Dataset

ENGINE_RESTARTS = 3
"""How often an engine that died is restarted."""
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
    use_gpu: bool = False,
    adapter: str | Path | None = None,
    labels: Mapping[str, str] | None = None,
) -> Samples:
    """Sample `generation.samples` answers to each prompt into Parquet parts under `output`.

    Ray must be running. Every (prompt, sample) has its own seed, so that a sample does not depend on its
    batch. A prompt that the engine rejects becomes a row with `error`. A call after a crash samples only the
    rows that are missing; a call with complete samples starts no engine. All engines have been stopped when
    this function returns or raises.

    Args:
        model: a model folder that vLLM loads (safetensors, no remote code).
        prompts: the prompts, with unique ids.
        output: a folder on storage that all nodes share, either empty or from an earlier call with the same
            arguments.
        seed: seeds each sample together with the prompt's id and the sample's number.
        use_gpu: give each engine `generation.tensor_parallel` GPUs; otherwise a CPU, or the part of one that
            is free.
        adapter: a LoRA adapter folder, served without merging.
        labels: Ray node labels that the engines' nodes must have.

    Raises:
        InputError: no prompts, not a model folder, an adapter of another model, or other samples in `output`.
        RunFailedError: the engines could not start, kept dying, or answered no prompt.
    """
    model, adapter = str(model), str(adapter) if adapter is not None else None
    if not prompts:
        raise InputError("no prompts: the source is empty, or everything in it was filtered out")
    if len({prompt.id for prompt in prompts}) != len(prompts):
        raise InputError("prompt ids must be unique")
    check_model(model, adapter)
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
        length = needed_length(model, max(len(prompt.token_ids) for prompt in prompts), generation)
        arguments = engine_arguments(generation, use_gpu=use_gpu, adapter=adapter, length=length)
        _run(
            model, todo, len(rows), generation, folder, use_gpu=use_gpu, arguments=arguments,
            labels=labels or {},
        )  # fmt: skip
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
    for key in ("engines", "batch_size", "tensor_parallel"):  # change the speed, not the samples
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


def _run(
    model: str,
    rows: list[dict[str, Any]],
    total: int,
    generation: GenerationConfig,
    folder: Path,
    *,
    use_gpu: bool,
    arguments: dict[str, Any],
    labels: Mapping[str, str],
) -> None:
    """Run the pool over the rows and write every block when it is finished."""
    import pyarrow as pa
    import ray

    blocks = [
        pa.Table.from_pylist(rows[start : start + generation.batch_size])
        for start in range(0, len(rows), generation.batch_size)
    ]
    smallest, largest = pool_size(generation)
    free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
    resources = engine_resources(generation, use_gpu=use_gpu, free_cpus=free, engines=smallest)
    log_progress(f"sampling {len(rows)} answers from {_short(model)} with {_engine_count(smallest, largest)}")
    with quiet_ray_data(), remove_telemetry_actor():
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=model,
                engine_kwargs=arguments,
                runtime_env={"env_vars": environment(use_gpu=use_gpu, engines=largest)},
                placement_group_config={"bundles": [resources]},
                concurrency=(smallest, largest),
                batch_size=generation.batch_size,
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
        actor_options = processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs
        # The default is to restart forever. A restart after the loss of a node is not counted by Ray.
        actor_options["max_restarts"] = ENGINE_RESTARTS
        if labels:
            actor_options["label_selector"] = dict(labels)
        written = processor(ray.data.from_blocks(blocks)).map_batches(
            partial(_write_block, folder=folder), batch_size=None, batch_format="pandas", num_cpus=TASK_CPUS
        )
        began = time.time()
        try:
            _follow(written, total - len(rows), total)
        except (ray.exceptions.RayError, RuntimeError) as error:
            log = keep_dead_workers_logs(folder / ENGINE_LOG, since=began)
            raise RunFailedError(
                f"sampling from {model} failed, finished samples are kept in {folder}: {_failure(error, log)}"
            ) from error
        finally:
            # The pool's actors end with the iteration, unless a frame of the exception still refers to it.
            del written, processor
            gc.collect()


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


def _engine_count(smallest: int, largest: int) -> str:
    return f"{smallest} engine(s)" if smallest == largest else f"{smallest} to {largest} engines"


def _failure(error: Exception, log: str) -> str:
    """One sentence about an error of the pipeline, and `log`, what the engines printed about it."""
    from ray.exceptions import ActorDiedError

    summary = error_summary(error)
    if isinstance(error, ActorDiedError) and not error.actor_init_failed:
        summary = f"an engine died {ENGINE_RESTARTS + 1} times"
    return f"{summary}; {log}" if log else summary

"""The pool: vLLM engines as Ray Data actors (`ray.data.llm`) that turn prompts into samples."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_ray.config.loading import digest, to_tree
from tbpo_ray.config.schema import GenerationConfig
from tbpo_ray.errors import InputError, RunFailedError
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
    end_tokens,
    engine_arguments,
    engine_resources,
    environment,
    pool_size,
)
from tbpo_ray.progress import log_progress

if TYPE_CHECKING:
    import pandas as pd
    from ray.data import Dataset

ENGINE_RESTARTS = 3
"""How often one engine that died is started again."""


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

    Ray must be running. Every (prompt, sample) has its own seed, so a sample does not depend on the batch it
    came in. A prompt that the engine refuses becomes a row with `error`. Called again after a crash it
    samples only what is missing, at most one block of `generation.batch_size` rows per engine; called again
    when done it starts no engine. The engines are gone when it returns or raises.

    Args:
        model: a model folder that vLLM loads (safetensors, no code of its own).
        prompts: with unique ids.
        output: a folder that all nodes see; samples of anything else in it are refused.
        seed: with the prompt's id and the sample's number it seeds the sampling.
        use_gpu: `generation.tensor_parallel` GPUs for each engine; otherwise a CPU, or what is free of one.
        adapter: a LoRA adapter folder, served without merging.
        labels: that the engines' nodes must carry.

    Raises:
        InputError: no prompts, a folder that is no model, an adapter of another model, a foreign `output`.
        RunFailed: the engines could not start, died again and again, or answered nothing at all.
    """
    model, adapter = str(model), str(adapter) if adapter is not None else None
    if not prompts:
        raise InputError("no prompts to answer: the file is empty, or everything in it was filtered out")
    if len({prompt.id for prompt in prompts}) != len(prompts):
        raise InputError("prompt ids must be unique")
    check_model(model, adapter)
    folder = Path(output).absolute()
    manifest = open_folder(
        folder, sampling_fingerprint(model, prompts, generation, seed=seed, adapter=adapter)
    )
    if manifest["complete"]:
        log_progress(f"samples of {_short(model)} are there already: {folder}")
        return Samples(folder)
    manifest |= {"model": model, "adapter": adapter, "seed": seed, "generation": to_tree(generation)}
    write_manifest(folder, manifest)

    rows = [
        _input_row(index, prompt, sample, generation, seed, adapter)
        for index, (prompt, sample) in enumerate(
            (prompt, sample) for prompt in prompts for sample in range(generation.samples)
        )
    ]
    done = done_indices(folder)
    todo = [row for row in rows if row["index"] not in done]
    started = time.monotonic()
    if todo:
        _run(
            model, todo, len(rows), generation, folder, use_gpu=use_gpu, adapter=adapter, labels=labels or {}
        )
    return _finish(folder, manifest, len(rows), time.monotonic() - started)


def sampling_fingerprint(
    model: str | Path,
    prompts: Sequence[PromptTokens],
    generation: GenerationConfig,
    *,
    seed: int,
    adapter: str | Path | None = None,
) -> str:
    """Digest of all that samples depend on: model files, prompts, sampling parameters, seed."""
    settings = to_tree(generation)
    for layout in ("engines", "batch_size", "tensor_parallel"):
        settings.pop(layout)
    asked = [(p.id, p.token_ids, p.metadata) for p in prompts]
    return digest([_files(model), _files(adapter) if adapter else None, digest(asked), settings, seed])


def _files(folder: str | Path) -> list[tuple[str, int, int]]:
    kept = (".safetensors", ".json", ".jinja", ".model", ".gguf")
    files = sorted(f for f in Path(folder).iterdir() if f.suffix in kept)
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _input_row(
    index: int,
    prompt: PromptTokens,
    sample: int,
    generation: GenerationConfig,
    seed: int,
    adapter: str | None,
) -> dict[str, Any]:
    own = hashlib.sha256(f"{seed}/{prompt.id}/{sample}".encode()).digest()
    row = {
        "index": index,
        "prompt_id": prompt.id,
        "sample": sample,
        "prompt_text": prompt.text,
        "input_ids": list(prompt.token_ids),
        "metadata_json": json.dumps(prompt.metadata, ensure_ascii=False, default=str),
        "seed": int.from_bytes(own[:4], "big") >> 1,
        "sampling": json.dumps(
            {
                "max_tokens": generation.max_tokens,
                "temperature": generation.temperature,
                "top_p": generation.top_p,
                "logprobs": 0,
            }
        ),
    }
    return row | ({"model": adapter} if adapter else {})


def _run(
    model: str,
    rows: list[dict[str, Any]],
    total: int,
    generation: GenerationConfig,
    folder: Path,
    *,
    use_gpu: bool,
    adapter: str | None,
    labels: Mapping[str, str],
) -> None:
    """Run the pool over the rows and write every block as it comes."""
    import pyarrow as pa
    import ray

    blocks = [
        pa.Table.from_pylist(rows[start : start + generation.batch_size])
        for start in range(0, len(rows), generation.batch_size)
    ]
    smallest, largest = pool_size(generation)
    free = ray.available_resources().get("CPU", 0.0)
    resources = engine_resources(generation, use_gpu=use_gpu, free_cpus=free, engines=smallest)
    log_progress(f"sampling {len(rows)} answers from {_short(model)} with {_engines(smallest, largest)}")
    with _quiet_ray_data(), _telemetry_actor_removed():
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=model,
                engine_kwargs=engine_arguments(generation, use_gpu=use_gpu, adapter=adapter),
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
            preprocess=_request,
            postprocess=partial(_result, ends=end_tokens(model)),
            preprocess_map_kwargs={"num_cpus": TASK_CPUS},
            postprocess_map_kwargs={"num_cpus": TASK_CPUS},
        )
        asked = processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs
        asked["max_restarts"] = ENGINE_RESTARTS  # without end if not said; a node that is taken away is none
        if labels:
            asked["label_selector"] = dict(labels)
        written = processor(ray.data.from_blocks(blocks)).map_batches(
            partial(_write_block, folder=folder), batch_size=None, batch_format="pandas", num_cpus=TASK_CPUS
        )
        try:
            _follow(written, total - len(rows), total)
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise RunFailedError(
                f"sampling from {model} failed, what is done is kept in {folder}: {_reason(error)}"
            ) from error
        finally:
            # The pool's actors end with the iteration; a reference held by a frame must not keep them.
            del written, processor
            gc.collect()


def _follow(written: Dataset, done: int, total: int) -> None:
    """Drive the pipeline and say how far it is."""
    started, tokens = time.monotonic(), 0
    for batch in written.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        done += int(batch["rows"].sum())
        tokens += int(batch["tokens"].sum())
        seconds = time.monotonic() - started
        log_progress(f"sampled {done} of {total} answers, {tokens} tokens, {seconds:.0f} s")


def _request(row: dict[str, Any]) -> dict[str, Any]:
    """Preprocess: an input row as a vLLM request."""
    return {
        "tokenized_prompt": list(row["input_ids"]),
        "sampling_params": json.loads(row["sampling"]) | {"seed": int(row["seed"])},
    }


def _result(row: dict[str, Any], ends: set[int]) -> dict[str, Any]:
    """Postprocess of a row that was answered; failed ones come past it as they are."""
    tokens = [int(token) for token in row["generated_tokens"]]
    return {key: row[key] for key in _CARRIED} | {
        "answer": row["generated_text"],
        "token_ids": tokens,
        "logprobs": [
            float(choices[token]["logprob"]) for token, choices in zip(tokens, row["logprobs"], strict=True)
        ],
        "finish_reason": "stop" if tokens and tokens[-1] in ends else "length",
    }


_CARRIED = ("index", "prompt_id", "sample", "prompt_text", "input_ids", "metadata_json")


def _write_block(batch: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Write answered and failed rows of one block as a Parquet part; return a count."""
    import pandas as pd

    rows = [_output_row(row) for row in batch.to_dict("records")]
    if rows:
        write_part(folder, rows)
    return pd.DataFrame({"rows": [len(rows)], "tokens": [sum(len(row["token_ids"]) for row in rows)]})


def _output_row(row: Mapping[str, Any]) -> dict[str, Any]:
    error = str(row.get("__inference_error__") or "")
    return {
        "index": int(row["index"]),
        "prompt_id": row["prompt_id"],
        "sample": int(row["sample"]),
        "prompt_text": row["prompt_text"],
        "prompt_token_ids": [int(token) for token in row["input_ids"]],
        "answer": "" if error else row["answer"],
        "token_ids": [] if error else [int(token) for token in row["token_ids"]],
        "logprobs": [] if error else [float(value) for value in row["logprobs"]],
        "finish_reason": "error" if error else row["finish_reason"],
        "metadata": row["metadata_json"],
        "error": error,
    }


def _finish(folder: Path, manifest: dict[str, Any], expected: int, seconds: float) -> Samples:
    table = read_parts(folder)
    if table.num_rows != expected:
        raise RunFailedError(
            f"{folder}: {table.num_rows} of {expected} answers came back; run again to complete them"
        )
    errors = [text for text in table["error"].to_pylist() if text]
    tokens = sum(len(ids) for ids in table["token_ids"].to_pylist())
    if len(errors) == expected:
        raise RunFailedError(f"none of {expected} prompts could be answered; the first: {errors[0]}")
    if errors:
        log_progress(f"{len(errors)} of {expected} answers failed and are recorded; the first: {errors[0]}")
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


_NOISY = (
    "ray.data",
    "ray.llm",
    "ray.llm.ray.llm._internal.common.utils.download_utils",
    "ray._private.worker",
    "vllm",
)


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without bars and plans, for this call only."""
    import ray.data.llm  # noqa: F401  (before the levels are set: it sets its own on import)
    from ray.data import DataContext

    context = DataContext.get_current()
    kept = (context.enable_progress_bars, context.print_on_execution_start, context.verbose_stats_logs)
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    context.enable_progress_bars = context.print_on_execution_start = context.verbose_stats_logs = False
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # a failure is raised, with its reason
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start, context.verbose_stats_logs = kept
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _telemetry_actor_removed() -> Iterator[None]:
    """`ray.data.llm` leaves a detached actor behind in every cluster it meets; remove it if it is ours."""
    import ray

    name = {"name": "llm_batch_telemetry", "namespace": "llm_batch_telemetry"}

    def find() -> Any:
        try:
            return ray.get_actor(**name)
        except ValueError:
            return None

    before = find()
    try:
        yield
    finally:
        after = find()
        if before is None and after is not None:
            ray.kill(after)


def _short(model: str) -> str:
    """The last two parts of a model folder: an export is named after its run."""
    return "/".join(Path(model).parts[-2:])


def _engines(smallest: int, largest: int) -> str:
    return f"{smallest} engine(s)" if smallest == largest else f"{smallest} to {largest} engines"


def _reason(error: Exception) -> str:
    """The last line of an error that says what happened."""
    from ray.exceptions import ActorDiedError

    if isinstance(error, ActorDiedError) and not error.actor_init_failed:
        return f"an engine died {ENGINE_RESTARTS + 1} times; its own words are in Ray's worker logs"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line and not line.startswith("File ")]
    last = (telling or lines or [type(error).__name__])[-1][:400]
    hint = "; the engine's own words are in Ray's worker logs" if "initialization failed" in last else ""
    return last + hint

"""The pipeline's rows: from a prompt to a vLLM request, and from its result to a row of a Parquet part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tbpo_ray.config.schema import GenerationConfig
from tbpo_ray.generation.samples import PromptTokens

_CARRIED = ("index", "prompt_id", "sample", "prompt_text", "input_ids", "metadata_json")
"""Columns of an input row that a result keeps."""


def input_rows(
    prompts: Sequence[PromptTokens],
    generation: GenerationConfig,
    seed: int,
    adapter: str | None,
    stop_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """One row per sample of each prompt, numbered by `index`.

    Args:
        stop_ids: the token ids that end an answer of the model.
    """
    sampling = {
        "max_tokens": generation.max_tokens,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "logprobs": 0,
    }
    common = {"model": adapter} if adapter else {}
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        # Without these, vLLM stops only at the ids of `generation_config.json`, or `config.json` without it.
        ends = {"stop_token_ids": sorted({*stop_ids, *prompt.stop_ids})}
        options = common | {"sampling": json.dumps(sampling | ends)}
        for sample in range(generation.samples):
            rows.append(_input_row(len(rows), prompt, sample, seed) | options)
    return rows


def _input_row(index: int, prompt: PromptTokens, sample: int, seed: int) -> dict[str, Any]:
    # Derived from ids instead of positions: a sample does not change when prompts are added or removed.
    sample_seed = hashlib.sha256(f"{seed}/{prompt.id}/{sample}".encode()).digest()
    return {
        "index": index,
        "prompt_id": prompt.id,
        "sample": sample,
        "prompt_text": prompt.text,
        "input_ids": list(prompt.token_ids),
        "metadata_json": json.dumps(prompt.metadata, ensure_ascii=False, default=str),
        "seed": int.from_bytes(sample_seed[:4], "big") >> 1,
    }


def to_request(row: dict[str, Any]) -> dict[str, Any]:
    """Preprocessing: convert an input row to a vLLM request."""
    return {
        "tokenized_prompt": list(row["input_ids"]),
        "sampling_params": json.loads(row["sampling"]) | {"seed": int(row["seed"])},
    }


def to_result(row: dict[str, Any]) -> dict[str, Any]:
    """Postprocessing of an answered row; Ray passes failed rows through unchanged."""
    tokens = [int(token) for token in row["generated_tokens"]]
    stop_ids = json.loads(row["sampling"])["stop_token_ids"]
    return {key: row[key] for key in _CARRIED} | {
        "answer": row["generated_text"],
        "token_ids": tokens,
        "logprobs": [
            float(choices[token]["logprob"]) for token, choices in zip(tokens, row["logprobs"], strict=True)
        ],
        "finish_reason": "stop" if tokens and tokens[-1] in stop_ids else "length",
    }


def output_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an answered or failed row to a row of a Parquet part."""
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
